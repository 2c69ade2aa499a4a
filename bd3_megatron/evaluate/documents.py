"""Likelihood of documents of any length: the chain rule over blocks, finished blocks cached.

Contract: up to the trained length L the result is that of one pass over the pair; beyond it the window moves as in the
sampler. Given tokens are seen and not counted. Noise is that of `noise_plan.py`, with the document's number for the
sequence number. Refuses empty documents and documents that are given entirely.
Costs one forward of draws x S rows a block, on top of one of S rows; the cache is held once for every draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bd3_megatron.data.batch import CleanBatch
from bd3_megatron.diffusion.corrupt import NoisyBatch
from bd3_megatron.diffusion.objective import objective_named
from bd3_megatron.diffusion.token_nll import masked_token_nll, next_token_nll
from bd3_megatron.errors import DataError
from bd3_megatron.evaluate.noise_plan import NoisePlan
from bd3_megatron.evaluate.perplexity import Estimate, ScoreSettings, ScoreSums, Share, estimate, score_table
from bd3_megatron.hf.cache_bd3 import KeyValueCache, cached_hidden
from bd3_megatron.hf.generation_bd3 import MAX_COMMIT_ROWS
from bd3_megatron.hf.plain_bd3 import PlainBD3
from bd3_megatron.hf.window_bd3 import SequenceState, Window

MAX_DRAW_ROWS = 1024
"""Noisy rows of one forward: draws beyond MAX_DRAW_ROWS / S are scored in turns."""


def evaluate_documents(
    model: PlainBD3,
    documents: Sequence[Sequence[int]],
    settings: ScoreSettings,
    *,
    mask_id: int | None,
    given: Sequence[int] | None = None,
    window: str = "recomputed",
) -> Estimate:
    """Perplexity over documents, each scored whole.

    Args:
        model: plain, in eval mode.
        documents: token ids of each.
        settings: as for packed rows; num_sequences takes documents evenly spaced.
        mask_id: the model's mask token; None only for autoregressive models.
        given: how many first tokens of each document are seen and not counted; None: none (autoregressive models are
            always given one).
        window: recomputed or evicted.

    Raises:
        DataError: a document without a token to score.
        RangeError: a request the model cannot serve.
    """
    shape = model.model.shape
    plan = settings.plan(objective=shape.objective, block_size=shape.block_size, mask_id=mask_id)
    table = score_table(plan, num_rows=len(documents), num_sequences=settings.num_sequences)
    sums = ScoreSums(table, torch.device("cpu"))
    for sequence, number in enumerate(table.row_id_N.tolist()):
        rows_R = (table.sequence_R == sequence).nonzero()[:, 0]
        first = 0 if given is None else given[number]
        # The convention's given first token, also where the caller gives none.
        first = max(first, 1) if settings.convention.first_token_given else first
        sums_D, counted = document_sums(
            model,
            plan,
            documents[number],
            table.draw_R[rows_R],
            mask_id=mask_id,
            number=number,
            given=first,
            window=window,
        )
        share = Share(rows_R, len(rows_R))
        sums.put_sums(share, sums_D.cpu())
        # Every draw counts the same tokens.
        sums.put_counts(share, torch.full((len(rows_R),), counted))
    return estimate(plan, sums)


def document_sums(
    model: PlainBD3,
    plan: NoisePlan,
    ids: Sequence[int],
    draw_D: Tensor,
    *,
    mask_id: int | None,
    number: int = 0,
    given: int = 0,
    window: str = "recomputed",
) -> tuple[Tensor, int]:
    """(weighted NLL of one document under each draw: float64 [D], tokens counted).

    Args:
        model: plain, in eval mode.
        plan: of the noise.
        ids: n >= 1 tokens.
        draw_D: int64 [D], which draws.
        mask_id: the model's mask token; None only for autoregressive models.
        number: the document's, for the noise.
        given: first tokens that are seen and not counted.
        window: recomputed or evicted.

    Raises:
        DataError: nothing to score.
    """
    is_ar = not objective_named(model.model.shape.objective).has_noise
    # Nothing predicts an autoregressive model's first token.
    first = max(given, 1) if is_ar else given
    if len(ids) <= first:
        raise DataError(
            f"document {number} has {len(ids)} tokens, of which {first} are given; give one with {first + 1} or more."
        )
    if is_ar or mask_id is None:
        # It has no noise: all draws are alike.
        return _next_token_sum(model, ids, first).expand(len(draw_D)), len(ids) - first
    size = model.model.shape.block_size
    noisy = _noisy_document(plan, ids, draw_D, number=number, given=first, block_size=size, mask_id=mask_id)
    return _BlockWalk(model, noisy, mask_id, window).run(), len(ids) - first


def _noisy_document(
    plan: NoisePlan, ids: Sequence[int], draw_D: Tensor, *, number: int, given: int, block_size: int, mask_id: int
) -> NoisyBatch:
    """All draws of a document, filled up to whole blocks with positions that are always masked and never counted."""
    # The last block is filled up: the model knows whole blocks only.
    length = -(-len(ids) // block_size) * block_size
    position_L = torch.arange(length)
    is_text_L = position_L < len(ids)
    tokens_L = torch.zeros(length, dtype=torch.int64)
    tokens_L[is_text_L] = torch.tensor(ids, dtype=torch.int64)
    draws = len(draw_D)
    clean = CleanBatch(
        tokens_BL=tokens_L.expand(draws, -1),
        index_B=torch.full((draws,), number),
        is_padding_BL=((position_L < given) | ~is_text_L).expand(draws, -1),
    )
    noisy = plan.noisy(clean, draw_D)
    assert noisy is not None  # only the autoregressive plan has none
    # What carries no loss is noised as padding is; here the given part is seen, and the tail of a last, incomplete block
    # stays masked, as text that is not written yet.
    seen_BL = torch.where(position_L < given, clean.tokens_BL, noisy.noisy_BL)
    return replace(noisy, noisy_BL=seen_BL.masked_fill(~is_text_L, mask_id))


class _BlockWalk:
    """Scores the blocks of one document in order, all draws of a block over one cache of the clean past."""

    def __init__(self, model: PlainBD3, noisy: NoisyBatch, mask_id: int, kind: str) -> None:
        shape, length = model.model.shape, noisy.clean_BL.shape[1]
        self.model, self.noisy, self.mask_id = model, noisy, mask_id
        self.size, self.device = shape.block_size, model.lm_head.weight.device
        self.window = Window(
            kind=kind,
            length=shape.max_position_embeddings,
            block_size=self.size,
            block_rows=self.size,
            # The cache never holds more than the window.
            capacity=min(shape.max_position_embeddings, length),
        )
        self.state = SequenceState(noisy.clean_BL[0].tolist(), 0)
        self.cache = KeyValueCache(model.model, batch_size=1, capacity=self.window.capacity)

    @torch.inference_mode()
    def run(self) -> Tensor:
        """The sums of all blocks: float64 [D]."""
        num_draws, length = self.noisy.noisy_BL.shape
        # float64: a long document adds up many thousand numbers.
        total_D = torch.zeros(num_draws, dtype=torch.float64, device=self.device)
        for start in range(0, length, self.size):
            # a block that is given entirely costs nothing but its commit
            if not bool(self.noisy.countable_BL[0, start : start + self.size].any()):
                continue
            self.state.block_start = start
            self._commit()
            for draws in torch.arange(num_draws).split(max(1, MAX_DRAW_ROWS // self.size)):
                total_D[draws.to(self.device)] += self._block_sums(draws)
        return total_D

    def _commit(self) -> None:
        """Encode the clean rows that the block looks back on and that are not in the cache."""
        self.window.enter_block(self.state)
        # One row is kept, because the engine wants one; only keys and values matter here.
        keep_11 = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        while self.state.committed < self.state.block_start:
            stop = self.window.commit_stop(self.state, MAX_COMMIT_ROWS)
            layout = self.window.layout([self.state], [stop], self.device, with_block=False)
            cached_hidden(self.model.model, self.cache, layout.clean_ids_BC, layout.plan, keep_11)
            self.state.committed = stop

    def _block_sums(self, draws: Tensor) -> Tensor:
        """Weighted NLL of the block under some draws: float64 [draws]."""
        start, device = self.state.block_start, self.device
        block = slice(start, start + self.size)
        layout = self.window.layout([self.state] * len(draws), [start] * len(draws), device, with_block=True)
        # every draw looks back on the same clean past: the cache is copied for the draws of one forward, not for all
        copies = KeyValueCache(self.model.model, batch_size=0, capacity=self.cache.capacity)
        copies.keys_nBGCH, copies.values_nBGCH = self.cache.keys_nBGCH, self.cache.values_nBGCH
        copies.keep_sequences(torch.zeros(len(draws), dtype=torch.int64, device=device))
        keep_BQ = torch.arange(self.size, device=device).expand(len(draws), -1)
        # Noisy ids over a clean cache: what the pair's noisy half sees.
        ids_BS = self.noisy.noisy_BL[draws, block].to(device)
        hidden_BSD = cached_hidden(self.model.model, copies, ids_BS, layout.plan, keep_BQ)
        is_masked_BS = self.noisy.is_masked_BL[draws, block].to(device)
        target_R = self.noisy.clean_BL[draws, block].to(device)[is_masked_BS]
        weight_R = self.noisy.weight_BL[draws, block].to(device)[is_masked_BS].double()
        nll_R = masked_token_nll(self.model.lm_head(hidden_BSD[is_masked_BS]), target_R, mask_id=self.mask_id)
        sums_D = torch.zeros(len(draws), dtype=torch.float64, device=device)
        return sums_D.index_add_(0, is_masked_BS.nonzero()[:, 0], nll_R.double() * weight_R)


@torch.inference_mode()
def _next_token_sum(model: PlainBD3, ids: Sequence[int], first: int) -> Tensor:
    """-log p of tokens first..n-1, each given the tokens before it in its window: scalar float64."""
    device = model.lm_head.weight.device
    length = model.model.shape.max_position_embeddings
    ids_L = torch.tensor(ids, device=device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    scored, start = first, 0
    while scored < len(ids):
        stop = min(start + length, len(ids))
        hidden_LD = model.model(ids_L[None, start:stop])[0]
        if stop > scored:
            rows = slice(scored - 1 - start, stop - 1 - start)
            total += next_token_nll(model.lm_head(hidden_LD[rows]), ids_L[scored:stop]).double().sum()
            scored = stop
        # windows of L move by half of it, so every token beyond the first window sees at least L / 2 others
        start += max(1, length // 2)
    return total
