"""Loads of the experts of a step, summed over all ranks, and the update of the expert biases from them.

Contract: `begin` before the first forward, `finish` after the update on all ranks. Counts are whole numbers, so that sums do
not depend on the grid; biases move once a step, and only when the step's update was applied.
Source: the bias of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2), which no balance loss accompanies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bd3_megatron.config.experts import ExpertsConfig
from bd3_megatron.model.bd3_model import Root
from bd3_megatron.parallel.topology import Topology

Loads = dict[int, Tensor]
"""Layer, from 0 -> int64 [E], counted rows of the step that chose each expert."""


@dataclass(frozen=True)
class ExpertBalance:
    """The loads and biases of one engine."""

    root: Root
    topology: Topology
    experts: ExpertsConfig

    def begin(self) -> None:
        """Forget what was counted."""
        for _, router in self.root.named_routers():
            router.load_E.zero_()

    def finish(self, applied: Tensor) -> Loads:
        """The step's loads on this rank's layers, over all rows of the global batch. Collective over a pipeline stage.

        Args:
            applied: [], 1 where the step's update was made; with 0 biases stay. Not read by the host.
        """
        routers = list(self.root.named_routers())
        loads_NE = torch.stack([router.load_E for _, router in routers])
        # together these two groups are the ranks of a stage, each once
        dist.all_reduce(loads_NE, group=self.topology.expert_group)
        dist.all_reduce(loads_NE, group=self.topology.expert_data_group)
        for (_, router), load_E in zip(routers, loads_NE, strict=True):
            if router.expert_bias is not None and self.experts.bias_rate:
                # below the mean up, above it down; compared in whole numbers
                under_E = (load_E.sum() - load_E * self.experts.number).sign()
                router.expert_bias.add_(
                    under_E.to(torch.float32) * applied.to(torch.float32), alpha=self.experts.bias_rate
                )
        return {int(name.split(".")[2]): load_E for (name, _), load_E in zip(routers, loads_NE, strict=True)}
