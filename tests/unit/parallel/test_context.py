"""Zigzag: the chunks of all ranks in rank order, and back in rising position."""

from __future__ import annotations

import pytest
import torch

from bd3_megatron.attention.visibility import positions
from bd3_megatron.diffusion.objective import BlockDiffusion
from bd3_megatron.parallel.context import gather_clean, position_to_rank_order, rank_order_to_position
from bd3_megatron.parallel.pair_split import pair_layout


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_the_orders_are_inverse(size: int) -> None:
    order, back = position_to_rank_order(size), rank_order_to_position(size)
    assert [order[i] for i in back] == [back[i] for i in order] == list(range(2 * size))


@pytest.mark.parametrize("size", [2, 4])
def test_the_orders_are_those_of_the_rows(size: int) -> None:
    layouts = [pair_layout(BlockDiffusion(block_size=2), length=32, cp=size, cp_rank=r) for r in range(size)]
    held = torch.cat([positions(layout.clean_rows) for layout in layouts])
    chunks = held.chunk(2 * size)
    assert torch.cat([chunks[i] for i in rank_order_to_position(size)]).tolist() == list(range(32))


def test_alone_a_rank_keeps_its_own() -> None:
    k, v = torch.zeros(1, 4, 2, 3), torch.ones(1, 4, 2, 3)
    assert gather_clean(k, v, None) == (k, v)
