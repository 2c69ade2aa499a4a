"""The step benchmark says what it did to the allocator, runs in bf16 on CPU, and refuses what it cannot compare."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.bench import step

SIZES = {"layers": 2, "hidden": 32, "heads": 2, "length": 32, "block": 4, "vocab": 64, "batch": 2, "repeats": 1}
SMALL = ["--no-note", *(word for name, value in SIZES.items() for word in (f"--{name}", str(value)))]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ratios_are_told_with_and_without_kept_memory(
    precision: str, alone: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert step.main([*SMALL, "--precision", precision]) == 0
    said = capsys.readouterr().out
    assert f"batch 2, {'float32' if precision == 'fp32' else 'bfloat16'}" in said
    assert "times as fast as naive without keep_freed_memory" in said and "with it for both" in said
    assert "as each ships, at" in said and "ms, freed memory kept" in said


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--style", "paper"], "has no models/dit.py; give a checkout of kuleshov-group/bd3lms."),
        ([], "the official model has one style; add --style paper."),
        (["--style", "paper", "--precision", "bf16"], "--official runs in fp32; leave --precision out."),
    ],
)
def test_an_official_folder_that_cannot_be_compared_is_refused(
    more: list[str], sentence: str, tmp_path: Path, alone: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert step.main([*SMALL, "--official", str(tmp_path), *more]) == 2
    assert sentence in capsys.readouterr().err
