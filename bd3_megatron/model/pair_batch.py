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

from bd3_megatron.attention.visibility import Visibility, on_device
from bd3_megatron.data.batch import CleanBatch
from bd3_megatron.diffusion.corrupt import NoisyBatch
from bd3_megatron.diffusion.objective import LossRows
from bd3_megatron.parallel.pair_split import PairLayout


@dataclass(frozen=True)
class PairBatch:
    """One micro-batch on one rank. B samples, P rows of this rank, R rows that carry loss."""

    token_BP: Tensor
    """int64 ids of the rows, noisy ones first."""
    position_PB: Tensor
    """Rotary positions: int64 [P], or [P, B] where they restart at documents."""
    visibility: Visibility
    """Who sees whom among the rows, with the documents of the whole sequences; on the host."""
    loss_row_R: Tensor
    """int64 index of each loss row in its stream, flattened as row x B + sample."""
    target_R: Tensor
    """int64 id to predict there."""
    weight_R: Tensor
    """float32 loss weight, positive."""
    level_R: Tensor
    """float32 noise level t of the row's block (1 where there is no noise), for diagnostics."""
    block_R: Tensor
    """int64 diffusion block of the row in its whole sequence."""
    num_blocks: int
    """K of a whole sequence."""
    confidence: float = 0.0
    """Factor of the confidence term."""
    is_text_PB: Tensor | None = None
    """bool, False at rows of padding; None: there are none."""

    @property
    def batch_size(self) -> int:
        return self.token_BP.shape[0]

    def to(self, device: torch.device) -> PairBatch:
        """The same batch on its way to `device`, which nobody waits for; the visibility stays on the host."""
        moved: dict[str, Any] = {
            name: on_device(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def loss_rows(clean: CleanBatch, copies: Sequence[NoisyBatch], layout: PairLayout) -> list[LossRows]:
    """What the objective says of every row of the stream that carries loss, for whole sequences."""
    return layout.objective.loss_rows(
        clean.tokens_BL, copies, document_id_BL=clean.document_id_BL, is_scored_BL=clean.scored_BL
    )


def pair_batch(clean: CleanBatch, copies: Sequence[NoisyBatch], layout: PairLayout) -> PairBatch:
    """The micro-batch of some sequences on one rank.

    Args:
        clean: whole sequences [B, L].
        copies: their noisy copies, one a view, equal on every rank that holds the same samples; none without noise.
        layout: this rank's rows.
    """
    return pair_rows(clean, copies, loss_rows(clean, copies, layout), layout)


def pair_rows(
    clean: CleanBatch, copies: Sequence[NoisyBatch], streams: Sequence[LossRows], layout: PairLayout
) -> PairBatch:
    """As `pair_batch`, where `loss_rows` has been asked already."""
    tokens_BL = clean.tokens_BL
    is_loss_PB = layout.loss_rows([one.has_loss_BL for one in streams]).t()
    # On the host: on a device nonzero would wait for it.
    rows = is_loss_PB.flatten().nonzero()[:, 0]

    def at_loss_rows(value_BL: Sequence[Tensor]) -> Tensor:
        return layout.loss_rows(value_BL).t().flatten()[rows]

    visibility = layout.visibility(clean.document_id_BL)
    block_P = visibility.block_of(layout.position_P)[: is_loss_PB.shape[0]]
    return PairBatch(
        token_BP=layout.rows_of([copy.noisy_BL for copy in copies], tokens_BL),
        position_PB=_positions(clean, layout),
        visibility=visibility,
        loss_row_R=rows,
        target_R=at_loss_rows([one.target_BL for one in streams]),
        weight_R=at_loss_rows([one.weight_BL for one in streams]).to(torch.float32),
        level_R=at_loss_rows([one.level_BL for one in streams]),
        block_R=block_P[rows // tokens_BL.shape[0]],
        num_blocks=layout.length // layout.block_size,
        confidence=layout.objective.axes.confidence,
        is_text_PB=_text_rows(clean, layout),
    )


def _text_rows(clean: CleanBatch, layout: PairLayout) -> Tensor | None:
    if clean.is_padding_BL is None:
        return None
    is_text_BL = ~clean.is_padding_BL
    return layout.rows_of([is_text_BL] * layout.views, is_text_BL).t().contiguous()


def _positions(clean: CleanBatch, layout: PairLayout) -> Tensor:
    if clean.position_BL is None:
        return layout.position_P
    return layout.rows_of([clean.position_BL] * layout.views, clean.position_BL).t().contiguous()
