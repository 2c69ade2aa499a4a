"""Prepared folders of which only answers are predicted: made, checked, mixed, read back; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from bd3_megatron.data.dataset_source import HubDataset
from bd3_megatron.data.loader import TokenDataset
from bd3_megatron.data.shard_header import read_header
from bd3_megatron.data.shards import ShardFolder
from bd3_megatron.data.source import Dialogue
from bd3_megatron.data.tokenizer_open import load_tokenizer
from bd3_megatron.errors import DataError
from tests.unit.data.chats import CHATML, MARKED, chat, chat_tokenizer, write_rows
from tests.unit.data.corpora import answers, documents, write_split
from tools import inspect_shards, prepare_data

WORDS = "one two three four five six seven eight nine ten".split()
CHATS: list[dict[str, Any]] = [
    {"messages": chat(f"{a} and {b}?", f"{b} {a}.", "why", f"so {a}"), "n": n}
    for n, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS[:4])
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow copies go to a folder of the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def run(*arguments: object) -> int:
    return prepare_data.main([*map(str, arguments), "--quiet"])


def written(split: Path) -> list[str]:
    """Documents of a split, what is predicted in brackets."""
    shards, tokenizer = ShardFolder(split, verify=True), load_tokenizer(split.parent / "tokenizer")
    found = []
    for number in range(shards.num_shards):
        flags, start = shards.supervised(number), 0
        assert flags is not None
        for end in shards.document_ends(number).astype(int).tolist():
            cuts = [start, *(np.flatnonzero(np.diff(flags[start:end])) + 1 + start).tolist(), end]
            pieces = [
                (tokenizer.decode(shards.tokens(number)[a:b]), flags[a]) for a, b in zip(cuts, cuts[1:], strict=False)
            ]
            found.append("".join(f"[{text}]" if known else text for text, known in pieces))
            start = end
    return found


def test_chats_become_tokens_and_what_is_predicted_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "chats.jsonl", CHATS)
    made = {}
    for name, template in (("a", CHATML), ("b", MARKED)):
        tokenizer = chat_tokenizer(tmp_path / f"tokenizer {name}", template)
        arguments = ("--dataset", path, "--messages", "--tokenizer", tokenizer, "--valid-fraction", 0.3)
        assert run(*arguments, "--out", tmp_path / name, "--dedup") == 0
        made[name] = {split: written(tmp_path / name / split) for split in ("train", "valid")}
        assert "of answers, which alone are predicted" in capsys.readouterr().out
    first = (
        "<|im_start|>user\none and one?<|im_end|>\n<|im_start|>assistant\n[one one.<|im_end|>\n]"
        "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n[so one]"
    )
    assert first in made["a"]["train"] + made["a"]["valid"]
    # chats are held out by their contents, whatever template writes them
    for split in ("train", "valid"):
        bare = [[text.replace("[", "").replace("]", "") for text in made[name][split]] for name in ("a", "b")]
        assert bare[0] == bare[1] and len(bare[0]) > 3
    assert made["b"]["train"][0] == made["a"]["train"][0].replace("<|im_end|>\n]", "<|im_end|>]\n")
    # the folder says it, and another template is another folder
    header = read_header(tmp_path / "a" / "train")
    assert header.num_supervised and json.loads((tmp_path / "a/train/header.json").read_text())["version"] == 3
    assert run(*arguments, "--out", tmp_path / "a", "--dedup") == 2
    assert "was prepared from other text or settings" in capsys.readouterr().err
    assert inspect_shards.main([str(tmp_path / "a" / "train"), "--verify"]) == 0
    assert f"answers      {header.num_supervised:,} tokens" in capsys.readouterr().out


def test_pairs_are_kept_as_they_are_and_damage_is_found(tmp_path: Path) -> None:
    rows = [{"q": f"{a} + {b} = ", "a": f"{b} {a}"} for a in WORDS for b in WORDS]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    columns = ("--dataset", path, "--prompt-column", "q", "--answer-column", "a", "--valid-fraction", 0)
    assert run(*columns, "--out", tmp_path / "made") == 0
    assert sorted(written(tmp_path / "made" / "train")) == sorted(f"{r['q']}[{r['a']}]" for r in rows)
    # a cell of digits is a text like any other
    (tmp_path / "sums.csv").write_text("q,a\n1 + 1 =,2\n")
    source = HubDataset(path=str(tmp_path / "sums.csv"), prompt_column="q", answer_column="a")
    (found,) = (document for part in source.parts() for document in source.documents(part))
    assert isinstance(found, Dialogue) and [turn["content"] for turn in found.messages] == ["1 + 1 =", "2"]
    flags = tmp_path / "made" / "train" / "part-00000.sup"
    flags.write_bytes(b"\1" + flags.read_bytes()[1:])
    with pytest.raises(DataError, match=r"part-00000\.sup is damaged \(checksum differs"):
        ShardFolder(tmp_path / "made" / "train", verify=True)
    flags.write_bytes(flags.read_bytes()[1:])
    with pytest.raises(DataError, match=r"part-00000\.sup is truncated"):
        ShardFolder(tmp_path / "made" / "train")


def test_plain_folders_are_what_they_were(tmp_path: Path) -> None:
    """A header without answers has the version and keys that older releases read."""
    plain = write_split(tmp_path / "plain", [documents(3, 1)])
    header = json.loads((plain / "header.json").read_text())
    assert header["version"] == 2 and set(header["shards"][0]) == {
        *("name", "num_tokens", "num_documents", "bin_sha256", "idx_sha256"),
    }
    assert ShardFolder(plain).supervised(0) is None and ShardFolder(plain).num_supervised is None


def test_beside_answers_plain_text_is_predicted_whole(tmp_path: Path) -> None:
    listed = documents(30, 1)
    # ids tell the sources apart: plain text has the odd ones
    even, odd = ([[2 * (t // 2) + bit for t in document] for document in listed] for bit in (0, 1))
    plain = write_split(tmp_path / "plain", [odd])
    asked = write_split(tmp_path / "asked", [even], supervised=[answers(even, 1)])
    rule: dict[str, Any] = {"seq_len": 16, "packing": "isolated", "block_size": 4}
    assert TokenDataset.open(plain, **rule).batch_for(torch.arange(9)).is_supervised_BL is None
    mixed = TokenDataset.open([plain, asked], **rule).batch_for(torch.arange(24))
    assert mixed.is_supervised_BL is not None and mixed.is_padding_BL is not None
    is_text_BL = mixed.tokens_BL < 256
    is_plain_B = (is_text_BL & (mixed.tokens_BL % 2 == 1)).any(dim=1)
    assert is_plain_B.sum() == 12 and mixed.is_supervised_BL[is_plain_B].all()
    rest_BL = mixed.is_supervised_BL[~is_plain_B][is_text_BL[~is_plain_B]]
    assert rest_BL.any() and not rest_BL.all()


def test_every_mistake_is_one_line_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [{"messages": chat("a", "b"), "q": "a", "a": "b", "text": "c"}]
    bad = [*good, {"messages": chat("a", " "), "q": "a", "a": "", "text": "c"}]
    path, empty = write_rows(tmp_path / "good.jsonl", good), write_rows(tmp_path / "bad.jsonl", bad)
    tokenizer = chat_tokenizer(tmp_path / "tokenizer")
    bare = chat_tokenizer(tmp_path / "bare", None)
    pair = ("--prompt-column", "q", "--answer-column", "a")
    cases: list[tuple[tuple[object, ...], str]] = [
        (("--dataset", path, "--messages"), "tokenizer=bytes has no chat template, so nothing says how messages"),
        (("--dataset", path, "--messages", "--tokenizer", bare), "has no chat template"),
        (("--dataset", path, "--messages", "--tokenizer", "sentencepiece"), "tokenizer=sentencepiece has no chat template"),
        (("--dataset", path, "--messages", *pair), "messages and prompt_column with answer_column each say where the text"),
        (("--dataset", path, "--messages", "--column", "q"), "column=q and messages each say where the text stands"),
        (("--dataset", path, "--prompt-column", "q"), "prompt_column=q stands alone; give both"),
        (("--dataset", path, "--answer-column", "a"), "answer_column=a stands alone; give both"),
        (("--dataset", path, "--prompt-column", "q", "--answer-column", "b"), "has no column b; it has"),
        (("--dataset", path, "--messages", "talk", "--tokenizer", tokenizer), "has no column talk; it has messages"),
        (("--text", path, *pair), "--prompt-column and --answer-column names columns of --dataset"),
        (("--dataset", path, *pair, "--detokenizer", "ptb"), "detokenizer=ptb undoes the spacing of a benchmark's"),
        (("--dataset", empty, *pair), f"row 1 of {empty} has an empty answer in column a; mend the row, or filter on it"),
        (("--dataset", empty, "--messages", "--tokenizer", tokenizer), f"row 1 of {empty} has an empty answer (a turn of"),
    ]  # fmt: skip
    before = sorted(path.name for path in tmp_path.iterdir())
    for arguments, sentence in cases:
        assert run(*arguments, "--out", tmp_path / "out") == 2, arguments
        shown = capsys.readouterr()
        lines = [line for line in shown.err.splitlines() if not line.startswith("training")]
        assert len(lines) == 1 and lines[0].startswith("prepare_data: error: ") and sentence in lines[0], shown.err
        assert len(lines[0]) <= 600 and sorted(path.name for path in tmp_path.iterdir()) == before
    assert run("--dataset", empty, *pair, "--out", tmp_path / "out", "--skip-bad", 1, "--valid-fraction", 0) == 0
    assert "left out: 1 bad" in capsys.readouterr().out
