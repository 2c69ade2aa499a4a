"""The zero-shot table: error bars on every row, missing sets named, three forms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bd3_megatron.cli import main
from bd3_megatron.convert.to_hf import write_folder
from bd3_megatron.data.tokenizer_open import open_tokenizer
from bd3_megatron.evaluate.tables import Column, render
from bd3_megatron.evaluate.zero_shot import SETS
from tests.unit.evaluate.tiny import LENGTH, tiny_model

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    tokenizer = open_tokenizer("bytes")
    tokenizer.save(root / "tokenizer")
    model = tiny_model(4, vocab=tokenizer.vocab_size)
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    write_folder(state, model.model.shape, root / "hf", tokenizer_dir=root / "tokenizer")  # type: ignore[arg-type]
    return root / "hf"


def test_every_set_has_its_recipe() -> None:
    for recipe in SETS.values():
        assert (ROOT / "configs" / "data" / recipe).is_file()


def test_local_files_are_scored_and_missing_sets_are_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ptb.txt").write_text("no one 's home\nthey did n't ask\n" * 6, encoding="utf-8")
    rows = [{"text": f"headline number {n}"} for n in range(9)]
    (tmp_path / "ag.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    local = [f"ptb={tmp_path / 'ptb.txt'}", f"ag_news={tmp_path / 'ag.jsonl'}", f"arxiv={tmp_path / 'gone.txt'}"]
    asked = ["--zero-shot", str(tmp_path / "work"), "--sets", "ptb", "ag_news", "arxiv", "--local", *local]
    code = main(["evaluate", str(folder), *asked, "--device", "cpu", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == 0 and [row["set"] for row in found] == ["ptb", "ag_news", "arxiv"]
    for row in found[:2]:
        assert row["low"] < row["perplexity"] < row["high"] and row["stderr_noise"] > 0 and row["stderr_text"] > 0
        # rows are BOS + L - 2 tokens + EOS
        assert row["num_tokens"] == row["num_sequences"] * LENGTH
    assert "does not exist; give the set's file" in found[2]["missing"]
    code = main(["evaluate", str(folder), *asked, "--device", "cpu", "--format", "markdown"])
    said = capsys.readouterr().out
    assert code == 0 and said.startswith("| set | perplexity | 95% low |") and "| arxiv | - |" in said


def test_no_set_at_all_is_a_failure_and_unknown_names_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["evaluate", str(folder), "--zero-shot", str(tmp_path), "--device", "cpu"]
    assert main([*asked, "--sets", "ptb", "--local", f"ptb={tmp_path / 'gone.txt'}"]) == 1
    assert "does not exist" in capsys.readouterr().out
    for wrong, sentence in (
        (["--sets", "imdb"], "zero-shot set 'imdb' is not known; use ptb, wikitext"),
        (["--local", "ptb"], "--local 'ptb' names no file; write SET=FILE"),
        (["--recipes", str(tmp_path / "none")], "holds no recipes; give --recipes DIR"),
    ):
        assert main([*asked, *wrong]) == 2
        assert sentence in capsys.readouterr().err


def test_tables_have_three_forms() -> None:
    columns = [Column("name", "name"), Column("value", "value", ".2f")]
    rows = [{"name": "a", "value": 1.0, "more": float("inf")}, {"name": "longer", "value": None}]
    assert render(columns, rows, "text") == "name    value\na       1.00\nlonger  -"
    assert render(columns, rows, "markdown").splitlines()[1:] == ["|---|---|", "| a | 1.00 |", "| longer | - |"]
    assert json.loads(render(columns, rows, "json")) == [
        {"name": "a", "value": 1.0, "more": None},
        {"name": "longer", "value": None},
    ]
