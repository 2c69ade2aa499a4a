"""Texts come out as long as the documents: the rows, the noise and the decoder together, on an example small enough to tabulate.

Texts of 1 to 7 tokens, all lengths alike (mean 4.00), in one block of eight behind a block that is given. The model is the
minimiser of the training loss: for every pattern of masks the law of each position under the rows' own losses, counted by
enumeration. What is left is what rows, corruption and decoding do to the length.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bd3_megatron.data.batch import CleanBatch
from bd3_megatron.data.loader import batch_of
from bd3_megatron.data.packing import PackedRows, PackingRule
from bd3_megatron.data.shards import ShardFolder
from bd3_megatron.evaluate.noise_plan import Enumerated
from bd3_megatron.hf.cache_bd3 import KeyValueCache, RowPlan
from bd3_megatron.hf.decoding_options_bd3 import DecodingOptions
from bd3_megatron.hf.generation_bd3 import Decoder, Request
from tests.unit.data.corpora import SPECIAL, write_split
from tests.unit.hf.models import tiny_model

BLOCK, LONGEST, TEXT, BEGIN = 8, 7, 5, 4
GIVEN = (BEGIN,) * BLOCK
MASK = 259
VOCAB = 260
SAMPLES = 600
MEAN = (1 + LONGEST) / 2


def rows_of(folder: Path, mode: str) -> CleanBatch:
    """Every document once, in a row of its own: what is given fills a block, its text and its end the next."""
    listed = [[*GIVEN] + [TEXT] * length for length in range(1, LONGEST + 1)]
    rule = PackingRule(seq_len=2 * BLOCK, mode=mode, block_size=BLOCK)
    rows = PackedRows(ShardFolder(write_split(folder, [listed])), rule)
    return batch_of(rows.read(np.arange(rows.num_rows)), torch.arange(rows.num_rows))


def best_model(clean: CleanBatch) -> dict[tuple[int, ...], Tensor]:
    """Law of every position [S, V] under every noisy second block: what minimises the loss of these rows."""
    plan = Enumerated(block_size=BLOCK, mask_id=MASK)
    counts: dict[tuple[int, ...], Tensor] = {}
    for draw in range(plan.draws):
        noisy = plan.noisy(clean, torch.full((len(clean.tokens_BL),), draw))
        for row in range(len(clean.tokens_BL)):
            seen = tuple(noisy.noisy_BL[row, BLOCK:].tolist())
            table = counts.setdefault(seen, torch.full((BLOCK, VOCAB), 1e-9, dtype=torch.float64))
            has_loss = noisy.is_masked_BL[row, BLOCK:].nonzero()[:, 0]
            table[has_loss, noisy.clean_BL[row, BLOCK:][has_loss]] += 1
    return counts


class Tabulated:
    """The engine's forward, looked up."""

    span_multiple = 1

    def __init__(self, counts: dict[tuple[int, ...], Tensor]) -> None:
        self.counts = counts

    def __call__(self, cache: KeyValueCache, ids_BR: Tensor, plan: RowPlan, keep_BQ: Tensor) -> Tensor:
        # blocks that no row gives teach nothing: their law is uniform
        unknown = torch.ones(BLOCK, VOCAB, dtype=torch.float64)
        # a block that is finished goes through together with the next
        blocks = [torch.tensor(ids).split(BLOCK) for ids in ids_BR.tolist()]
        law_BRV = torch.stack([torch.cat([self.counts.get(tuple(b.tolist()), unknown) for b in row]) for row in blocks])
        return law_BRV.gather(1, keep_BQ[:, :, None].expand(-1, -1, VOCAB)).log()


def mean_length(counts: dict[tuple[int, ...], Tensor], rule: str) -> float:
    """Mean number of tokens between what is given and the end token, over SAMPLES texts."""
    shape_model = tiny_model(BLOCK, vocab_size=VOCAB, mask_token_id=MASK, max_position_embeddings=2 * BLOCK)
    options = DecodingOptions(rule=rule, stop_at_eos=True, seed=3)
    decoder = Decoder(
        shape_model.model,
        shape_model.lm_head,
        options,
        mask_id=MASK,
        eos_ids=(SPECIAL.eos,),
        forward=Tabulated(counts),
    )
    requests = [Request(GIVEN, BLOCK, key) for key in range(SAMPLES)]
    texts = [event.ids for event in decoder.run(requests) if event.ids is not None]
    return sum(len(ids) - BLOCK - (ids[-1] == SPECIAL.eos) for ids in texts) / SAMPLES


@pytest.mark.parametrize("mode", ["isolated", "pad"])
def test_texts_are_as_long_as_the_documents_in_whatever_order_they_are_revealed(tmp_path: Path, mode: str) -> None:
    counts = best_model(rows_of(tmp_path, mode))
    assert MEAN == 4.0
    # standard deviation of a length 2.0: four standard errors, 6 in 100,000 false alarms, and the seed is fixed
    assert mean_length(counts, "first_hitting") == pytest.approx(MEAN, abs=4 * 2.0 / SAMPLES**0.5)
    assert mean_length(counts, "left_to_right") == pytest.approx(MEAN, abs=4 * 2.0 / SAMPLES**0.5)


def test_without_loss_behind_the_end_texts_would_come_out_too_long(tmp_path: Path) -> None:
    clean = rows_of(tmp_path, "pad")
    assert clean.is_fill_BL is not None and clean.is_padding_BL is not None
    silent = best_model(replace(clean, is_padding_BL=clean.is_padding_BL | clean.is_fill_BL))
    assert mean_length(silent, "first_hitting") > MEAN + 1.0
