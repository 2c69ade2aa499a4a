"""The data benchmark keeps its promises in small: equal folders, equal ids, a dated note."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.data.test_tokenizer import byte_level
from tools.bench import data as bench


def test_a_small_run_of_everything_is_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpt2 = byte_level(tmp_path / "gpt2")
    (tmp_path / "text.txt").write_text("some text, with 'words' and numbers 123\n\nand lines\n", encoding="utf-8")
    options = ["--kills", "1", "--kill-megabytes", "0.6", "--tokenizer", "bytes", "--results", str(tmp_path / "notes")]
    reading = ["--loader", "--loader-megabytes", "0.2", "--seconds", "0.01", "--workers", "1"]
    compared = ["--gpt2", str(gpt2), "--text", str(tmp_path / "text.txt")]
    assert bench.main([*options, *reading, *compared, "--scratch", str(tmp_path)]) == 0
    note = (tmp_path / "notes" / "data.md").read_text()
    assert "equal, byte for byte" in note and "million tokens/s from shards" in note and "ours are equal" in note
    assert str(tmp_path) not in note and "--gpt2 gpt2 --text text.txt" in note


def test_sizes_and_memory_are_measured(tmp_path: Path) -> None:
    seconds, memory = bench.timed(["sleep", "0.2"])
    assert seconds >= 0.2 and 0 < memory < 1e8
    corpus = bench.write_corpus(tmp_path / "a.txt", 50_000, seed=1)
    assert 50_000 <= corpus.stat().st_size < 51_000
    assert corpus.read_bytes() == bench.write_corpus(tmp_path / "b.txt", 50_000, seed=1).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [([], "nothing to do: give --prepare"), (["--gpt2", "x"], "--gpt2 and --text go together")],
)
def test_requests_without_sense_are_refused(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(arguments) == 2
    assert sentence in capsys.readouterr().err
