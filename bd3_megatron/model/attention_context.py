"""What attention of all layers of a rank shares: the rows and the backend of a phase, and the visibility of each micro-batch.

Rows are those of a phase, never of a batch. Megatron's layers hand one tensor through to attention, and recomputation saves and
detaches it; so a micro-batch's visibility travels as its ticket, a number on the host, and is looked up here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from bd3_megatron.attention.select import Backend
from bd3_megatron.attention.visibility import Visibility
from bd3_megatron.config.schema import ParallelConfig
from bd3_megatron.diffusion.axes import ObjectiveAxes
from bd3_megatron.diffusion.objective import Objective
from bd3_megatron.model.pair_batch import PairBatch
from bd3_megatron.parallel.pair_split import PairLayout, pair_layout


@dataclass
class AttentionContext:
    """Mutable on purpose: one object in every layer, changed only between steps."""

    layout: PairLayout
    backends: Mapping[int, Backend]
    """The backend of every block size that is trained."""
    # a batch holds its visibility, from before its forward until after its backward
    _visible: WeakValueDictionary[int, Visibility] = field(default_factory=WeakValueDictionary)
    _batches: WeakValueDictionary[int, PairBatch] = field(default_factory=WeakValueDictionary)
    _entered: int = 0

    @property
    def backend(self) -> Backend:
        """Of the phase in force."""
        return self.backends[self.layout.block_size]

    def prepare(self, visibility: Visibility, device: torch.device) -> None:
        """Make the tables of every call that layers will make, and send them to `device` without waiting for it."""
        # the visibility's phase, which need not be the one in force: a step is made while the one before it runs
        backend = self.backends[visibility.block_size]
        backend.prepare(visibility, device)
        if visibility.noisy_rows and visibility.clean_key_rows:
            backend.prepare(visibility.without_clean_queries, device)

    def ticket(self, visibility: Visibility, batch: PairBatch | None = None) -> Tensor:
        """What stands for a micro-batch on its way through the layers: int64 [2] on the host.

        Args:
            visibility: of its rows.
            batch: what layers with experts ask about its rows.
        """
        # Held weakly: when the batch goes, its visibility and tables go, and the number may be used again.
        self._visible[id(visibility)] = visibility
        if batch is not None:
            self._batches[id(batch)] = batch
        return torch.tensor([id(visibility), id(batch)])

    def enter(self, ticket: Tensor) -> Visibility:
        """The visibility of a ticket, one object in all layers of a micro-batch, which is from now on the one in progress."""
        visible, self._entered = ticket.tolist()
        return self._visible[visible]

    @property
    def batch(self) -> PairBatch:
        """The micro-batch whose attention ran last: a layer's experts follow its attention."""
        return self._batches[self._entered]


LayoutOf = Callable[[int, int, ObjectiveAxes | None], PairLayout]
"""(block size, views, axes or None for the first phase's) -> this rank's rows; phases differ in nothing else."""


# A noisy block without a masked token is dead too, and stays: for t uniform it is one in S + 1 of the noisy half (6 % at
# S = 16, at most 2.9 % of a step; none with `diffusion.resample`), and without it the rectangles of structured attention
# fall into pieces (77 calls for 16 at L 2048, S 16: 11 % slower), tables and p2p shapes change with every micro-batch, and
# context-parallel slices are no longer balanced. The figures stand in tools/bench/results/LOG.md.
def layout_function(
    objective: Objective, *, length: int, parallel: ParallelConfig, cp_rank: int, skip_dead_rows: bool
) -> LayoutOf:
    """The rows this rank holds at each block size of a run.

    Args:
        objective: of the run.
        length: L.
        parallel: the axes.
        cp_rank: which context-parallel slice.
        skip_dead_rows: leave out the last clean block where tp divides what remains.
    """

    # A phase's rows are asked for at every step, and tables that backends make belong to one layout.
    @functools.cache
    def cached(block_size: int, views: int, axes: ObjectiveAxes) -> PairLayout:
        # sequence parallelism cuts the rows of a rank evenly; with one block less they may not divide
        divides = not parallel.sequence_parallel or ((views + 1) * length - block_size) % parallel.tp == 0
        return pair_layout(
            objective.at(block_size, views=views, axes=axes),
            length=length,
            cp=parallel.cp,
            cp_rank=cp_rank,
            drop_last_clean=skip_dead_rows and divides,
        )

    return lambda block_size, views, axes: cached(block_size, views, objective.axes if axes is None else axes)
