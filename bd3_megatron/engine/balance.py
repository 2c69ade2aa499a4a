"""Loads of the experts of a step, summed over all ranks, and the update of the expert biases from them.

Contract: `begin` before the first forward, `finish` after the update on all ranks. Counts are whole numbers, so that sums do
not depend on the grid; biases move once a step, and only when the step's update was applied.
Source: the bias of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bd3_megatron.config.experts import ExpertsConfig
from bd3_megatron.model.bd3_model import Root
from bd3_megatron.model.loss_sums import NUM_BINS
from bd3_megatron.parallel.topology import Topology


@dataclass(frozen=True)
class LayerLoad:
    """What one layer's router did in a step, over all rows of the global batch; equal on all ranks of a stage."""

    load_E: Tensor
    """int64, counted rows that chose each expert."""
    masked_TE: Tensor
    """int64 [NUM_BINS, E], the rows that carry loss alone, by noise level."""
    terms: Tensor
    """float64 [2], balance and z terms without their factors; zeros where the run has none."""


Loads = dict[int, LayerLoad]
"""By layer, from 0."""


@dataclass(frozen=True)
class ExpertBalance:
    """The loads and biases of one engine."""

    root: Root
    topology: Topology
    experts: ExpertsConfig

    def begin(self, num_samples: int) -> None:
        """Forget what was counted.

        Args:
            num_samples: of the step, over all ranks.
        """
        for _, layer in self.root.expert_layers():
            layer.router.forget()
            if layer.terms is not None:
                # gradients are averaged over the ranks that share an optimizer state, and the term is a mean over samples
                layer.terms.share = self.topology.shard_size / num_samples

    def finish(self, applied: Tensor, num_samples: int) -> Loads:
        """The step's loads on this rank's layers, over all rows of the global batch. Collective over a pipeline stage.

        Args:
            applied: [], 1 where the step's update was made; with 0 biases stay. Not read by the host.
            num_samples: as in `begin`.
        """
        named = [(name, layer.router) for name, layer in self.root.expert_layers()]
        counts_NTE = torch.stack([torch.cat([r.load_E[None], r.masked_TE[:NUM_BINS]]) for _, r in named])
        terms_N2 = torch.stack([router.terms for _, router in named])
        has_terms = self.experts.balance_loss or self.experts.z_loss
        # together these two groups are the ranks of a stage, each once
        for group in (self.topology.expert_group, self.topology.expert_data_group):
            dist.all_reduce(counts_NTE, group=group)
            if has_terms:
                dist.all_reduce(terms_N2, group=group)
        loads = {}
        for (name, router), counts_TE, terms in zip(named, counts_NTE, terms_N2, strict=True):
            load_E = counts_TE[0]
            if router.expert_bias is not None and self.experts.bias_rate:
                # below the mean up, above it down; compared in whole numbers
                under_E = (load_E.sum() - load_E * self.experts.number).sign()
                router.expert_bias.add_(
                    under_E.to(torch.float32) * applied.to(torch.float32), alpha=self.experts.bias_rate
                )
            loads[int(name.split(".")[2])] = LayerLoad(load_E, counts_TE[1:], terms / num_samples)
        return loads
