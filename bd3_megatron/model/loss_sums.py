"""What a last stage keeps of one micro-batch for the record: sums in fp64, partial over context-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bd3_megatron.cost.traffic import LOAD_LEVELS
from bd3_megatron.model.pair_batch import PairBatch

NUM_BINS = LOAD_LEVELS
"""Noise levels are binned in tenths."""


@dataclass(frozen=True)
class LossSums:
    """Sums of one micro-batch of B samples with K diffusion blocks each, on the training device."""

    weighted_nll_BK: Tensor
    """float64 [B, K], sum of weight x NLL of each diffusion block, nats."""
    bins: Tensor
    """float64 [2, NUM_BINS], NLL sums and row counts by noise level."""
    weighted_entropy: Tensor | None = None
    """float64 scalar, sum of weight x entropy of the rows whose target is the likeliest id, nats; None without that term."""

    @property
    def weighted_nll_B(self) -> Tensor:
        """float64 [B], sum of weight x NLL of each sample."""
        return self.weighted_nll_BK.sum(1)


def loss_sums(batch: PairBatch, nll_R: Tensor, entropy_R: Tensor | None = None) -> LossSums:
    """The sums of a micro-batch.

    Args:
        batch: what the last stage computed.
        nll_R: float [R] NLL of its loss rows, nats.
        entropy_R: float [R] entropy of the rows that the confidence term takes, 0 elsewhere; None without it.
    """
    # In fp64, so that the sums do not depend on how rows are dealt to ranks and micro-batches beyond its last digits.
    nll_R = nll_R.double()
    sample_R = batch.loss_row_R % batch.batch_size
    weighted = torch.zeros(batch.batch_size * batch.num_blocks, dtype=torch.float64, device=nll_R.device)
    weighted.index_add_(0, sample_R * batch.num_blocks + batch.block_R, nll_R * batch.weight_R)
    bins = torch.zeros(2, NUM_BINS, dtype=torch.float64, device=nll_R.device)
    bin_R = level_bins(batch.level_R)
    bins[0].index_add_(0, bin_R, nll_R)
    bins[1].index_add_(0, bin_R, torch.ones_like(nll_R))
    confident = None if entropy_R is None else (entropy_R.double() * batch.weight_R).sum()
    return LossSums(weighted.view(batch.batch_size, batch.num_blocks), bins, confident)


def level_bins(level_R: Tensor) -> Tensor:
    """int64 [R], the bin in [0, NUM_BINS) of each noise level t."""
    # t = 1 belongs to the last bin.
    return (level_R * NUM_BINS).long().clamp_(0, NUM_BINS - 1)
