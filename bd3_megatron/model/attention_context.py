"""What all layers of a rank share and a curriculum changes between steps: the rows and the attention backend.

Decides: rows are those of a phase, never of a batch. A noisy block without a masked token is dead too, and stays: for t
uniform it is one in S + 1 of the noisy half (6 % at S = 16: at most 2.9 % of a step; 2 % at S = 4 under the paper's
interval [0.45, 0.95], none with `diffusion.resample`), and leaving it out breaks what all rows are cut by: the staircase
of the structured backend falls into pieces (77 calls for 16 at L 2048, S 16: 11 % slower, measured), tile tables and
p2p shapes change with every micro-batch, context-parallel slices are no longer balanced, and sequences of one batch would
have to drop equally many. The figures stand in tools/bench/results/LOG.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from bd3_megatron.attention.streams import Attend
from bd3_megatron.diffusion.objective import Objective
from bd3_megatron.parallel.pair_split import PairLayout, pair_layout
from bd3_megatron.parallel.topology import Topology


@dataclass
class AttentionContext:
    """Mutable on purpose: one object in every layer, changed only between steps."""

    layout: PairLayout
    attend: Attend


LayoutOf = Callable[[int, int], PairLayout]
"""(block size, views) -> this rank's rows; the phases of a curriculum differ in nothing else."""


def layout_function(objective: Objective, *, length: int, topology: Topology, skip_dead_rows: bool) -> LayoutOf:
    """The rows this rank holds at each block size of a run.

    Args:
        objective: of the run.
        length: L.
        topology: the grid; its coordinates choose the context-parallel slice.
        skip_dead_rows: leave out the last clean block where tp divides what remains.
    """

    @functools.cache
    def layout_of(block_size: int, views: int) -> PairLayout:
        # sequence parallelism cuts the rows of a rank evenly; with one block less they may not divide
        divides = not topology.sequence_parallel or ((views + 1) * length - block_size) % topology.tp == 0
        return pair_layout(
            objective.at(block_size, views=views),
            length=length,
            cp=topology.cp,
            cp_rank=topology.cp_rank,
            drop_last_clean=skip_dead_rows and divides,
        )

    return layout_of
