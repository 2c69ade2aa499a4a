"""The MLPs of a layer: the paper's, SwiGLU, and a mixture of SwiGLU experts with its router. Torch only.

Contract: `choose_experts` is the one rule of routing, of training and of the exported model; the plain mixture loops over
experts and is the reference of the grouped product in training.
Source: Qwen3-MoE (softmax, arXiv 2505.09388); DeepSeek-V3 (sigmoid, groups, bias, arXiv 2412.19437), as LLaDA2 has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP_BEST = 2
"""A group's score is the sum of so many of its best experts' scores."""


class RoutingRule(Protocol):
    """What the choice of experts reads of a configuration."""

    @property
    def num_experts_per_tok(self) -> int:
        """Experts of a row."""

    @property
    def score_function(self) -> str:
        """softmax or sigmoid."""

    @property
    def norm_topk_prob(self) -> bool:
        """Divide the weights by their sum."""

    @property
    def n_group(self) -> int:
        """Groups of neighbouring experts."""

    @property
    def topk_group(self) -> int:
        """Groups of a row."""

    @property
    def routed_scaling_factor(self) -> float:
        """Factor on the weights."""


class ExpertShape(RoutingRule, Protocol):
    """What a mixture reads of a configuration; `num_experts` 0: there is none."""

    hidden_size: int
    num_experts: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    first_k_dense_replace: int
    router_bias: bool


@dataclass(frozen=True)
class ExpertChoice:
    """Experts of R rows, K each, best first."""

    expert_RK: Tensor
    """int64, which experts."""
    weight_RK: Tensor
    """Factor on each one's output, in the dtype of the logits."""
    score_RE: Tensor
    """What the choice was made from: scores, with the bias, and -inf outside the admitted groups."""


def choose_experts(logits_RE: Tensor, rule: RoutingRule, bias_E: Tensor | None = None) -> ExpertChoice:
    """The experts of each row and their weights.

    Args:
        logits_RE: float32 or wider [R, E], the router's.
        rule: how many, and how they are scored.
        bias_E: [E], added to the scores in the choice alone; None: zeros.
    """
    sigmoid = rule.score_function == "sigmoid"
    score_RE = logits_RE.sigmoid() if sigmoid else logits_RE.softmax(-1)
    # The choice itself has no gradient; the router learns through the weights below.
    wanted_RE = score_RE.detach()
    if bias_E is not None:
        # The bias steers the load and must not change what a chosen expert contributes.
        wanted_RE = wanted_RE + bias_E.to(wanted_RE.dtype)
    if rule.n_group > 1:
        wanted_RE = _in_best_groups(wanted_RE, rule.n_group, rule.topk_group)
    expert_RK = wanted_RE.topk(rule.num_experts_per_tok, dim=-1).indices
    # Of the scores without bias, with gradient.
    weight_RK = score_RE.gather(1, expert_RK)
    if rule.norm_topk_prob:
        # sigmoids may all round to 0
        weight_RK = weight_RK / (weight_RK.sum(-1, keepdim=True) + (1e-20 if sigmoid else 0.0))
    return ExpertChoice(expert_RK, weight_RK * rule.routed_scaling_factor, wanted_RE)


def _in_best_groups(wanted_RE: Tensor, groups: int, kept: int) -> Tensor:
    grouped_RGe = wanted_RE.unflatten(-1, (groups, -1))
    best_RG = grouped_RGe.topk(GROUP_BEST, dim=-1).values.sum(-1).topk(kept, dim=-1).indices
    is_kept_RG = torch.zeros(grouped_RGe.shape[:2], dtype=torch.bool, device=wanted_RE.device).scatter(1, best_RG, True)  # noqa: FBT003
    # -inf, so that no expert outside the admitted groups is chosen, whatever its score.
    return grouped_RGe.masked_fill(~is_kept_RG[..., None], float("-inf")).flatten(1)


class PaperMlp(nn.Module):
    """W_down gelu_tanh(W_up u + b_up) + b_down."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, width)
        self.down_proj = nn.Linear(width, hidden_size)

    def forward(self, u_BRD: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(u_BRD), approximate="tanh"))


class ModernMlp(nn.Module):
    """SwiGLU: W_down (silu(W_gate u) * W_up u)."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, u_BRD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(u_BRD)) * self.up_proj(u_BRD))


class Gate(nn.Module):
    """The router of a layer: logits in fp32 (or wider), whatever the model's dtype."""

    expert_bias: Tensor | None

    def __init__(self, shape: ExpertShape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.num_experts, shape.hidden_size))
        nn.init.normal_(self.weight, std=0.02)
        # A buffer: it is moved by the load and not by gradients, and is stored with the weights.
        self.register_buffer("expert_bias", torch.zeros(shape.num_experts) if shape.router_bias else None)

    def forward(self, u_RD: Tensor) -> Tensor:
        return router_logits(u_RD, self.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:  # noqa: FBT001, FBT002 - torch's signature
        super()._apply(fn, recurse)
        # a model in bf16 keeps the bias as trained: steps of it are smaller than bf16 tells apart
        if self.expert_bias is not None and self.expert_bias.itemsize < torch.float32.itemsize:
            self.expert_bias = self.expert_bias.float()
        return self


def router_logits(u_RD: Tensor, weight_ED: Tensor) -> Tensor:
    """Logits [R, E] in fp32, or fp64 for a model of that dtype."""
    # Scores of two experts may differ by less than bf16 tells apart, and the choice is a comparison.
    wide = torch.promote_types(weight_ED.dtype, torch.float32)
    return F.linear(u_RD.to(wide), weight_ED.to(wide))


class ExpertMlp(nn.Module):
    """A mixture of experts; each row is computed by its chosen experts, and by the shared one where there is one."""

    def __init__(self, shape: ExpertShape) -> None:
        super().__init__()
        self.shape = shape
        self.gate = Gate(shape)
        self.experts = nn.ModuleList(
            ModernMlp(shape.hidden_size, shape.moe_intermediate_size) for _ in range(shape.num_experts)
        )
        shared = shape.shared_expert_intermediate_size
        self.shared_experts = ModernMlp(shape.hidden_size, shared) if shared else None

    def forward(self, u_BRD: Tensor) -> Tensor:
        u_RD = u_BRD.flatten(0, -2)
        choice = choose_experts(self.gate(u_RD), self.shape, self.gate.expert_bias)
        out_RD = torch.zeros_like(u_RD)
        # experts that no row has chosen are never touched: a decoding step reads the weights of its rows' experts alone
        for expert in choice.expert_RK.unique().tolist():
            # A row chooses an expert at most once, so each is added once.
            row_n, slot_n = (choice.expert_RK == expert).nonzero(as_tuple=True)
            weight_n1 = choice.weight_RK[row_n, slot_n, None].to(u_RD.dtype)
            out_RD = out_RD.index_add(0, row_n, self.experts[expert](u_RD[row_n]) * weight_n1)
        if self.shared_experts is not None:
            out_RD = out_RD + self.shared_experts(u_RD)
        return out_RD.view_as(u_BRD)
