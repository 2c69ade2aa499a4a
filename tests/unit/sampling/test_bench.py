"""The sampler's benchmark runs, checks both decoders before timing them, and reports what it promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.bench import sampler

TINY = [
    "--vocab-size",
    "64",
    "--hidden-size",
    "32",
    "--layers",
    "1",
    "--heads",
    "2",
    "--block-size",
    "16",
    "--repeats",
    "1",
]


def test_both_decoders_are_timed_and_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sampler.main([*TINY, "--results", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "| 16 | sampler |" in table and "| 1.000 |" in table and "| 16 | official form |" in table
    assert (tmp_path / "sampler.md").read_text("utf-8").count("tools.bench.sampler") == 2


def test_a_long_text_keeps_its_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert sampler.main(["--long", "400", "--no-note"]) == 0
    assert "| recomputed | 400 |" in capsys.readouterr().out
