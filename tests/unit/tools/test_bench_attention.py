"""The attention benchmark checks before it times, and its note names command, versions and hardware but no path."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tools.bench import attention, harness

SMALL = ["--length", "64", "--block-size", "4", "--batch", "1", "--heads", "2", "--head-dim", "16", "--repeats", "2"]


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_note_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert attention.main([*SMALL, "--results", str(tmp_path)]) == 0
    note = (tmp_path / "attention.md").read_text("utf-8")
    assert note.count("attention forward + backward, cpu, float32") == 2
    assert "structured/cpu" in note and "dense mask | - |" in note and f"torch {torch.__version__}" in note
    assert "not timed, flex/TRITON: flex attention has no backward on CPU" in note
    assert f"python -m tools.bench.attention {' '.join(SMALL)}\n" in note
    assert str(Path.cwd()) not in note and str(tmp_path) not in note
    assert "structured/cpu" in capsys.readouterr().out


def test_without_a_note_nothing_is_written(tmp_path: Path) -> None:
    assert (
        attention.main(
            [*SMALL, "--no-note", "--forward-only", "--kv-heads", "1", "--documents", "--results", str(tmp_path)]
        )
        == 0
    )
    assert not list(tmp_path.iterdir())


def test_a_wrong_backend_is_not_timed() -> None:
    options = attention.build_parser().parse_args(SMALL)
    request = attention.bench_request(options, 64, 4)

    def broken(*_: object, **__: object) -> object:
        raise RuntimeError("no kernel image\nis available")

    assert attention.check(broken, request) == (None, "fails: no kernel image")  # type: ignore[arg-type]


def test_candidates_take_turns() -> None:
    order: list[str] = []
    candidates = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = harness.interleave(candidates, repeats=3, device="cpu")
    assert order == ["a", "b"] * 4 and [len(s) for s in seconds.values()] == [3, 3]


def test_speedup_is_the_median_of_the_rounds() -> None:
    assert harness.speedup({"slow": [2.0, 9.0, 4.0], "fast": [1.0, 3.0, 1.0]}, "fast", against="slow") == 3.0
