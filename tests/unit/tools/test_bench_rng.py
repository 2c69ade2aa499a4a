"""The noise benchmark runs, names what it timed, and says what it did not measure."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.bench import rng

SMALL = "--rows 4 --length 64 --block 4 --layers 1 --hidden 32 --heads 2 --vocab 64 --repeats 2".split()


pytestmark = pytest.mark.usefixtures("alone")


def test_a_note_is_left(tmp_path: Path) -> None:
    assert rng.main([*SMALL, "--results", str(tmp_path)]) == 0
    note = (tmp_path / "rng.md").read_text("utf-8")
    assert "noise against a step of 1 layers, h32, S4, V64, cpu" in note and "[4, 64]" in note
    for name in ("levels", "levels and masks", rng.TOTAL):
        assert f"| {name} | " in note
    assert f"| {rng.STEP_ROW} | " in note and "| 100 % |" in note
    assert "the step was timed at 1 rows and taken 4 / 1 times. Noise stays below 2 % of a step on devices that" in note
    assert note.rstrip().endswith("data tokens/s. On GPU: not measured.")


def test_shares_are_medians_of_rounds() -> None:
    assert rng.share([1.0, 2.0, 30.0], [100.0, 100.0, 100.0]) == "2 %"
