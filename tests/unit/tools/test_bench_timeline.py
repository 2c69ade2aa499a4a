"""The benchmark of measuring runs, and counts the marks that the trainer sets."""

from __future__ import annotations

from pathlib import Path

import pytest

from bd3_megatron.train.timeline import Timeline
from tools.bench import timeline

SMALL = "--layers 1 --hidden 32 --heads 2 --length 32 --vocab 64 --micro-batches 2 --repeats 1".split()


pytestmark = pytest.mark.usefixtures("alone")


def test_a_note_is_left(tmp_path: Path) -> None:
    assert timeline.main([*SMALL, "--results", str(tmp_path)]) == 0
    note = (tmp_path / "timeline.md").read_text("utf-8")
    assert "marks of a step, 1 layers, h32, L32, S4, V64, batch 1" in note
    assert "| its 12 marks | " in note and "one mark takes " in note


def test_the_marks_are_counted_right() -> None:
    readings: list[float] = []

    def clock() -> float:
        readings.append(float(len(readings)))
        return readings[-1]

    measured = Timeline(clock=clock)
    before = len(readings)
    timeline.marks_of_steps(measured, micro_batches=3, steps=1)
    assert len(readings) - before == 8 + 2 * 3
