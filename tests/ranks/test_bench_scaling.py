"""The scaling benchmark runs the trainer on real ranks and says what communication took, by axis."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bd3_megatron.errors import RangeError
from tools.bench import scaling
from tools.bench.scaling import ScalingCase, Seen, cases, efficiencies, ranks_of

SMALL = ["--layers", "2", "--hidden", "32", "--heads", "2", "--length", "32", "--block", "4", "--vocab", "300"]
SHORT = ["--ranks", "1", "2", "--steps", "2", "--repeats", "1", "--batch", "1"]


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _rows(note: str) -> dict[tuple[str, str], list[str]]:
    lines = [line.strip("| ").split(" | ") for line in note.splitlines() if line.startswith(("| weak", "| strong"))]
    return {(line[0], line[1]): line[2:] for line in lines}


@pytest.mark.parametrize(("axis", "column"), [pytest.param("pp", 4, marks=pytest.mark.matrix), ("dp", 6)])
def test_the_axis_that_is_scaled_takes_its_share(axis: str, column: int, tmp_path: Path) -> None:
    assert scaling.main(["--axis", axis, *SMALL, *SHORT, "--results", str(tmp_path)]) == 0
    note = (tmp_path / "scaling.md").read_text("utf-8")
    rows = _rows(note)
    assert set(rows) == {("weak", "1"), ("weak", "2"), ("strong", "1"), ("strong", "2")}
    assert [row[0] for row in rows.values()] == ["1", "2", "2", "2"]
    for (_, ranks), row in rows.items():
        shares = [float(cell.rstrip("%")) for cell in row[3:]]
        assert (shares[column - 3] > 0) == (ranks == "2")
        assert sum(shares) - shares[column - 3] == 0
    assert str(tmp_path) not in note and f"python -m tools.bench.scaling --axis {axis}" in note


def test_cases_share_a_batch_a_rank_or_a_global_one() -> None:
    made = cases([4, 1, 2], 3)
    assert [(c.kind, c.ranks, c.global_batch) for c in made] == [
        ("weak", 1, 3),
        ("weak", 2, 6),
        ("weak", 4, 12),
        ("strong", 1, 12),
        ("strong", 2, 12),
        ("strong", 4, 12),
    ]


def test_efficiency_is_per_device_against_the_smallest() -> None:
    speeds = {1: 100.0, 2: 180.0, 4: 190.0}
    seen = {ScalingCase("weak", n, n): Seen(speed, {}) for n, speed in speeds.items()}
    assert list(efficiencies(seen, None).values()) == pytest.approx([1.0, 0.9, 0.475])
    # four ranks on two cores are two devices
    assert list(efficiencies(seen, 2).values()) == pytest.approx([1.0, 0.9, 0.95])


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert ranks_of(argparse.Namespace(device="cuda", ranks=None)) == [1, 2]
    with pytest.raises(RangeError, match=r"--ranks 4 exceeds the 3 GPUs of this machine; give at most 3\."):
        ranks_of(argparse.Namespace(device="cuda", ranks=[1, 4]))
