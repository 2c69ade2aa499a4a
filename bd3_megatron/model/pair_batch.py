"""A micro-batch as the model wants it: the rows of this rank, and which of them carry loss.

Noise is data: it is computed here from the clean tokens by counter-based draws, on the CPU, by every stage that needs
it. So the number of loss rows is known without asking the device, and no stage waits for another's draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bd3_megatron.data.batch import CleanBatch
from bd3_megatron.diffusion.corrupt import NoisyBatch, per_token
from bd3_megatron.diffusion.objective import next_token_targets
from bd3_megatron.parallel.pair_split import PairLayout


@dataclass(frozen=True)
class PairBatch:
    """One micro-batch on one rank. B samples, P rows of this rank, R rows that carry loss."""

    token_BP: Tensor
    """int64 ids of the rows, noisy ones first."""
    position_PB: Tensor
    """Rotary positions: int64 [P], or [P, B] where they restart at documents."""
    document_id_BL: Tensor | None
    """int64 [B, L] of the whole sequences, on the host, or None."""
    loss_row_R: Tensor
    """int64 index of each loss row in its stream, flattened as row x B + sample."""
    target_R: Tensor
    """int64 id to predict there."""
    weight_R: Tensor
    """float32 loss weight, positive."""
    level_R: Tensor
    """float32 noise level t of the row's block (1 for the AR baseline), for diagnostics."""
    block_R: Tensor
    """int64 diffusion block of the row in its whole sequence."""
    num_blocks: int
    """K of a whole sequence."""

    @property
    def batch_size(self) -> int:
        return self.token_BP.shape[0]

    def to(self, device: torch.device) -> PairBatch:
        """The same batch on `device`, but for the document ids, which attention reads on the host."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and name != "document_id_BL"
        }
        return replace(self, **moved)


def pair_batch(clean: CleanBatch, noisy: NoisyBatch | Sequence[NoisyBatch] | None, layout: PairLayout) -> PairBatch:
    """The micro-batch of block diffusion, or with `noisy` None of the autoregressive baseline.

    Args:
        clean: whole sequences [B, L].
        noisy: their corruption, one a view, equal on every rank that holds the same samples.
        layout: this rank's rows.
    """
    tokens_BL = clean.tokens_BL
    views = [noisy] if isinstance(noisy, NoisyBatch) else list(noisy or ())
    if not views:
        target_BL, is_loss_BL = next_token_targets(tokens_BL, clean.document_id_BL, clean.is_padding_BL)
        ones_BL = torch.ones(tokens_BL.shape, dtype=torch.float32)
        is_loss, target, weight, level = [is_loss_BL], [target_BL], [ones_BL], [ones_BL]
    else:
        is_loss, target = [view.is_masked_BL for view in views], [tokens_BL] * len(views)
        weight = [view.weight_BL for view in views]
        level = [per_token(view.t_BK.to(torch.float32), layout.length) for view in views]
    is_loss_PB = layout.loss_rows(is_loss).t()
    rows = is_loss_PB.flatten().nonzero()[:, 0]

    def at_loss_rows(value_BL: Sequence[Tensor]) -> Tensor:
        return layout.loss_rows(value_BL).t().flatten()[rows]

    block_P = layout.visibility().block_of(layout.position_P)[: is_loss_PB.shape[0]]
    return PairBatch(
        token_BP=layout.rows_of([view.noisy_BL for view in views], tokens_BL),
        position_PB=_positions(clean, layout),
        document_id_BL=clean.document_id_BL,
        loss_row_R=rows,
        target_R=at_loss_rows(target),
        weight_R=at_loss_rows(weight).to(torch.float32),
        level_R=at_loss_rows(level).to(torch.float32),
        block_R=block_P[rows // tokens_BL.shape[0]],
        num_blocks=layout.length // layout.block_size,
    )


def _positions(clean: CleanBatch, layout: PairLayout) -> Tensor:
    if clean.position_BL is None:
        return layout.position_P
    return layout.rows_of([clean.position_BL] * layout.views, clean.position_BL).t().contiguous()
