"""Allowed attention pairs of a step whose documents do not see each other, for the figures of that step.

Decides: counted from the document ids the step was trained on, over all its samples, not estimated from lengths. Ids of
a run of equal values are one document, as visibility has it. Costs, where packing is isolated and a record is due, some
tens of microseconds a sample on the host and one all-reduce of four numbers; elsewhere nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import groupby

import torch
import torch.distributed as dist

from bd3_megatron.attention.visibility import on_device
from bd3_megatron.compat.device import HostCopy
from bd3_megatron.config.schema import Config
from bd3_megatron.cost.pairs import Pairs, attended_pairs, mean_pairs
from bd3_megatron.cost.shape import shape_of
from bd3_megatron.model.pair_batch import PairBatch
from bd3_megatron.parallel.topology import Topology


def step_pairs(
    config: Config, micro_batches: Sequence[PairBatch], topology: Topology, *, block_size: int
) -> Callable[[], Pairs | None]:
    """Mean allowed pairs of a step's sequences, equal on every rank; None where packing isolates no documents.

    Collective over dp: every data-parallel rank has its own samples, as many as the others. Only the answer waits.

    Args:
        config: of the run.
        micro_batches: this rank's part of the step.
        topology: the grid.
        block_size: S in use.
    """
    # Elsewhere the pairs follow from the length alone.
    if config.data.packing != "isolated":
        return lambda: None
    block = shape_of(config, block_size=block_size).block
    # Lists on the host, read once a batch; the backends' tables walk the same ones.
    rows = [ids_L for batch in micro_batches for ids_L in batch.visibility.document_layouts or ()]
    mine = mean_pairs([attended_pairs(config.data.seq_len, block, _lengths(ids_L)) for ids_L in rows])
    sums = on_device(
        torch.tensor([mine.noisy, mine.clean, mine.dead_rows, mine.dead_pairs], dtype=torch.float64), topology.device
    )
    # Over dp alone: the ranks of tp, pp and cp hold the same samples and have counted the same pairs.
    dist.all_reduce(sums, group=topology.groups.dp)
    return functools.partial(_mean, HostCopy(sums / topology.dp))


def _mean(sums: HostCopy) -> Pairs:
    noisy, clean, dead_rows, dead_pairs = sums.read().tolist()
    return Pairs(noisy=noisy, clean=clean, dead_rows=dead_rows, dead_pairs=dead_pairs)


def _lengths(ids_L: Sequence[int]) -> list[int]:
    return [len(list(run)) for _, run in groupby(ids_L)]
