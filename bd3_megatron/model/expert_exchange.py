"""Rows on their way to the experts that compute them, and back: sorted by expert, exchanged over the expert-parallel ranks.

Contract: no row is dropped, whatever the load. Gathers and their gradients are permutations, so nothing is added up in an
order that the device chooses. With ep = 1 nothing is read by the host; above it the two lists of row counts are, once a
layer, because an all-to-all of unequal parts takes them from the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

Compute = Callable[[Tensor, Tensor], Tensor]
"""(rows sorted by local expert [n, D], rows of each local expert [local E]) -> their outputs [n, D]."""


def through_experts(
    rows_RD: Tensor, expert_RK: Tensor, num_experts: int, group: dist.ProcessGroup, compute: Compute
) -> Tensor:
    """The outputs of each row's experts, in the order of its choice: [R, K, D].

    Args:
        rows_RD: [R, D].
        expert_RK: int64, the experts of each row.
        num_experts: E over all ranks.
        group: expert-parallel ranks; rank i holds experts i E / ep to (i + 1) E / ep.
        compute: of this rank's experts. Collective: all ranks of the group call alike, with any number of rows.
    """
    top_k = expert_RK.shape[1]
    # Stable: rows of one expert keep their order, so the same rows are added in the same order on every run.
    order_n = expert_RK.flatten().argsort(stable=True)
    back_n = _inverse(order_n)
    sent_nD = _Spread.apply(rows_RD, order_n, back_n, top_k)
    # a bincount would make the host wait for the largest number
    chosen_n = expert_RK.flatten()
    counts_E = chosen_n.new_zeros(num_experts).scatter_add_(0, chosen_n, torch.ones_like(chosen_n))
    if group.size() == 1:
        out_nD = compute(sent_nD, counts_E)
    else:
        out_nD = _exchanged(sent_nD, counts_E, group, compute)
    return _Permuted.apply(out_nD, back_n, order_n).unflatten(0, (rows_RD.shape[0], top_k))


def _exchanged(sent_nD: Tensor, counts_E: Tensor, group: dist.ProcessGroup, compute: Compute) -> Tensor:
    counts_Se = counts_E.new_empty(group.size(), counts_E.shape[0] // group.size())
    # Counts first: every rank must know how many rows will come.
    dist.all_to_all_single(counts_Se.view(-1), counts_E, group=group)
    # One transfer to the host for both lists.
    there, here = torch.stack([counts_E.view_as(counts_Se).sum(1), counts_Se.sum(1)]).tolist()
    rows_mD = _AllToAll.apply(sent_nD, there, here, group)
    # rows come source by source, and each source's by expert
    local = torch.arange(counts_Se.shape[1], device=counts_Se.device).repeat(group.size())
    order_m = local.repeat_interleave(counts_Se.flatten(), output_size=sum(here)).argsort(stable=True)
    back_m = _inverse(order_m)
    out_mD = compute(_Permuted.apply(rows_mD, order_m, back_m), counts_Se.sum(0))
    return _AllToAll.apply(_Permuted.apply(out_mD, back_m, order_m), here, there, group)


def _inverse(order_n: Tensor) -> Tensor:
    return torch.empty_like(order_n).scatter_(0, order_n, torch.arange(order_n.shape[0], device=order_n.device))


class _Spread(torch.autograd.Function):
    """Each row once for every expert it goes to; the gradient of a row is their sum."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, order_n: Tensor, back_n: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(back_n)
        ctx.top_k = top_k
        return rows_RD.index_select(0, order_n // top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (back_n,) = ctx.saved_tensors
        # By permutation and sum over K, not by index_add, whose order a GPU chooses.
        return upstream.index_select(0, back_n).unflatten(0, (-1, ctx.top_k)).sum(1), None, None, None


class _Permuted(torch.autograd.Function):
    """Rows in another order; the gradient goes back by the inverse permutation."""

    @staticmethod
    def forward(ctx: Any, rows_nD: Tensor, order_n: Tensor, back_n: Tensor) -> Tensor:
        ctx.save_for_backward(back_n)
        return rows_nD.index_select(0, order_n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (back_n,) = ctx.saved_tensors
        return upstream.index_select(0, back_n), None, None


class _AllToAll(torch.autograd.Function):
    """`there[i]` rows to rank i and `here[i]` from it; the gradient travels the other way."""

    @staticmethod
    def forward(ctx: Any, rows_nD: Tensor, there: list[int], here: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.there, ctx.here, ctx.group = there, here, group
        return _all_to_all(rows_nD, there, here, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        # The same parts, sent back.
        return _all_to_all(upstream, ctx.here, ctx.there, ctx.group), None, None, None


def _all_to_all(rows_nD: Tensor, there: list[int], here: list[int], group: dist.ProcessGroup) -> Tensor:
    out_mD = rows_nD.new_empty(sum(here), *rows_nD.shape[1:])
    dist.all_to_all_single(out_mD, rows_nD.contiguous(), here, there, group=group)
    return out_mD


class Dealt(torch.autograd.Function):
    """Every n-th of rows that all n ranks of a group hold; the gradient is whole on all of them again."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.num_rows, ctx.group = rows_RD.shape[0], group
        # Every n-th row, so that parts differ in length by one at most.
        return rows_RD[group.rank() :: group.size()].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return _collected(upstream, ctx.num_rows, ctx.group), None


class Collected(torch.autograd.Function):
    """What `Dealt` gave to the ranks, on all of them; the gradient, which all of them have, is dealt out."""

    @staticmethod
    def forward(ctx: Any, rows_rD: Tensor, num_rows: int, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _collected(rows_rD, num_rows, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return upstream[ctx.group.rank() :: ctx.group.size()].contiguous(), None, None


def _collected(rows_rD: Tensor, num_rows: int, group: dist.ProcessGroup) -> Tensor:
    # zeros where other ranks have rows: parts differ in length by one, which gathers do not take on every backend
    whole_RD = rows_rD.new_zeros(num_rows, *rows_rD.shape[1:])
    whole_RD[group.rank() :: group.size()] = rows_rD
    dist.all_reduce(whole_RD, group=group)
    return whole_RD
