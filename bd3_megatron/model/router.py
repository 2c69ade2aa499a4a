"""The router of a layer with experts in the parallel model: fp32 logits, the choice, and counts of the load.

Contract: rows in, `ExpertChoice` out; the rule is `choose_experts` of the plain model. Replicated over all ranks; under
sequence parallelism each tensor-parallel rank has a partial gradient (marked as norms are).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bd3_megatron.config.experts import ExpertsConfig
from bd3_megatron.hf.mlp_bd3 import ExpertChoice, choose_experts, router_logits
from bd3_megatron.model.load import LayerRows
from bd3_megatron.model.loss_sums import NUM_BINS


@dataclass(frozen=True)
class Routing:
    """The rule of choice under the names of a plain model's configuration."""

    num_experts_per_tok: int
    score_function: str
    norm_topk_prob: bool
    n_group: int
    topk_group: int
    routed_scaling_factor: float


def routing_of(experts: ExpertsConfig) -> Routing:
    """The rule of a configuration."""
    return Routing(
        num_experts_per_tok=experts.top_k,
        score_function=experts.score,
        norm_topk_prob=experts.normalize_top_k,
        n_group=experts.groups,
        topk_group=experts.group_top_k,
        routed_scaling_factor=experts.scaling_factor,
    )


class Router(nn.Module):
    """Chooses the experts of rows."""

    expert_bias: Tensor | None

    def __init__(
        self, experts: ExpertsConfig, hidden_size: int, *, dtype: torch.dtype, sequence_parallel: bool
    ) -> None:
        super().__init__()
        self.rule = routing_of(experts)
        # Whole on every rank: it is small, and every row must be scored against all experts.
        self.weight = nn.Parameter(torch.empty(experts.number, hidden_size, dtype=dtype))
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
        # a plain attribute would not follow the module to its device
        self.register_buffer("expert_bias", torch.zeros(experts.number) if experts.bias else None)
        self.load_E: Tensor
        self.register_buffer("load_E", torch.zeros(experts.number, dtype=torch.int64), persistent=False)
        # rows that carry loss by noise level; all others fall into a last bin, which nobody reads
        self.masked_TE: Tensor
        masked_TE = torch.zeros(NUM_BINS + 1, experts.number, dtype=torch.int64)
        self.register_buffer("masked_TE", masked_TE, persistent=False)
        self.terms: Tensor
        self.register_buffer("terms", torch.zeros(2, dtype=torch.float64), persistent=False)

    def forward(self, rows_RD: Tensor) -> tuple[Tensor, ExpertChoice]:
        """Logits [R, E] in fp32 or wider, and the choice."""
        logits_RE = router_logits(rows_RD, self.weight)
        return logits_RE, choose_experts(logits_RE, self.rule, self.expert_bias)

    def forget(self) -> None:
        """Begin to count anew."""
        for counted in (self.load_E, self.masked_TE, self.terms):
            counted.zero_()

    def count(self, expert_RK: Tensor, rows: LayerRows) -> None:
        """Add the choices of rows to the loads."""
        # Integers: their sum does not depend on the order in which a device adds.
        chosen_n = expert_RK.flatten()
        self.load_E.scatter_add_(0, chosen_n, rows.counts_R[:, None].expand_as(expert_RK).flatten())
        index_RK = rows.bin_R[:, None] * self.load_E.shape[0] + expert_RK
        self.masked_TE.view(-1).scatter_add_(0, index_RK.flatten(), torch.ones_like(chosen_n))
