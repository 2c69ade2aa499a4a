"""Exponential moving average of the fp32 parameters, over the shards this rank owns.

Decides: the average lives beside DeepSpeed's fp32 partitions, tensor for tensor, so keeping it costs no collective and
no second copy of anyone else's part. Decay is warmed up as min(decay, (1 + n) / (10 + n)) after update n.
Source: official BD3-LM code (models/ema.py), which averages all parameters after each optimizer step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def warmed_up_decay(decay: float, num_updates: int) -> float:
    """The decay used at update number `num_updates` (1 for the first)."""
    return min(decay, (1 + num_updates) / (10 + num_updates))


class Ema:
    """The averages of a list of owned fp32 tensors.

    Attributes:
        shards: one fp32 tensor for each owned partition.
        num_updates: optimizer updates seen.
    """

    def __init__(self, owned: Sequence[Tensor], decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        # The average starts at the initial weights; the warm-up of the decay makes it forget them soon.
        self.shards = [tensor.detach().clone().float() for tensor in owned]

    @torch.no_grad()
    def update(self, owned: Sequence[Tensor]) -> None:
        """Take in the parameters after an update."""
        self.num_updates += 1
        keep = warmed_up_decay(self.decay, self.num_updates)
        # One kernel for all shards: average += (1 - keep) * (weight - average).
        torch._foreach_lerp_(self.shards, [tensor.detach().float() for tensor in owned], 1.0 - keep)

    @torch.no_grad()
    def swap(self, owned: Sequence[Tensor]) -> None:
        """Exchange averages and parameters in place; called twice it does nothing."""
        for shard, tensor in zip(self.shards, owned, strict=True):
            # Exchanged tensor by tensor: one shard's copy at a time, not a second set of weights.
            held = tensor.detach().clone()
            tensor.data.copy_(shard)
            shard.copy_(held)
