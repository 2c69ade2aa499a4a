"""Epochs visit every row once, in an order that is a function of seed, source and epoch."""

from __future__ import annotations

import pytest
import torch

from bd3_megatron.data.order import EpochOrder
from bd3_megatron.errors import RangeError


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 64, 65, 1000, 2047, 2048, 2049, 5000])
def test_every_epoch_visits_every_row_once(num_rows: int) -> None:
    order = EpochOrder(num_rows=num_rows, seed=5)
    rows = order.row_ids(torch.arange(3 * num_rows)).reshape(3, num_rows)
    for epoch in rows:
        assert sorted(epoch.tolist()) == list(range(num_rows))
    if num_rows > 60:
        assert not torch.equal(rows[0], rows[1]) and not torch.equal(rows[1], rows[2])


def test_any_part_of_the_order_can_be_asked_for_alone() -> None:
    whole = EpochOrder(num_rows=3000, seed=1).row_ids(torch.arange(9000))
    fresh = EpochOrder(num_rows=3000, seed=1)
    for first in (8990, 0, 2990, 4096, 2047):
        assert torch.equal(fresh.row_ids(torch.arange(first, first + 10)), whole[first : first + 10])


def test_the_cache_of_chunks_is_bounded_and_changes_nothing() -> None:
    order = EpochOrder(num_rows=100_000, seed=1)
    count = torch.randint(0, 10**7, (30,), generator=torch.Generator().manual_seed(0))
    first = order.row_ids(count)
    assert len(order._chunks) <= 16
    assert torch.equal(order.row_ids(count), first)


def test_sources_and_seeds_have_their_own_orders() -> None:
    count = torch.arange(500)
    orders = [EpochOrder(num_rows=500, seed=s, source=k).row_ids(count) for s, k in ((1, 0), (1, 1), (2, 0))]
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])


def test_the_order_is_exact_past_two_to_the_32() -> None:
    num_rows = 2**33 + 11
    order = EpochOrder(num_rows=num_rows, seed=9)
    count = torch.arange(2**32 - 50, 2**32 + 50)
    rows = order.row_ids(torch.cat([count, count + num_rows]))
    assert len(set(rows[:100].tolist())) == 100 and len(set(rows[100:].tolist())) == 100
    assert int(rows.min()) >= 0 and int(rows.max()) < num_rows and int(rows.max()) > 2**32
    assert not torch.equal(rows[:100], rows[100:])


def test_without_shuffling_rows_come_in_order() -> None:
    order = EpochOrder(num_rows=4, seed=1, shuffle=False)
    assert order.row_ids(torch.arange(10)).tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


def test_what_cannot_be_ordered_is_refused() -> None:
    with pytest.raises(RangeError, match="num_rows=0 leaves nothing to order"):
        EpochOrder(num_rows=0, seed=1)
    with pytest.raises(RangeError, match=r"source=4194304 is outside \[0, 4194304\); mix fewer sources"):
        EpochOrder(num_rows=1, seed=1, source=1 << 22)
    with pytest.raises(RangeError, match="sample count -3 is negative"):
        EpochOrder(num_rows=5, seed=1).row_ids(torch.tensor([2, -3]))
