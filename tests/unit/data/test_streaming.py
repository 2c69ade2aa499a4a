"""Streams: the same rows for every grid, worker count and restart, from small saved states."""

from __future__ import annotations

import json
import random
import select
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from bd3_megatron.config.data import RowFilter
from bd3_megatron.data.dataset_source import HubDataset
from bd3_megatron.data.packing import PackedRows, PackingRule
from bd3_megatron.data.sampler import BatchShare
from bd3_megatron.data.shards import ShardFolder
from bd3_megatron.data.stream_shard import RowPacker, StreamPlan, StreamShard, StreamShardState
from bd3_megatron.data.streaming import StreamLoader, merge_states, plan_stream
from bd3_megatron.errors import ConfigError, DataError
from tests.unit.data.corpora import BYTES, SPECIAL, documents, write_split

RULE = PackingRule(seq_len=16, mode="isolated", block_size=4)


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three files of unequal length, with empty and long documents."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    chosen = random.Random(3)
    (tmp_path / "text").mkdir()
    for number, count in enumerate((40, 25, 33)):
        rows = [
            {"text": f"{number}.{i} " + "word " * chosen.choice([0, 1, 2, 5, 30]), "keep": i % 7 != 0}
            for i in range(count)
        ]
        rows[3]["text"] = "  "
        (tmp_path / "text" / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    BYTES.save(tmp_path / "tokenizer")
    return tmp_path


def plan(corpus: Path, rule: PackingRule = RULE, **options: object) -> StreamPlan:
    dataset = HubDataset(path=str(corpus / "text"), filters=(RowFilter(column="keep", equals=True),))
    return plan_stream(dataset, corpus / "tokenizer", rule, **{"shuffle_rows": 8, "seed": 5, **options})  # type: ignore[arg-type]


def batches_of(
    stream: StreamPlan, share: BatchShare, consumed: int, steps: int, *, workers: int = 0, state: dict | None = None
) -> tuple[dict[int, list[int]], dict]:
    """Rows by index, and the state after them."""

    def indices() -> Iterator[torch.Tensor]:
        for step in range(steps):
            yield from share.step(consumed + step * share.global_batch_size)

    loader = StreamLoader(stream, indices, num_workers=workers, state=state)
    rows: dict[int, list[int]] = {}
    for batch in loader:
        assert batch.tokens_BL.shape == (share.micro_batch_size, stream.rule.seq_len)
        rows |= dict(zip(batch.index_B.tolist(), batch.tokens_BL.tolist(), strict=True))
    return rows, loader.state_dict()


ONE = BatchShare(global_batch_size=6, micro_batch_size=6)


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_are_the_same_for_every_grid_and_restart(corpus: Path, workers: int) -> None:
    stream = plan(corpus)
    whole, _ = batches_of(stream, ONE, 0, 12)
    collected: dict[int, list[int]] = {}
    consumed, state = 0, None
    for dp, steps in ((2, 3), (1, 2), (3, 4), (2, 3)):
        states = []
        for rank in range(dp):
            share = BatchShare(global_batch_size=6, micro_batch_size=6 // dp, dp=dp, dp_rank=rank)
            rows, after = batches_of(stream, share, consumed, steps, workers=workers, state=state)
            assert not collected.keys() & rows.keys()
            collected |= rows
            states.append(after)
        state = json.loads(json.dumps(merge_states(states)))
        consumed += 6 * steps
    assert collected == whole


def test_a_stream_without_state_reaches_any_sample_by_reading_on(corpus: Path) -> None:
    stream = plan(corpus)
    whole, _ = batches_of(stream, ONE, 0, 10)
    later, _ = batches_of(stream, ONE, 42, 3)
    assert later == {index: whole[index] for index in range(42, 60)}


@pytest.mark.parametrize("mode", ["wrap", "isolated", "pad"])
@pytest.mark.parametrize("window", [1, 4])
def test_a_stream_shard_goes_on_exactly_from_any_row(corpus: Path, mode: str, window: int) -> None:
    stream = plan(corpus, PackingRule(seq_len=16, mode=mode, block_size=4), num_shards=1, shuffle_rows=window)
    shard = StreamShard(stream, 0)
    rows, states = [], []
    for number in range(60):
        rows.append(shard.row(number).tokens_BL.tolist())
        states.append(shard.state_before(number + 1))
    for number in range(0, 59, 7):
        saved = type(states[0])(**json.loads(json.dumps(states[number].as_dict())))
        again = StreamShard(stream, 0, saved)
        assert again.state_before(saved.window * window) == saved
        assert again.row(number + 1).tokens_BL.tolist() == rows[number + 1]
        if number % window == window - 1:  # a state taken at once is as good as the one it came from
            assert again.state_before(number + 2) == (states[number + 1] if window == 1 else saved)
        for later in (number + 2, min(number + 9, 59)):
            if later < 60:
                assert again.row(later).tokens_BL.tolist() == rows[later]
    assert states[-1].epoch == 0 or states[-1].stream is not None


def test_a_stream_shard_without_shuffling_is_its_files_packed_in_order(corpus: Path) -> None:
    rule = PackingRule(seq_len=16)
    shard = StreamShard(plan(corpus, rule, num_shards=1, shuffle_rows=1), 0)
    read = [
        row["text"]
        for n in range(3)
        for row in map(json.loads, (corpus / "text" / f"{n}.jsonl").read_text().splitlines())
        if row["keep"] and row["text"].strip()
    ]
    stream = [token for text in read for token in [*text.encode(), SPECIAL.eos]]
    for number in range(len(stream) // 16):
        assert shard.row(number).tokens_BL.tolist() == stream[number * 16 : number * 16 + 16]
    # Past its end the shard begins again, without a seam.
    beyond = len(stream) // 16
    assert shard.row(beyond).tokens_BL.tolist() == (stream + stream)[beyond * 16 : beyond * 16 + 16]


def test_windows_are_permuted_and_complete(corpus: Path) -> None:
    plain = StreamShard(plan(corpus, num_shards=1, shuffle_rows=1), 0)
    mixed = StreamShard(plan(corpus, num_shards=1, shuffle_rows=8), 0)
    for window in range(4):
        rows = [[shard.row(window * 8 + i).tokens_BL.tolist() for i in range(8)] for shard in (plain, mixed)]
        assert rows[0] != rows[1] and sorted(rows[0]) == sorted(rows[1])


def test_every_stream_shard_is_permuted_by_itself(corpus: Path) -> None:
    # two files of the same text, a stream shard each
    for file in (corpus / "text").iterdir():
        file.write_text("".join(json.dumps({"text": f"document {i:06}", "keep": True}) + "\n" for i in range(16)))
    (corpus / "text" / "2.jsonl").unlink()
    shards = [StreamShard(plan(corpus, num_shards=2, shuffle_rows=8), number) for number in (0, 1)]
    first, second = ([shard.row(i).tokens_BL.tolist() for i in range(8)] for shard in shards)
    assert first != second and sorted(first) == sorted(second)


@pytest.mark.parametrize("mode", ["wrap", "isolated", "pad"])
@pytest.mark.parametrize("special", [False, True])
def test_rows_are_packed_as_from_shards(tmp_path: Path, mode: str, special: bool) -> None:
    rule = PackingRule(seq_len=12, mode=mode, block_size=4, wrap_special=special and mode == "wrap")
    listed = documents(30, seed=4)
    from_shards = PackedRows(ShardFolder(write_split(tmp_path, [listed])), rule)
    packer = RowPacker(rule, SPECIAL)
    assert packer.add(np.zeros(0, dtype=np.uint32)) == 0
    for document in listed:
        packer.add(np.asarray(document, dtype=np.uint32))
    number = 0
    while packer.is_ready():
        expected, got = from_shards.read(np.asarray([number])), packer.row()
        for want, have in zip(expected, got, strict=True):
            assert (want is None) == (have is None)
            if want is not None and have is not None:
                np.testing.assert_array_equal(have, want[0])
        number += 1
    assert number in (from_shards.num_rows, from_shards.num_rows - 1)


def test_batches_carry_documents_padding_and_positions(corpus: Path) -> None:
    loader = StreamLoader(plan(corpus), lambda: ONE.step(0))
    batch = next(iter(loader))
    assert batch.document_id_BL is not None and batch.document_id_BL.dtype == torch.int64
    assert batch.is_padding_BL is not None and batch.is_padding_BL.dtype == torch.bool
    assert batch.position_BL is not None and int(batch.position_BL.max()) < 16


def test_streams_that_cannot_be_are_refused(corpus: Path) -> None:
    with pytest.raises(ConfigError, match=r"num_shards=4 is outside \[1, 3\], the files of .*; use 3 or fewer"):
        plan(corpus, num_shards=4)
    with pytest.raises(ConfigError, match="shuffle_rows=0 is empty; use 1"):
        plan(corpus, shuffle_rows=0)
    stream = plan(corpus)
    _, state = batches_of(stream, ONE, 0, 8)
    with pytest.raises(
        DataError, match="the saved stream state has num_shards=2, the run has 3; resume with num_shards=2"
    ):
        StreamLoader(stream, lambda: ONE.step(0), state={**state, "num_shards": 2})
    other = plan(corpus, PackingRule(seq_len=16, mode="isolated", block_size=8))
    with pytest.raises(
        DataError, match="the saved stream state has block_size=4, the run has 8; resume with block_size=4"
    ):
        StreamLoader(other, lambda: ONE.step(0), state=state)
    with pytest.raises(DataError, match=r"stream shard 0 stands at row \d+ and was asked for row 0; resume the stream"):
        batches_of(stream, ONE, 0, 1, state=state)
    for workers in (0, 1):
        with pytest.raises(DataError, match="asked for row 0"):
            batches_of(stream, ONE, 0, 1, state=state, workers=workers)


@pytest.mark.parametrize("window", [1, 2])
def test_a_stream_goes_on_where_it_stopped_at_the_very_end_of_its_files(tmp_path: Path, window: int) -> None:
    BYTES.save(tmp_path / "tokenizer")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": letter * 7}) + "\n" for letter in "abc"))
    stream = plan_stream(
        HubDataset(path=str(tmp_path / "a.jsonl")),
        tmp_path / "tokenizer",
        PackingRule(seq_len=8),
        num_shards=1,
        shuffle_rows=window,
    )
    whole = StreamShard(stream, 0)
    rows = [whole.row(number).tokens_BL.tolist() for number in range(8)]
    for stop in range(7):
        shard = StreamShard(stream, 0)
        for number in range(stop + 1):
            shard.row(number)
        state = json.loads(json.dumps(shard.state_before(stop + 1).as_dict()))
        again = StreamShard(stream, 0, StreamShardState(**state))
        assert [again.row(number).tokens_BL.tolist() for number in range(stop + 1, 8)] == rows[stop + 1 :]


@pytest.mark.parametrize("kind", ["saved", "text"])
def test_other_kinds_of_dataset_stream_and_resume_too(corpus: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"{kind} dataset"
    if kind == "saved":
        datasets.Dataset.from_dict({"text": [f"document {i} of many" for i in range(30)]}).save_to_disk(
            str(path), num_shards=3
        )
    else:
        path.mkdir()
        for number in range(3):
            (path / f"{number}.txt").write_text("\n\n".join(f"document {i} of many" for i in range(number, 30, 3)))
    stream = plan_stream(HubDataset(path=str(path)), corpus / "tokenizer", RULE, shuffle_rows=2)
    assert stream.num_shards == 3
    whole, _ = batches_of(stream, ONE, 0, 8)
    first, state = batches_of(stream, ONE, 0, 3)
    rest, _ = batches_of(stream, ONE, 18, 5, state=json.loads(json.dumps(state)), workers=1)
    assert first | rest == whole


def test_a_stream_without_the_column_is_refused_before_it_is_read(corpus: Path) -> None:
    dataset = HubDataset(path=str(corpus / "text"), column="body")
    with pytest.raises(DataError, match="has no column body; it has text, keep"):
        plan_stream(dataset, corpus / "tokenizer", RULE, shuffle_rows=1)


def test_streams_without_text_are_refused_instead_of_read_for_ever(corpus: Path) -> None:
    for path in (corpus / "text").iterdir():
        path.write_text('{"text": " ", "keep": true}\n{"text": "x", "keep": false}\n')
    with pytest.raises(DataError, match="stream shard 0 of .* holds no text; use fewer stream shards or other data"):
        batches_of(plan(corpus), ONE, 0, 1)
    for path in (corpus / "text").iterdir():
        path.write_text('{"text": 3, "keep": true}\n')
    with pytest.raises(
        DataError, match=r"row 0, counted .* of stream shard 0 of .* holds no text but int in column text; mend"
    ):
        batches_of(plan(corpus), ONE, 0, 1)


def test_a_state_knows_its_stream_wherever_that_lies(corpus: Path) -> None:
    _, state = batches_of(plan(corpus), ONE, 0, 2)
    state = json.loads(json.dumps(state))
    assert {"num_files", "held_out_fraction", "split", "filters", "tokenizer", "seed"} <= state.keys()
    (corpus / "text").rename(corpus / "moved")

    def moved(**options: int) -> StreamPlan:
        dataset = HubDataset(path=str(corpus / "moved"), filters=(RowFilter(column="keep", equals=True),))
        return plan_stream(dataset, corpus / "tokenizer", RULE, shuffle_rows=8, seed=5, **options)

    batches_of(moved(), ONE, 12, 1, state=state)
    (corpus / "moved" / "2.jsonl").unlink()
    with pytest.raises(DataError, match="the saved stream state has num_shards=3, the run has 2"):
        batches_of(moved(num_shards=2), ONE, 12, 1, state=state)
    with pytest.raises(
        DataError, match="the saved stream state has num_files=3, the run has 2; resume with num_files=3"
    ):
        batches_of(moved(num_shards=2), ONE, 12, 1, state={**state, "num_shards": 2})


ABANDONED = """
import os, signal, sys
from pathlib import Path
from bd3_megatron.data import streaming
from tests.unit.data.test_streaming import ONE, plan

streaming._POLL_SECONDS = 0.05
loader = streaming.StreamLoader(plan(Path(sys.argv[1])), lambda: ONE.steps(0), num_workers=1, prefetch=2)
next(iter(loader))
print("reads", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_stream_process_ends_when_its_rank_is_gone(
    corpus: Path, root: Path, clean_environment: Mapping[str, str]
) -> None:
    # a process of its own: one forked from here, among the threads of other tests, could wait for a lock for ever
    rank = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", ABANDONED, str(corpus)],
        stdout=subprocess.PIPE,
        cwd=root,
        env=dict(clean_environment),
    )
    assert rank.stdout is not None
    assert rank.stdout.readline() == b"reads\n"
    rank.wait(60)
    # the pipe's other end closes when the last process that holds it is gone
    ended, _, _ = select.select([rank.stdout], [], [], 60.0)
    assert ended and rank.stdout.read() == b""
    rank.stdout.close()


def test_a_killed_stream_process_is_reported(corpus: Path) -> None:
    import os
    import signal

    parent = os.getpid()

    def indices() -> Iterator[torch.Tensor]:
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        yield from ONE.step(0)

    with pytest.raises(DataError, match="stream process 0 ended with exit code -9; look for memory pressure"):
        list(StreamLoader(plan(corpus), indices, num_workers=1))
