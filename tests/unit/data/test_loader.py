"""The same batches for every grid, number of loader processes and place of resumption."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
import torch

from bd3_megatron.data.batch import CleanBatch
from bd3_megatron.data.loader import BatchLoader, TokenDataset
from bd3_megatron.data.mixture import Mixture, Stage
from bd3_megatron.data.sampler import BatchShare
from bd3_megatron.errors import ConfigError, DataError, GridError, TokenizerError
from tests.unit.data.corpora import BYTES, VOCAB, documents, write_split


def steps_of(
    dataset: TokenDataset, share: dict[str, int], consumed: int, num_steps: int, num_workers: int
) -> list[list[CleanBatch]]:
    """Micro-batches of steps on one rank."""
    plan = BatchShare(**share)
    indices = [i for step in range(num_steps) for i in plan.step(consumed + step * plan.global_batch_size)]
    batches = list(BatchLoader(dataset, indices, num_workers=num_workers))
    each = plan.num_micro_batches
    return [batches[i : i + each] for i in range(0, len(batches), each)]


def samples(steps: list[list[CleanBatch]]) -> dict[int, tuple[int, ...]]:
    """Row of every index."""
    rows: dict[int, tuple[int, ...]] = {}
    for step in steps:
        for batch in step:
            for index, row in zip(batch.index_B.tolist(), batch.tokens_BL.tolist(), strict=True):
                assert index not in rows
                rows[index] = tuple(row)
    return rows


@pytest.fixture
def mixed(tmp_path: Path) -> TokenDataset:
    paths = [write_split(tmp_path / str(s), [documents(25, seed=s), documents(9, seed=s + 50)]) for s in range(3)]
    mixture = Mixture([Stage(start=0, weights=(1.0, 2.0, 0.0)), Stage(start=37, weights=(1.0, 1.0, 3.0))])
    return TokenDataset.open(paths, seq_len=16, packing="isolated", block_size=4, mixture=mixture, seed=3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_the_same_for_every_grid_and_resumption(mixed: TokenDataset, num_workers: int) -> None:
    plain = {i: tuple(mixed.batch_for(torch.tensor([i])).tokens_BL[0].tolist()) for i in range(64)}
    for dp in (1, 2, 4):
        collected: dict[int, tuple[int, ...]] = {}
        for rank in range(dp):
            share = {"global_batch_size": 8, "micro_batch_size": 2 if dp < 4 else 1, "dp": dp, "dp_rank": rank}
            collected |= samples(steps_of(mixed, share, 0, 3, num_workers))
            # The grid changes at the resumption: dp becomes 5 - dp, the consumed count stays.
        for rank in range(2):
            share = {"global_batch_size": 10, "micro_batch_size": 5, "dp": 2, "dp_rank": rank}
            collected |= samples(steps_of(mixed, share, 24, 4, num_workers))
        assert collected == plain


def test_random_datasets_mixtures_and_batches_neither_repeat_nor_skip(tmp_path: Path) -> None:
    chosen = random.Random(11)
    for trial in range(12):
        sources = chosen.randint(1, 3)
        paths = [
            write_split(
                tmp_path / f"{trial}-{s}", [documents(chosen.randint(1, 20), seed=s, longest=chosen.randint(9, 90))]
            )
            for s in range(sources)
        ]
        mode = chosen.choice(["wrap", "isolated", "pad"])
        weights = [float(chosen.randint(1, 4)) for _ in paths]
        dataset = TokenDataset.open(
            paths, seq_len=8, packing=mode, block_size=2, mixture=Mixture.of(weights), seed=trial
        )
        consumed, collected = 0, {}
        for _ in range(4):
            dp, mbs, m = chosen.randint(1, 3), chosen.randint(1, 3), chosen.randint(1, 2)
            size = dp * mbs * m
            for rank in range(dp):
                share = {"global_batch_size": size, "micro_batch_size": mbs, "dp": dp, "dp_rank": rank}
                collected |= samples(steps_of(dataset, share, consumed, 1, 0))
            consumed += size
        assert sorted(collected) == list(range(consumed))
        whole = dataset.batch_for(torch.arange(consumed)).tokens_BL.tolist()
        assert [collected[i] for i in range(consumed)] == [tuple(row) for row in whole]


def test_one_epoch_holds_every_row_once(tmp_path: Path) -> None:
    dataset = TokenDataset.open(write_split(tmp_path, [documents(60, seed=1)]), seq_len=8, packing="pad")
    shuffled = dataset.batch_for(torch.arange(dataset.num_rows)).tokens_BL
    plain = TokenDataset.open(tmp_path, seq_len=8, packing="pad", shuffle=False)
    in_order = plain.batch_for(torch.arange(plain.num_rows)).tokens_BL
    assert not torch.equal(shuffled, in_order)
    assert sorted(shuffled.tolist()) == sorted(in_order.tolist())
    second = dataset.batch_for(torch.arange(dataset.num_rows, 2 * dataset.num_rows)).tokens_BL
    assert not torch.equal(shuffled, second) and sorted(second.tolist()) == sorted(in_order.tolist())


def test_batches_have_the_promised_shapes_and_types(tmp_path: Path) -> None:
    path = write_split(tmp_path, [documents(60, seed=1)])
    index_B = torch.tensor([5, 2, 900])
    wrapped = TokenDataset.open(path, seq_len=12).batch_for(index_B)
    assert wrapped.tokens_BL.shape == (3, 12) and wrapped.tokens_BL.dtype == torch.int64
    assert torch.equal(wrapped.index_B, index_B)
    assert wrapped.document_id_BL is wrapped.is_padding_BL is wrapped.position_BL is None
    isolated = TokenDataset.open(path, seq_len=12, packing="isolated", block_size=4).batch_for(index_B)
    assert isolated.document_id_BL is not None and isolated.document_id_BL.dtype == torch.int64
    assert isolated.position_BL is not None and isolated.position_BL.dtype == torch.int64
    assert isolated.is_padding_BL is not None and isolated.is_padding_BL.dtype == torch.bool
    assert TokenDataset.open(path, seq_len=12).vocab_size == VOCAB
    moved = isolated.to(torch.device("cpu")).rows(1, 2)
    assert moved.tokens_BL.shape == (1, 12) and moved.index_B.tolist() == [2]


def test_the_recipes_rule_holds_unless_training_says_otherwise(tmp_path: Path) -> None:
    import json

    path = write_split(tmp_path, [documents(60, seed=1)])
    header = json.loads((path / "header.json").read_text())
    (path / "header.json").write_text(json.dumps(header | {"packing": {"append_eos": False, "wrap_special": True}}))
    special = TokenDataset.open(path, seq_len=12)
    assert special.sources[0].rule.wrap_special and not special.sources[0].rule.append_eos
    plain = TokenDataset.open(path, seq_len=12, append_eos=True, wrap_special=False)
    assert plain.sources[0].rule.append_eos and not plain.sources[0].rule.wrap_special
    assert not TokenDataset.open(path, seq_len=12, packing="pad").sources[0].rule.wrap_special


def test_the_last_batch_may_be_smaller(tmp_path: Path) -> None:
    dataset = TokenDataset.open(write_split(tmp_path, [documents(20, seed=1)]), seq_len=8, shuffle=False)
    indices = torch.arange(dataset.num_rows).split(7)
    for num_workers in (0, 2):
        batches = list(BatchLoader(dataset, indices, num_workers=num_workers))
        assert [len(b.tokens_BL) for b in batches] == [len(i) for i in indices]
        assert torch.equal(torch.cat([b.index_B for b in batches]), torch.arange(dataset.num_rows))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_shard_is_reported_in_one_sentence(tmp_path: Path, num_workers: int) -> None:
    dataset = TokenDataset.open(write_split(tmp_path, [[[3] * 50, [999] * 50]]), seq_len=8, shuffle=False)
    with pytest.raises(DataError, match="the shard is damaged") as caught:
        list(BatchLoader(dataset, torch.arange(10).split(1), num_workers=num_workers))
    assert "\n" not in str(caught.value)


class _Suicidal:
    def batch_for(self, index_B: torch.Tensor) -> CleanBatch:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_killed_loader_process_is_reported() -> None:
    with pytest.raises(DataError, match="a loader process ended unexpectedly .* set data.num_workers=0"):
        list(BatchLoader(_Suicidal(), [torch.arange(2)], num_workers=1))


def test_indices_are_taken_as_the_formula_says() -> None:
    share = BatchShare(global_batch_size=24, micro_batch_size=3, dp=2, dp_rank=1)
    assert share.num_micro_batches == 4
    assert share.index(100, 2).tolist() == [100 + (2 * 2 + 1) * 3 + b for b in range(3)]
    endless = share.steps(0)
    assert [next(endless)[0].item() for _ in range(5)] == [3, 9, 15, 21, 27]
    past = BatchShare(global_batch_size=4, micro_batch_size=4).index(2**33, 0)
    assert past.tolist() == [2**33 + b for b in range(4)]


@pytest.mark.parametrize(
    ("share", "kind", "sentence"),
    [
        ({"global_batch_size": 10, "micro_batch_size": 3}, ConfigError, "global_batch_size=10 is not a multiple of"),
        ({"global_batch_size": 8, "micro_batch_size": 0}, ConfigError, "micro_batch_size=0 is empty"),
        (
            {"global_batch_size": 8, "micro_batch_size": 1, "dp": 2, "dp_rank": 2},
            GridError,
            r"dp_rank=2 is outside \[0, 2\)",
        ),
    ],
)
def test_shares_that_do_not_fill_the_batch_are_refused(share: dict, kind: type, sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        BatchShare(**share)


def test_sources_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    one, other = (write_split(tmp_path / n, [documents(20, seed=1)]) for n in "ab")
    rows = [TokenDataset.open(p, seq_len=s).sources[0] for p, s in ((one, 8), (other, 16))]
    with pytest.raises(ConfigError, match="is packed as wrap of 16, .* wrap of 8; use one packing and seq_len"):
        TokenDataset(rows)
    foreign = write_split(tmp_path / "c", [documents(20, seed=1)], fingerprint="f" * 64)
    sentence = f"c has the tokenizer ffffffffffffffff, .*a has {BYTES.fingerprint[:16]}: the same ids are other text"
    with pytest.raises(TokenizerError, match=sentence):
        TokenDataset.open([one, foreign], seq_len=8)
    with pytest.raises(ConfigError, match="the mixture has 3 weights for 2 sources; give one each"):
        TokenDataset.open([one, other], seq_len=8, mixture=Mixture.of([1, 1, 1]))
    with pytest.raises(ConfigError, match="num_workers=-1 is negative"):
        BatchLoader(TokenDataset.open(one, seq_len=8), [], num_workers=-1)
