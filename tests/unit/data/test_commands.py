"""tools/prepare_data.py and tools/inspect_shards.py as people call them."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import datasets
import numpy as np
import pytest

from bd3_megatron.data.shards import ShardFolder
from tests.unit.data.corpora import english
from tools import inspect_shards, prepare_data


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(english(900, 1))
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow copies go to a folder of the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def run(*arguments: object) -> int:
    return prepare_data.main([*map(str, arguments), "--quiet"])


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts_of(split: Path) -> list[str]:
    """Documents of a split made by the byte tokenizer."""
    shards = ShardFolder(split)
    pieces = [np.split(shards.tokens(n), shards.document_ends(n)[:-1].astype(int)) for n in range(shards.num_shards)]
    return [bytes(tokens.astype(np.uint8)).decode() for some in pieces for tokens in some]


def test_rows_are_filtered_on_the_command_line_as_in_recipes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"text": f"t{i}" if i % 4 else None, "lang": "en" if i % 2 else "de", "meta": {"score": i}} for i in range(20)
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    filters = ("--filter", "column: text, at_least: 1", "--filter", "{column: meta.score, at_least: 3, at_most: 17}")
    one_of = ("--filter", "column: lang, one_of: [de, fr]")
    assert run("--dataset", path, *filters, *one_of, "--out", tmp_path / "a", "--valid-fraction", 0) == 0
    assert texts_of(tmp_path / "a" / "train") == ["t6", "t10", "t14"]


def test_bad_rows_are_skipped_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": f"t{i}" if i % 4 else None} for i in range(20)])
    options = ("--dataset", path, "--out", tmp_path / "a", "--valid-fraction", 0)
    assert run(*options, "--skip-bad", 4) == 2
    shown = capsys.readouterr().err
    assert (
        f"row 16 of {path} holds nothing (null) in column text; it is bad document number 5, and --skip-bad 4" in shown
    )
    assert run(*options, "--skip-bad", 5) == 0
    shown = capsys.readouterr()
    assert f"5 bad documents are left out: row 0 of {path} holds nothing (null) in column text, row 4 of" in shown.err
    assert "; left out: 5 bad" in shown.out
    assert texts_of(tmp_path / "a" / "train") == [f"t{i}" for i in range(20) if i % 4]
    assert inspect_shards.main([str(tmp_path / "a")]) == 0
    assert "documents    15; left out: 5 bad" in capsys.readouterr().out


def test_copies_and_evaluated_text_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = "Which of these many things would you rather have in your garden, a gnome or a swing?"
    lines = [
        "one thing",
        "so WHICH of these many things would you rather have in your -- garden, a gnome",
        "one  thing",
        "two",
    ]
    (tmp_path / "a.txt").write_text("".join(f"{line}\n" for line in lines))
    write_rows(tmp_path / "eval.jsonl", [{"q": question, "choices": [{"text": "a gnome"}, {"text": "a swing"}]}])
    options = ("--text", tmp_path / "a.txt", "--documents", "line", "--valid-fraction", 0, "--dedup")
    evaluated = ("--decontaminate", tmp_path / "eval.jsonl")
    assert run(*options, *evaluated, "--out", tmp_path / "a") == 0
    shown = capsys.readouterr()
    assert "1 document is a copy of an earlier one and is left out" in shown.err
    assert "compared with 1 evaluation texts; 2 are shorter than 13 words and are not" in shown.err
    assert "left out: 1 contaminated, 1 repeated" in shown.out
    assert texts_of(tmp_path / "a" / "train") == ["one thing", "two"]
    assert run(*options, *evaluated, "--ngram", 15, "--out", tmp_path / "b") == 0
    assert texts_of(tmp_path / "b" / "train") == ["one thing", lines[1], "two"]


def test_text_is_prepared_and_found_again(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run("--text", text, "--out", out, "--valid-fraction", 0.1) == 0
    assert f"{out} prepared: train" in capsys.readouterr().out
    assert run("--text", text, "--out", out, "--valid-fraction", 0.1) == 0
    assert "was prepared before" in capsys.readouterr().out
    assert ShardFolder(out / "train", verify=True).vocab_size == 260


def test_a_vocabulary_is_trained_of_the_size_asked_for(text: Path, tmp_path: Path) -> None:
    options = ("--tokenizer", "sentencepiece", "--vocab-size", 380, "--documents", "line")
    assert run("--text", text, "--out", tmp_path / "out", *options) == 0
    assert ShardFolder(tmp_path / "out" / "train").vocab_size == 380
    # A prepared folder's tokenizer serves another corpus.
    again = ("--tokenizer", tmp_path / "out" / "tokenizer", "--valid-fraction", 0)
    assert run("--text", text, "--out", tmp_path / "other", *again) == 0
    headers = [ShardFolder(tmp_path / name / "train").header for name in ("out", "other")]
    assert headers[0].tokenizer_fingerprint == headers[1].tokenizer_fingerprint


def test_the_other_sources_are_reached(tmp_path: Path) -> None:
    assert run("--builtin", "python-topics", "--out", tmp_path / "a") == 0
    assert ShardFolder(tmp_path / "a" / "train").num_tokens > 300_000
    (tmp_path / "r.yaml").write_text(f"about: r\nsources:\n  train: {{text: {tmp_path}/t.txt, documents: line}}\n")
    (tmp_path / "t.txt").write_text("".join(f"line {i}\n" for i in range(8)))
    assert run("--recipe", tmp_path / "r.yaml", "--out", tmp_path / "b", "--valid-fraction", 0.5) == 0
    assert 0 < ShardFolder(tmp_path / "b" / "valid").num_documents < 8


def test_every_mistake_is_one_line_and_leaves_nothing(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"text": "a", "meta": {"score": 1}}, {"text": None, "meta": {"score": 2}}]
    )
    cases: list[tuple[tuple[object, ...], str]] = [
        (("--text", tmp_path / "gone.txt"), "does not exist"),
        (("--text", tmp_path / "empty.txt"), "is empty"),
        (("--text", tmp_path / "latin.txt"), "latin.txt at byte 3 is not UTF-8; convert the file"),
        (("--builtin", "c-docs"), "built-in corpus 'c-docs' is not known"),
        (("--dataset", "./none.jsonl"), "dataset ./none.jsonl does not exist"),
        (("--recipe", tmp_path / "none.yaml"), "does not exist; give one of configs/data"),
        ((), "one source is read and none was given"),
        (("--text", text, "--builtin", "python-docs"), "--text and --builtin was given; use one of"),
        (("--text", text, "--tokenizer", "./none"), "tokenizer ./none does not exist"),
        (("--text", text, "--tokenizer", "sentencepiece", "--vocab-size", 100), "vocab_size=100 holds nothing"),
        (("--text", text, "--workers", 0), "num_workers=0 does no work"),
        (("--text", text, "--valid-fraction", 2), "valid_fraction=2.0 is outside"),
        (("--text", text, "--skip-bad", -1), "skip_bad=-1 is negative"),
        (("--text", text, "--filter", "column: text, at_least: 1"), "--filter is about rows of --dataset"),
        (
            ("--dataset", rows, "--filter", "- text: ["),
            "--filter '- text: [' is not valid YAML (line 1, column 2",
        ),
        (("--dataset", rows, "--filter", "column: text, atleast: 1"), "unknown key atleast; did you mean at_least?"),
        (
            ("--dataset", rows, "--filter", "column: text"),
            "filter on column text compares nothing; give equals, one_of",
        ),
        (("--dataset", rows, "--filter", "at_least: 1"), "column is not set and has no default"),
        (("--dataset", rows, "--column", "body"), "has no column body; it has text, meta, meta.score."),
        (("--dataset", rows), "row 1 of " + str(rows) + " holds nothing (null) in column text; mend the row"),
        (("--text", text, "--ngram", 8), "--ngram is about --decontaminate FILE"),
        (("--text", text, "--decontaminate", text, "--ngram", 0), "--ngram 0 is no run of words"),
        (("--text", text, "--decontaminate", "gone.txt"), "evaluation file gone.txt does not exist"),
    ]
    before = sorted(path.name for path in tmp_path.iterdir())
    for arguments, sentence in cases:
        assert run(*arguments, "--out", tmp_path / "out") == 2, arguments
        shown = capsys.readouterr()
        lines = [line for line in shown.err.splitlines() if not line.startswith("training")]
        assert len(lines) == 1 and lines[0].startswith("prepare_data: error: ") and sentence in lines[0], shown.err
        assert shown.out == "" and sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("tool", ["prepare_data.py", "inspect_shards.py"])
def test_help_answers_at_once_and_without_torch(tool: str, root: Path, clean_environment: Mapping[str, str]) -> None:
    command = [sys.executable, "-X", "importtime", str(root / "tools" / tool), "--help"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env=dict(clean_environment), capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    assert done.stdout.startswith("usage:")
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "datasets", "numpy", "tokenizers"}


def test_inspection_prints_header_statistics_and_samples(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("--text", text, "--out", out, "--valid-fraction", 0.1) == 0
    capsys.readouterr()
    assert inspect_shards.main([str(out), "--verify", "--samples", "1"]) == 0
    shown = capsys.readouterr().out
    for sentence in ("tokens", "documents", "lengths", "mask 259", "verified     1 shard is sound", "document 0: '"):
        assert shown.count(sentence) >= 2, sentence
    assert inspect_shards.main([str(out / "train"), "--samples", "0"]) == 0
    assert "document 0" not in capsys.readouterr().out


def test_inspection_finds_damage(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run("--text", text, "--out", out, "--valid-fraction", 0.1) == 0
    capsys.readouterr()
    shard = out / "train" / "part-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2] + b"\x01\x00")
    assert inspect_shards.main([str(out)]) == 0
    assert inspect_shards.main([str(out), "--verify"]) == 2
    assert "part-00000.bin is damaged (checksum differs from the header)" in capsys.readouterr().err
    header = json.loads((out / "train" / "header.json").read_text())
    (out / "train" / "header.json").write_text(json.dumps(header | {"tokenizer_fingerprint": "0" * 64}))
    assert inspect_shards.main([str(out)]) == 2
    assert "train has the tokenizer 0000000000000000, " in capsys.readouterr().err
    assert inspect_shards.main([str(tmp_path)]) == 2
    assert inspect_shards.main([str(tmp_path / "none")]) == 2
    assert "none holds no token shards; give a folder made by tools/prepare_data.py" in capsys.readouterr().err
