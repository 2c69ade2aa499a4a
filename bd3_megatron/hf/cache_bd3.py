"""The key/value cache of the decoding engine, and attention over it.

Contract: a forward writes the keys of all its rows into their slots, then each row sees a prefix of the slots, so the
visibility of a row is one number (`end`). Costs 2 * layers * B * G * (C + 1) * H elements, whatever is generated.
Positions, blocks and windows are the business of `window_bd3.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .attention_bd3 import grouped_attention
from .plain_bd3 import LayerAttention, LayerStack, run_layers


@dataclass(frozen=True)
class RowPlan:
    """Where the R rows of one forward are written, and what they see.

    When all sequences of the batch stand at the same position, `slots` is one slice, and `sees_BQK` is None where every row
    sees the whole span: the cheap form, used for every forward but a block's first.
    """

    position_BR: Tensor
    """int64 [B or 1, R]: rotary positions"""
    slots: slice | Tensor
    """where keys are written: one range for all, or int64 [B, R]"""
    end_BR: Tensor
    """int64 [B or 1, R]: a row sees the slots below this"""
    span: int
    """no row sees a slot at or above this"""
    is_uniform: bool
    """every row sees exactly [0, span)"""

    def sees(self, keep_BQ: Tensor | None) -> Tensor | None:
        """bool [B or 1, Q, span] for all rows or for the kept ones; None = everything below span."""
        if self.is_uniform:
            return None
        end_BQ = self.end_BR
        if keep_BQ is not None:
            end_BQ = end_BQ.expand(keep_BQ.shape[0], -1).gather(1, keep_BQ)
        return torch.arange(self.span, device=end_BQ.device) < end_BQ[..., None]


class KeyValueCache:
    """Rotated keys and values of finished blocks, and scratch slots for the block being filled."""

    keys_nBGCH: Tensor
    values_nBGCH: Tensor

    def __init__(
        self, stack: LayerStack, *, batch_size: int, capacity: int, device: torch.device | None = None
    ) -> None:
        shape = stack.shape
        table = stack.embed_tokens.weight
        # Keys are kept a group, never repeated over query heads; the last slot is a bin for padding rows.
        size = (shape.num_hidden_layers, batch_size, shape.num_key_value_heads, capacity + 1, shape.head_dim)
        # Zeros, not empty: padding rows may look at slots nobody wrote, and a NaN there would spread.
        self.keys_nBGCH = torch.zeros(size, dtype=table.dtype, device=table.device if device is None else device)
        self.values_nBGCH = torch.zeros_like(self.keys_nBGCH)
        self.capacity = capacity

    @property
    def num_bytes(self) -> int:
        """Memory of the cache."""
        return 2 * self.keys_nBGCH.numel() * self.keys_nBGCH.element_size()

    def keep_sequences(self, index_B: Tensor) -> None:
        """Drop every sequence of the batch but these, in this order."""
        self.keys_nBGCH = self.keys_nBGCH.index_select(1, index_B)
        self.values_nBGCH = self.values_nBGCH.index_select(1, index_B)

    def write(self, layer: int, slots: slice | Tensor, keys_BRGH: Tensor, values_BRGH: Tensor) -> None:
        """Store the rows of one forward."""
        for table, rows in ((self.keys_nBGCH[layer], keys_BRGH), (self.values_nBGCH[layer], values_BRGH)):
            if isinstance(slots, slice):
                table[:, :, slots] = rows.transpose(1, 2)
            else:
                # sequences stand at different positions: one slot a row and sequence
                index = slots[:, None, :, None].expand(-1, rows.shape[2], -1, rows.shape[3])
                table.scatter_(2, index, rows.transpose(1, 2))

    def attend(self, plan: RowPlan, keep_BQ: Tensor | None, num_layers: int) -> LayerAttention:
        """The layers' `attend`: write this forward's keys, then look at the span. The last layer asks for kept rows."""
        # built once a forward, not once a layer: the comparison waits for nothing but allocates B x R x span
        sees_all, sees_kept = plan.sees(None), plan.sees(keep_BQ)

        def attend(queries_BQNH: Tensor, keys_BRGH: Tensor, values_BRGH: Tensor, layer: int) -> Tensor:
            self.write(layer, plan.slots, keys_BRGH, values_BRGH)
            keys_BGKH = self.keys_nBGCH[layer, :, :, : plan.span]
            values_BGKH = self.values_nBGCH[layer, :, :, : plan.span]
            # Only the last layer has fewer queries than rows.
            sees_BQK = sees_kept if layer == num_layers - 1 else sees_all
            return grouped_attention(queries_BQNH, keys_BGKH, values_BGKH, sees_BQK)

        return attend


def cached_hidden(stack: LayerStack, cache: KeyValueCache, ids_BR: Tensor, plan: RowPlan, keep_BQ: Tensor) -> Tensor:
    """Normed hidden states [B, Q, D] of the kept rows, after one forward of R rows over the cache.

    Args:
        stack: the plain model's layers.
        cache: read and written.
        ids_BR: int64 [B, R].
        plan: slots and visible prefixes of the R rows.
        keep_BQ: int64 [B, Q], Q >= 1: rows whose output is wanted; the last layer computes the others' keys only.
    """
    attend = cache.attend(plan, keep_BQ, len(stack.layers))
    return run_layers(stack, ids_BR, plan.position_BR, attend, keep_BQ=keep_BQ)
