"""Exactly k masked tokens in every block: less variance than independent draws, and a preference for positions.

Contract: k = round(p n) of the n maskable tokens of a block. Alike tokens are masked with probability k / n each, which is p up
to 1 / (2 n); with a preference they are drawn one after another without replacement, in proportion to their weights.
Costs: two sorts of the block's uniform numbers.
Source: Efficient-DLM (position-dependent masking); Efraimidis and Spirakis 2006 (weighted sampling by exponential clocks).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bd3_megatron.diffusion.axes import ObjectiveAxes


def exact_mask(u_BKS: Tensor, probability_BK: Tensor, maskable_BKS: Tensor, axes: ObjectiveAxes) -> Tensor:
    """Which tokens are masked.

    Args:
        u_BKS: float64 [B, K, S] in [0, 1), the token's uniform number.
        probability_BK: float [B, K], the level's mask probability p.
        maskable_BKS: bool [B, K, S]: the k are chosen among these; the others are masked by themselves where u < p.
        axes: least_masked and position_half_life.

    Returns:
        bool [B, K, S].
    """
    num_BK = maskable_BKS.sum(dim=2)
    count_BK = torch.floor(probability_BK.double() * num_BK + 0.5).long().clamp_min(axes.least_masked).minimum(num_BK)
    # The first k of exponential clocks of rate w ring for a weighted choice without replacement; at equal rates their order
    # is that of u, so that the preference alone moves the choice.
    clock_BKS = u_BKS
    if axes.position_half_life is not None:
        size = u_BKS.shape[2]
        doublings_S = torch.arange(size, device=u_BKS.device, dtype=torch.float64) / (axes.position_half_life * size)
        clock_BKS = -torch.log1p(-u_BKS) * torch.exp2(-(1 - probability_BK.double())[:, :, None] * doublings_S)
    rank_BKS = clock_BKS.masked_fill(~maskable_BKS, torch.inf).argsort(dim=2).argsort(dim=2)
    by_itself_BKS = u_BKS < probability_BK[:, :, None]
    return torch.where(maskable_BKS, rank_BKS < count_BK[:, :, None], by_itself_BKS)
