"""The step at debug shapes asks for no more operations than a loop by hand, and both are the same step."""

from __future__ import annotations

import pytest

from tools.bench import loop

SIZES = {"layers": 3, "hidden": 32, "heads": 2, "length": 32, "block": 4, "vocab": 64, "micro-batches": 2, "repeats": 1}
SMALL = ["--no-note", *(word for name, value in SIZES.items() for word in (f"--{name}", str(value)))]


def test_a_step_has_no_more_operations_than_a_loop_by_hand(
    alone: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert loop.main(SMALL) == 0
    said = capsys.readouterr().out
    counts = {
        cells[1]: int(cells[3].replace(",", ""))
        for line in said.splitlines()
        if (cells := [cell.strip() for cell in line.split("|")])[1:2] in (["shipped"], ["by hand"])
    }
    assert counts["shipped"] <= counts["by hand"]
    assert "times the CPU time" in said
