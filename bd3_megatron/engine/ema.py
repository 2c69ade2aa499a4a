"""Exponential moving average of the fp32 parameters, over the shards this rank owns.

Decides: the average lives beside DeepSpeed's fp32 partitions, tensor for tensor, so keeping it costs no collective and
no second copy of anyone else's part. Decay is warmed up as min(decay, (1 + n) / (10 + n)) after update n.
Source: official BD3-LM code (models/ema.py), which averages all parameters after each optimizer step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Ema:
    """The averages of a list of owned fp32 tensors.

    Attributes:
        shards: one fp32 tensor for each owned partition.
    """

    def __init__(self, owned: Sequence[Tensor], decay: float) -> None:
        self.decay = decay
        # The average starts at the initial weights; the warm-up of the decay makes it forget them soon.
        self.shards = [tensor.detach().clone().float() for tensor in owned]
        # on the device: whether an update was made is known there first
        self._num_updates = torch.zeros((), dtype=torch.float64, device=owned[0].device)

    @property
    def num_updates(self) -> int:
        """Optimizer updates seen; waits for the device."""
        return int(self._num_updates)

    @num_updates.setter
    def num_updates(self, number: int) -> None:
        self._num_updates.fill_(number)

    @torch.no_grad()
    def update(self, owned: Sequence[Tensor], applied: Tensor) -> None:
        """Take in the parameters after an update.

        Args:
            owned: the parameters.
            applied: [], 1 where the update was made and 0 where it was left out; read on the device.
        """
        self._num_updates += applied
        number = self._num_updates
        # the warmed-up decay; with weight 0 an average stays as it is
        weight = applied * (1.0 - ((1.0 + number) / (10.0 + number)).clamp_max(self.decay))
        for shard, tensor in zip(self.shards, owned, strict=True):
            shard.lerp_(tensor.detach().float(), weight.to(shard.dtype))

    @torch.no_grad()
    def swap(self, owned: Sequence[Tensor]) -> None:
        """Exchange averages and parameters in place; called twice it does nothing."""
        for shard, tensor in zip(self.shards, owned, strict=True):
            # Exchanged tensor by tensor: one shard's copy at a time, not a second set of weights.
            held = tensor.detach().clone()
            tensor.data.copy_(shard)
            shard.copy_(held)
