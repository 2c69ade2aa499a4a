"""What is measured in a step, and the one reduction that makes it global.

Decides: the last stage keeps per-sample sums of weight x NLL in fp64; they travel to all ranks in the samples' own
order and are added there, so the logged loss does not depend on micro-batches or data-parallel ranks beyond the sums
themselves. Noise-level bins and counts ride in the same all-reduce. Names of metrics are made here and nowhere else.
Costs: one fp64 all-reduce of (samples + 40) numbers a log line; nothing on other steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bd3_megatron.compat.device import HostCopy
from bd3_megatron.config.experts import ExpertsConfig
from bd3_megatron.config.schema import ModelConfig
from bd3_megatron.engine.balance import Loads
from bd3_megatron.model.loss_sums import NUM_BINS, LossSums
from bd3_megatron.parallel.topology import Topology


@dataclass(frozen=True)
class StepSums:
    """A step's sums over the whole grid."""

    weighted_nll_nats: float
    """Sum of weight x NLL over all samples, added in sample order."""
    token_count: int
    """The loss's denominator."""
    masked_count: int
    text_count: int
    bins: Tensor
    """float64 [2, NUM_BINS]."""
    weighted_entropy_nats: float = 0.0
    """Sum of weight x entropy of the rows that the confidence term takes, its factor left out."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.weighted_nll_nats / max(1, self.token_count)

    @property
    def masked_fraction(self) -> float:
        """Share of the rows that could carry loss that do."""
        return self.masked_count / max(1, self.text_count)

    def metrics(self) -> dict[str, float]:
        """The record's loss and noise entries."""
        record = {
            "loss/train_nats_per_token": self.loss,
            "noise/masked_fraction": self.masked_fraction,
        }
        # terms are logged apart, so that the bound stays comparable between runs
        if self.weighted_entropy_nats:
            record["loss/confidence_nats_per_token"] = self.weighted_entropy_nats / max(1, self.token_count)
        for number in range(NUM_BINS):
            count = float(self.bins[1, number])
            if count:
                name = f"loss/nll_nats_at_t_{number / NUM_BINS:.1f}"
                record[name] = float(self.bins[0, number]) / count
        return record


@dataclass(frozen=True)
class PendingSums:
    """A step's sums on their way to the host."""

    table: HostCopy
    """float64 [samples + 2 x NUM_BINS + 4]."""
    num_samples: int

    def read(self) -> StepSums:
        """The sums; waits until the device has passed their reduction."""
        here, num_samples = self.table.read(), self.num_samples
        return StepSums(
            # One sample after another: the order of this sum does not depend on the grid.
            weighted_nll_nats=sum(here[:num_samples].tolist()),
            token_count=int(here[-3]),
            masked_count=int(here[-2]),
            text_count=int(here[-1]),
            bins=here[num_samples : num_samples + 2 * NUM_BINS].view(2, NUM_BINS),
            weighted_entropy_nats=float(here[-4]),
        )


@dataclass(frozen=True)
class PendingLoads:
    """Loads of all layers' experts on their way to the host."""

    table: HostCopy | None
    """float64 [layers, (1 + NUM_BINS) x E + 2]: counted rows, those that carry loss by level, terms; None: no experts."""
    experts: ExpertsConfig | None

    def metrics(self) -> dict[str, float]:
        """The record's entries on experts, of each layer and of each noise level; waits for the device."""
        record: dict[str, float] = {}
        if self.table is None or self.experts is None:
            return record
        first = self.experts.leading_dense_layers
        table = self.table.read()[first:]
        counts_NTE = table[:, :-2].unflatten(1, (1 + NUM_BINS, -1))
        for layer, counts_TE in enumerate(counts_NTE, first):
            load_E, masked_E = counts_TE[0], counts_TE[1:].sum(0)
            record[f"experts/load_entropy_layer_{layer:02d}"] = load_entropy(load_E)
            record[f"experts/largest_load_share_layer_{layer:02d}"] = float(load_E.max() / load_E.sum().clamp_min(1.0))
            # masked rows share one embedding: do they also share their experts?
            record[f"experts/masked_load_entropy_layer_{layer:02d}"] = load_entropy(masked_E)
        for number, loads_NE in enumerate(counts_NTE[:, 1:].unbind(1)):
            if bool(loads_NE.any()):
                entropies = [load_entropy(load_E) for load_E in loads_NE]
                record[f"experts/masked_load_entropy_at_t_{number / NUM_BINS:.1f}"] = sum(entropies) / len(entropies)
        for name, factor, values in zip(TERMS, self.factors(), table[:, -2:].unbind(1), strict=True):
            if factor:
                record[f"experts/{name}"] = float(values.mean())
        return record

    def factors(self) -> tuple[float, float]:
        """Of the two terms, in the order of `TERMS`."""
        assert self.experts is not None
        return self.experts.balance_loss, self.experts.z_loss


TERMS = ("balance_term", "z_term")
"""Means over layers, without their factors; the first is 1 at even load."""


def load_entropy(load_E: Tensor) -> float:
    """Entropy of a load over its largest: 1 where all experts are chosen alike, 0 where one is chosen always."""
    share_E = load_E / load_E.sum().clamp_min(1.0)
    return float(torch.special.entr(share_E).sum()) / math.log(len(share_E))


def begin_loads(loads: Loads, topology: Topology, model: ModelConfig) -> PendingLoads:
    """Gather the loads of all layers. Collective over pipeline stages; equal on every rank.

    Args:
        loads: of this rank's layers, over all rows of the step.
        topology: the grid.
        model: whose layers.
    """
    if model.experts is None:
        return PendingLoads(None, None)
    columns = (1 + NUM_BINS) * model.experts.number + 2
    table = torch.zeros(model.num_layers, columns, dtype=torch.float64, device=topology.device)
    for layer, load in loads.items():
        table[layer] = torch.cat([load.load_E, load.masked_TE.flatten(), load.terms])
    dist.all_reduce(table, group=topology.groups.pp)
    return PendingLoads(HostCopy(table), model.experts)


def reduce_step(
    logs: Sequence[LossSums],
    topology: Topology,
    *,
    num_samples: int,
    token_count: int,
    masked_count: int,
    text_count: int,
) -> PendingSums:
    """Sum a step over the grid. Entry: logs on last stages only, partial over cp; exit: equal on every rank. Does not wait.

    Args:
        logs: of this rank's micro-batches, in order.
        topology: the grid.
        num_samples: of the step over all ranks.
        token_count, masked_count, text_count: of this data-parallel rank's samples.
    """
    # One table for everything, so that a log line costs one all-reduce.
    table = torch.zeros(num_samples + 2 * NUM_BINS + 4, dtype=torch.float64, device=topology.device)
    # Tensor-parallel ranks have computed the same sums; one of them adds them.
    if logs and topology.tp_rank == 0:
        table[:num_samples] = _in_sample_order(logs, topology, num_samples)
        table[num_samples : num_samples + 2 * NUM_BINS] = torch.stack([log.bins for log in logs]).sum(0).flatten()
        entropies = [log.weighted_entropy for log in logs if log.weighted_entropy is not None]
        if entropies:
            table[-4] = torch.stack(entropies).sum()
    # Counts are of whole sequences: one rank of a replica states them.
    if topology.tp_rank == 0 and topology.cp_rank == 0 and topology.is_first_stage:
        table[-3], table[-2], table[-1] = token_count, masked_count, text_count
    dist.all_reduce(table)
    return PendingSums(HostCopy(table), num_samples)


def _in_sample_order(logs: Sequence[LossSums], topology: Topology, num_samples: int) -> Tensor:
    """This rank's per-sample sums at their places in the step: index = (micro-batch x dp + dp rank) x mbs + row."""
    shape = len(logs), topology.dp, num_samples // (len(logs) * topology.dp)
    whole = torch.zeros(shape, dtype=torch.float64, device=topology.device)
    whole[:, topology.dp_rank] = torch.stack([log.weighted_nll_B for log in logs])
    return whole.flatten()
