"""The router's own loss terms: balance within a sequence, and the size of its logits.

Contract: both are means over the counted rows of a sequence, then over the sequences of the global batch, summed over layers;
so neither micro-batches nor ranks show. They reach the gradient alone: the loss that is logged stays the bound.
Source: DeepSeek-V3 (arXiv 2412.19437, eq. 17 to 20) on the choices that were made; ST-MoE (arXiv 2202.08906, eq. 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from bd3_megatron.config.experts import ExpertsConfig
from bd3_megatron.hf.mlp_bd3 import ExpertChoice
from bd3_megatron.model.load import LayerRows


@dataclass
class RouterTerms:
    """The terms of one layer's router.

    Args:
        experts: factors and shapes.
        groups: process groups over which the rows of a sequence are cut.
    """

    experts: ExpertsConfig
    groups: Sequence[dist.ProcessGroup]
    share: float = 0.0
    """Factor on the sum over this rank's sequences: shard_size / samples of the global batch, set at every step."""

    def sums(self, logits_RE: Tensor, choice: ExpertChoice, rows: LayerRows) -> Tensor:
        """(balance, z): sums over this rank's sequences of its rows' part in each mean, [2] in the logits' dtype.

        Args:
            logits_RE: the router's.
            choice: made from them.
            rows: what is known of them. Collective over `groups`.
        """
        number, top_k = self.experts.number, self.experts.top_k
        counts_BE = torch.zeros(rows.num_samples * number, dtype=torch.int64, device=logits_RE.device)
        index_RK = rows.sample_R[:, None] * number + choice.expert_RK
        counts_BE.scatter_add_(0, index_RK.flatten(), rows.counts_R[:, None].expand_as(index_RK).flatten())
        for group in self.groups:
            # of whole sequences: a mean of the ranks' own products would depend on how rows are cut
            if group.size() > 1:
                dist.all_reduce(counts_BE, group=group)
        counts_BE = counts_BE.view(rows.num_samples, number)
        # padding may be all that a sequence has
        length_B = (counts_BE.sum(1) // top_k).clamp_min(1).to(logits_RE.dtype)
        share_R = (rows.counts_R / length_B[rows.sample_R]).to(logits_RE.dtype)
        score_RE = logits_RE.sigmoid() if self.experts.score == "sigmoid" else logits_RE.softmax(-1)
        # scores of one row sum to 1, so that the term is 1 at even load
        score_RE = score_RE / score_RE.sum(-1, keepdim=True)
        load_BE = counts_BE * (number / top_k) / length_B[:, None]
        balance_R = (load_BE[rows.sample_R] * score_RE).sum(-1)
        return torch.stack([(share_R * balance_R).sum(), (share_R * logits_RE.logsumexp(-1).square()).sum()])

    def joined(self, weight_RK: Tensor, sums: Tensor) -> Tensor:
        """The weights as they are; in the backward the terms' gradient sets out with theirs."""
        factors = sums.new_tensor([self.experts.balance_loss, self.experts.z_loss])
        return _Joined.apply(weight_RK, (sums * factors).sum() * self.share)


class _Joined(torch.autograd.Function):
    """Identity on the first argument; the second is a summand of the loss."""

    @staticmethod
    def forward(ctx: Any, weight_RK: Tensor, term: Tensor) -> Tensor:
        return weight_RK.view_as(weight_RK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        return upstream, upstream.new_ones(())
