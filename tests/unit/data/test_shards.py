"""Shards: what is written is read; what is damaged, cut short, newer or foreign is refused by name."""

from __future__ import annotations

import json
import os
import pickle
import resource
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bd3_megatron.data.held_out import HELD_OUT_RULE
from bd3_megatron.data.loader import TokenDataset
from bd3_megatron.data.packing import PackedRows, PackingRule
from bd3_megatron.data.shard_header import token_dtype
from bd3_megatron.data.shards import ShardFolder, ShardWriter
from bd3_megatron.errors import DataError, TokenizerError
from tests.unit.data.corpora import SPECIAL, documents, write_split


@pytest.fixture
def split(tmp_path: Path) -> Path:
    return write_split(tmp_path / "train", [documents(12, seed=1), documents(7, seed=2)])


def change_header(split: Path, **changes: Any) -> None:
    header = json.loads((split / "header.json").read_text())
    (split / "header.json").write_text(json.dumps(header | changes))


@pytest.mark.parametrize("vocab_size", [260, 65_536, 65_537, 2**31])
def test_what_is_written_is_read(tmp_path: Path, vocab_size: int) -> None:
    shards = [[[0, vocab_size - 1, 5], [7]], [[vocab_size - 2] * 4]]
    opened = ShardFolder(write_split(tmp_path, shards, vocab_size=vocab_size), verify=True)
    assert opened.num_shards == 2 and opened.num_tokens == 8 and opened.num_documents == 3
    assert opened.special == SPECIAL and opened.vocab_size == vocab_size
    assert token_dtype(vocab_size).itemsize == (2 if vocab_size <= 65_536 else 4)
    for number, listed in enumerate(shards):
        assert opened.tokens(number).tolist() == [token for document in listed for token in document]
        assert opened.document_ends(number).tolist() == np.cumsum([len(d) for d in listed]).tolist()
        assert opened.shard_size(number) == (sum(map(len, listed)), len(listed))


def test_a_split_travels_to_other_processes_without_its_tokens(split: Path) -> None:
    opened = ShardFolder(split)
    before = opened.tokens(0).tolist()
    assert len(pickle.dumps(opened)) < 4000
    assert pickle.loads(pickle.dumps(opened)).tokens(0).tolist() == before


def test_a_writer_leaves_nothing_where_there_is_nothing(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "part-00000", token_dtype(10)) as writer:
        writer.add([])
        assert writer.finish() is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["part-00000.bin", "part-00001.idx"])
def test_truncated_and_overlong_files_are_refused_when_opened(split: Path, name: str) -> None:
    content = (split / name).read_bytes()
    (split / name).write_bytes(content[:-1])
    with pytest.raises(
        DataError, match=f"{name} is truncated: {len(content) - 1} bytes, the header says {len(content)}"
    ):
        ShardFolder(split)
    (split / name).write_bytes(content + b"x")
    with pytest.raises(DataError, match=f"{name} is too long"):
        ShardFolder(split)
    (split / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing; prepare the data again"):
        ShardFolder(split)


@pytest.mark.parametrize("name", ["part-00000.bin", "part-00001.bin", "part-00000.idx", "part-00001.idx"])
def test_every_flipped_bit_is_found_by_verification(split: Path, name: str) -> None:
    content = bytearray((split / name).read_bytes())
    for place in (0, len(content) // 2, len(content) - 1):
        content[place] ^= 4
        (split / name).write_bytes(content)
        ShardFolder(split)
        with pytest.raises(DataError, match=f"{name} is damaged .checksum differs from the header"):
            ShardFolder(split, verify=True)
        content[place] ^= 4
    (split / name).write_bytes(content)
    assert len(list(ShardFolder(split).verify())) == 2


def test_verification_finds_content_that_its_checksum_does_not(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"part-00000.bin holds a token outside \[0, 260\)"):
        ShardFolder(write_split(tmp_path / "a", [[[1, 300]]]), verify=True)
    with pytest.raises(DataError, match="part-00000.idx does not increase to 3"):
        ShardFolder(write_split(tmp_path / "b", [[[1], [], [2, 2]]]), verify=True)


def test_ends_out_of_order_are_refused_when_they_are_used(split: Path) -> None:
    ends = np.fromfile(split / "part-00000.idx", dtype="<u8")
    ends[[2, 3]] = ends[[3, 2]]
    ends.tofile(split / "part-00000.idx")
    opened = ShardFolder(split)
    for _ in range(2):
        with pytest.raises(DataError, match=r"part-00000.idx does not increase to \d+; prepare the data again"):
            opened.document_ends(0)
    assert len(opened.document_ends(1)) == 7


def many_shards(folder: Path, count: int) -> Path:
    """A split of so many shards, every fifth of which is the same file under another name."""
    split = write_split(folder, [[[n, 1], [2]] for n in range(5)])
    header = json.loads((split / "header.json").read_text())
    listed = [header["shards"][n % 5] | {"name": f"link-{n:05d}"} for n in range(count)]
    for n, shard in enumerate(listed):
        for suffix in (".bin", ".idx"):
            os.link(split / f"part-{n % 5:05d}{suffix}", split / f"{shard['name']}{suffix}")
    change_header(split, shards=listed, num_tokens=3 * count, num_documents=2 * count)
    return split


def test_a_thousand_shards_are_read_under_1024_descriptors(tmp_path: Path) -> None:
    # 2,000 files in two folders of a mixture, which share one limit
    halves = [many_shards(tmp_path / name, 500) for name in ("a", "b")]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        for rows in TokenDataset.open(halves, seq_len=3, append_eos=False).sources:
            assert rows.read(np.arange(500)).tokens_BL.tolist() == [[n % 5, 1, 2] for n in range(500)]
        # far from the limit: a trainer holds sockets, logs and a GPU's files beside the text
        assert len(os.listdir("/proc/self/fd")) < 512
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_document_costs_eight_bytes_while_it_is_written_and_read(tmp_path: Path) -> None:
    count, most = 50_000, 9.0
    writer = ShardWriter(tmp_path / "part-00000", np.dtype("<u2"))
    batch = [np.ones(1, dtype=np.uint32)] * 1000
    with writer, traced() as held:
        for _ in range(count // 1000):
            writer.add(batch)
        # what is kept of them, not the tokens on their way to the disk
        assert held() / count < most
        assert writer.finish() is not None
    shards = ShardFolder(write_split(tmp_path / "split", [[[1, 2]] * (count // 2)] * 2))
    for mode in ("isolated", "pad"):
        with traced() as held:
            rows = PackedRows(shards, PackingRule(seq_len=16, mode=mode, block_size=4))
            rows.read(np.arange(0, rows.num_rows, rows.num_rows // 50))
            assert held() / count < most


@contextmanager
def traced() -> Iterator[Callable[[], int]]:
    """Gives the bytes that Python and numpy have taken since it began and still hold."""
    tracemalloc.start()
    try:
        yield lambda: tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def test_a_process_without_descriptors_hears_the_true_cause(split: Path) -> None:
    opened = ShardFolder(split)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = os.open(os.devnull, os.O_RDONLY)
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken + 1, hard))
    try:
        with pytest.raises(
            DataError, match=r"part-00000.bin failed \(Too many open files\); raise the limit with ulimit"
        ):
            opened.tokens(0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(taken)


def test_headers_that_do_not_fit_are_refused(split: Path) -> None:
    original = (split / "header.json").read_text()
    shards = json.loads(original)["shards"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"version": 1}, "has version 1; this release reads versions 2 and 3, use the release that wrote it"),
        ({"format": "other"}, "is not a header of token shards"),
        (
            {"num_tokens": 1},
            r"is damaged \(num_tokens is 1, not \d+, the sum over its shards\); prepare the data again",
        ),
        ({"num_documents": 18}, r"is damaged \(num_documents is 18, not 19, the sum over its shards\)"),
        ({"dtype": "<f4"}, r"is damaged \(dtype is '<f4', not <u2, which holds 260 ids\)"),
        ({"shards": []}, r"is damaged \(shards is \[\], no list with at least one entry\)"),
        ({"shards": [3]}, r"header.json, shard 0, is damaged \(no JSON object\)"),
        ({"shards": [{"name": "x"}]}, r"header.json, shard 0, is damaged \(num_tokens is missing, no whole number"),
        ({"shards": shards + shards[:1]}, r"is damaged \(shards is .*, and names a shard twice\)"),
        ({"shards": [shards[0] | {"name": "../x"}]}, r"shard 0, is damaged \(name is '../x', no text of the form"),
        ({"vocab_size": 1}, r"header.json is damaged \(vocab_size is 1, no whole number in \[2, 4294967296\]\)"),
        (
            {"shards": [shards[0] | {"num_documents": 0}]},
            r"shard 0, is damaged \(num_documents is 0, no whole number in \[1",
        ),
        ({"version": 3}, r"shard 0, is damaged \(num_supervised is missing, no whole number in \[1, "),
        ({"vocab_size": "many"}, r"header.json is damaged \(vocab_size is 'many', no whole number in \[2, "),
        ({"packing": {"append_eos": 1}}, r"\(packing is .*, not true or false for append_eos and wrap_special\)"),
        ({"held_out": {"rule": "by name", "fraction": 0.1}}, r"held_out, is damaged \(rule is 'by name', no text of"),
        (
            {"held_out": {"rule": HELD_OUT_RULE, "fraction": float("nan")}},
            r"\(fraction is nan, no number in \[0, 0.5\]\)",
        ),
    ]
    for changes, sentence in cases:
        change_header(split, **changes)
        with pytest.raises(DataError, match=sentence):
            ShardFolder(split)
        (split / "header.json").write_text(original)
    change_header(split, special_ids={"bos": 1, "eos": 2, "pad": 3})
    with pytest.raises(TokenizerError, match="header.json has no mask id"):
        ShardFolder(split)
    change_header(split, special_ids={"bos": 1, "eos": 2, "pad": 3, "mask": 2})
    with pytest.raises(TokenizerError, match="header.json: the mask id 2 is also the id of eos; give the mask a token"):
        ShardFolder(split)
    (split / "header.json").write_text("{ torn")
    with pytest.raises(DataError, match="header.json is damaged .not JSON"):
        ShardFolder(split)
    (split / "header.json").write_text("[1]")
    with pytest.raises(DataError, match="header.json is damaged .no JSON object"):
        ShardFolder(split)
    (split / "header.json").unlink()
    with pytest.raises(
        DataError, match=r"header.json cannot be read \(No such file or directory\); prepare the data again"
    ):
        ShardFolder(split)
    with pytest.raises(DataError, match="nowhere does not exist; give a folder made by tools/prepare_data.py"):
        ShardFolder(split / "nowhere")


def test_a_shard_that_vanishes_after_opening_is_an_error_of_the_data(split: Path) -> None:
    opened = ShardFolder(split)
    (split / "part-00000.bin").unlink()
    with pytest.raises(DataError, match="opening .*part-00000.bin failed .No such file or directory"):
        opened.tokens(0)
