"""Context parallelism for block diffusion: clean keys and values travel, nothing else.

A rank's noisy rows see clean rows of earlier blocks (any rank's) and noisy rows of their own block (always their own
rank's), so the only tensors that cross ranks are clean K and V: 2 x B x L x G x H values gathered in the forward, the
same number reduce-scattered in the backward. That is half of what a ring over the 2L pair would move.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_clean(k_BLGH: Tensor, v_BLGH: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Clean keys and values of the whole sequence, in rising position, from the zigzag slices of all ranks.

    Args:
        k_BLGH, v_BLGH: this rank's two chunks, [B, L / cp, G, H].
        group: context-parallel ranks; None: this rank holds all rows.

    Returns:
        [B, L, G, H] each; replicated over `group`, gradients are summed over it and cut back.
    """
    if group is None or dist.get_world_size(group) == 1:
        return k_BLGH, v_BLGH
    # stacked, so that one collective carries keys and values
    gathered = _GatherZigzag.apply(torch.stack([k_BLGH, v_BLGH]), group)
    return gathered[0], gathered[1]


class _GatherZigzag(torch.autograd.Function):
    """All-gather along dim 2 of [2, B, rows, G, H], chunks put in rising position; backward reduce-scatters."""

    @staticmethod
    def forward(ctx: Any, kv: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        size = dist.get_world_size(group)
        # all_gather_into_tensor joins along the first dimension
        rows_first = kv.movedim(2, 0).contiguous()
        gathered = rows_first.new_empty(size * rows_first.shape[0], *rows_first.shape[1:])
        dist.all_gather_into_tensor(gathered, rows_first, group=group)
        chunks = gathered.chunk(2 * size)
        return torch.cat([chunks[i] for i in rank_order_to_position(size)]).movedim(0, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        size = dist.get_world_size(ctx.group)
        chunks = grads[0].movedim(2, 0).chunk(2 * size)
        ordered = torch.cat([chunks[i] for i in position_to_rank_order(size)]).contiguous()
        # queries of every rank add to the gradient of a key: summed over ranks, cut back to the own chunks
        own = ordered.new_empty(ordered.shape[0] // size, *ordered.shape[1:])
        dist.reduce_scatter_tensor(own, ordered, group=ctx.group)
        return own.movedim(0, 2), None


def position_to_rank_order(size: int) -> list[int]:
    """Chunk positions in the order in which ranks hold them: [0, 2c-1, 1, 2c-2, ...]."""
    return [chunk for rank in range(size) for chunk in (rank, 2 * size - 1 - rank)]


def rank_order_to_position(size: int) -> list[int]:
    """The inverse: where, in rank order, the chunk of each position stands."""
    order = position_to_rank_order(size)
    return [order.index(chunk) for chunk in range(2 * size)]
