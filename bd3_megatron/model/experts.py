"""The mixture of experts of a layer in the parallel model: router, exchange, this rank's experts, the shared expert.

Contract: takes the place of megatron's MLP, [P, B, D] (or [R, 1, D]) in and (output, no bias) out. Experts are whole (no
tensor parallelism inside), stacked in one tensor and dealt out over ep; the shared expert is cut over tp as an MLP is.
megatron's own mixture is not used: it needs TransformerEngine or CUDA streams, asks the host a layer, and counts rows that
other grids do not have.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from bd3_megatron.config.experts import ExpertsConfig
from bd3_megatron.model.activation import activate
from bd3_megatron.model.attention_context import AttentionContext
from bd3_megatron.model.expert_exchange import Collected, Dealt, through_experts
from bd3_megatron.model.load import CountedRows
from bd3_megatron.model.recompute import ThriftyMLP
from bd3_megatron.model.router import Router
from bd3_megatron.model.router_terms import RouterTerms
from bd3_megatron.parallel.topology import Topology

GROUPED_ALIGNMENT_BYTES = 16
"""Strides that torch's grouped product takes are multiples of it."""


class ExpertStack(nn.Module):
    """One matrix of every local expert, as one parameter [local E, out, in]."""

    def __init__(self, num_local: int, num_out: int, num_in: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_local, num_out, num_in, dtype=dtype))

    def forward(self, rows_nD: Tensor, counts_e: Tensor) -> Tensor:
        """Rows sorted by expert [n, in], each through its expert's matrix: [n, out].

        Args:
            rows_nD: `counts_e[0]` rows of the first local expert, then those of the next.
            counts_e: int64, rows of each.
        """
        if is_grouped(rows_nD, self.weight):
            return grouped_product(rows_nD, self.weight, counts_e)
        return looped_product(rows_nD, self.weight, counts_e)


def is_grouped(rows_nD: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped product serves: bf16 on CUDA, with widths whose strides it takes."""
    aligned = all(n * weight.element_size() % GROUPED_ALIGNMENT_BYTES == 0 for n in weight.shape[1:])
    return rows_nD.is_cuda and weight.dtype == torch.bfloat16 and aligned


def grouped_product(rows_nD: Tensor, weight: Tensor, counts_e: Tensor) -> Tensor:
    """As `looped_product`, in one kernel that reads the counts on the device."""
    # int32, as the kernel wants its offsets.
    ends = counts_e.cumsum(0, dtype=torch.int32)
    return F.grouped_mm(rows_nD, weight.transpose(1, 2), offs=ends)


def looped_product(rows_nD: Tensor, weight: Tensor, counts_e: Tensor) -> Tensor:
    """Expert after expert: the reference of `grouped_product`, and the way of CPUs. The host reads the counts."""
    parts = rows_nD.split(counts_e.tolist())
    # unbound at once: the gradient of a slice would be as large as the stack
    return torch.cat([F.linear(part, matrix) for part, matrix in zip(parts, weight.unbind(0), strict=True)])


class LocalExperts(nn.Module):
    """The experts of this rank: SwiGLU, [gate; up] stacked."""

    def __init__(self, num_local: int, hidden_size: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear_fc1 = ExpertStack(num_local, 2 * width, hidden_size, dtype)
        self.linear_fc2 = ExpertStack(num_local, hidden_size, width, dtype)

    def forward(self, rows_nD: Tensor, counts_e: Tensor) -> Tensor:
        """Outputs [n, D] of rows sorted by local expert."""
        return self.linear_fc2(activate(self.linear_fc1(rows_nD, counts_e), None, gated=True), counts_e)


class ExpertLayer(nn.Module):
    """What megatron's layer calls as its MLP."""

    def __init__(
        self,
        config: TransformerConfig,
        experts: ExpertsConfig,
        topology: Topology,
        context: AttentionContext,
        *,
        is_last: bool,
    ) -> None:
        super().__init__()
        self.context = context
        self.tp_group = topology.groups.tp
        # a trimmed last layer has all its rows on every tensor-parallel rank (its configuration says so)
        self.deals_rows = topology.tp > 1 and not config.sequence_parallel
        part = (topology.tp_rank, topology.tp) if topology.sequence_parallel else (0, 1)
        self.counted = CountedRows(experts.counted_rows, is_last, part)
        dtype, hidden = config.params_dtype, config.hidden_size
        self.num_experts = experts.number
        self.group: dist.ProcessGroup = topology.expert_group
        self.router = Router(experts, hidden, dtype=dtype, sequence_parallel=topology.sequence_parallel)
        # a sequence's rows are cut over cp, and over tp where sequences or the last layer's rows are
        groups = (topology.groups.cp, topology.groups.tp)
        self.terms = RouterTerms(experts, groups) if experts.balance_loss or experts.z_loss else None
        self.experts = LocalExperts(experts.number // topology.ep, hidden, experts.width, dtype)
        self.shared_experts: ThriftyMLP | None = None
        if experts.shared_width is not None:
            parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
            # its second matrix takes the width from the configuration, whatever it is told (mlp.py:135)
            alone = copy.copy(config)
            alone.ffn_hidden_size = experts.shared_width
            self.shared_experts = ThriftyMLP(
                alone, parts, ffn_hidden_size=experts.shared_width, tp_group=topology.groups.tp
            )

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """As megatron's MLP; `kwargs` are its own mixture's."""
        rows_RD = hidden_states.flatten(0, -2)
        num_rows = rows_RD.shape[0]
        if self.deals_rows:
            # Else every tensor-parallel rank would compute the same experts on the same rows.
            rows_RD = Dealt.apply(rows_RD, self.tp_group)
        logits_RE, choice = self.router(rows_RD)
        weight_RK = choice.weight_RK
        # once a micro-batch, whether or not the layer is computed again in the backward; never in evaluation
        if self.training and torch.is_grad_enabled():
            rows = self.counted.of(self.context.layout, self.context.batch)
            self.router.count(choice.expert_RK, rows)
            if self.terms is not None:
                sums = self.terms.sums(logits_RE, choice, rows)
                self.router.terms += sums.detach()
                weight_RK = self.terms.joined(weight_RK, sums)
        out_RKD = through_experts(rows_RD, choice.expert_RK, self.num_experts, self.group, self.experts)
        # Weighted after the experts, in the order of the row's choice: the same sum on every grid.
        mixed_RD = (out_RKD * weight_RK[..., None].to(out_RKD.dtype)).sum(1)
        if self.deals_rows:
            mixed_RD = Collected.apply(mixed_RD, num_rows, self.tp_group)
        mixed = mixed_RD.view_as(hidden_states)
        if self.shared_experts is not None:
            # Of all rows: it is cut over tp as an MLP is, and needs no exchange.
            mixed = mixed + self.shared_experts(hidden_states)[0]
        return mixed, None
