"""Neighbours in memory are joined and cut without copies, others by copies, with the gradients of cat and split."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bd3_megatron.attention.streams import empty_neighbours, joined_rows, parted


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("sizes", [[3, 2], [0, 5], [5, 0], [1, 3, 1]], ids=str)
def test_what_was_cut_is_joined_as_a_view(dim: int, sizes: list[int]) -> None:
    whole = rows(5, 5, 4).requires_grad_()
    pieces = parted(whole, sizes, dim)
    assert [piece.size(dim) for piece in pieces] == sizes
    again = joined_rows(pieces, dim)
    assert torch.equal(again, whole) and again.data_ptr() == whole.data_ptr()
    weight = rows(5, 5, 4)
    (grad,) = torch.autograd.grad(again, whole, weight)
    assert grad.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize(
    "pieces",
    [
        (rows(2, 3), rows(4, 3)),
        # neighbours the wrong way round, with a gap, of other strides, and of one memory from its beginning on
        tuple(reversed(rows(6, 3).split([2, 4]))),
        (rows(6, 3)[:2], rows(6, 3)[3:]),
        (rows(4, 4)[:2], rows(4, 4)[2:].t().contiguous().t()),
        (rows(6, 3)[:2], rows(6, 3)[:2]),
    ],
)
def test_all_others_are_copied(pieces: tuple[Tensor, ...]) -> None:
    leaves = [piece.clone().requires_grad_() for piece in pieces]
    assert torch.equal(joined_rows(pieces, 0), torch.cat(pieces))
    out = joined_rows(leaves, 0)
    weight = rows(*out.shape)
    grads = torch.autograd.grad(out, leaves, weight)
    assert all(torch.equal(a, b) for a, b in zip(grads, weight.split([len(p) for p in pieces]), strict=True))


def test_gradients_that_are_no_neighbours_are_joined_by_a_copy() -> None:
    whole = rows(5, 3).requires_grad_()
    first, second = parted(whole, [2, 3], 0)
    (grad,) = torch.autograd.grad([first, second.square()], whole, [rows(2, 3), rows(3, 3)])
    assert torch.equal(grad, torch.cat([rows(2, 3), 2 * second.detach() * rows(3, 3)]))
    # a piece that nobody used has a gradient of zero
    first, _ = parted(whole, [2, 3], 0)
    (grad,) = torch.autograd.grad(first.sum(), whole)
    assert torch.equal(grad, torch.cat([torch.ones(2, 3), torch.zeros(3, 3)]).double())


def test_neighbours_are_made_as_megatron_lays_rows_out() -> None:
    noisy, none, clean = empty_neighbours([rows(2, 3, 4, 5), None, rows(2, 6, 4, 5)])
    assert noisy is not None and clean is not None and none is None
    both = joined_rows([noisy, clean], 1)
    assert both.shape == (2, 9, 4, 5) and both.data_ptr() == noisy.data_ptr() and both.transpose(0, 1).is_contiguous()
