"""Process groups of a grid: one call a distinct way to cut the ranks, however many ranks there are.

A rank makes only the groups it belongs to. Axes that cut the ranks alike share a group (dp and dp x cp where cp = 1, all axes
of size 1), and an axis over all ranks is the world's group. Every group has the configured time-out, and no group of another
backend stands beside it.
"""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

RankSets = tuple[tuple[int, ...], ...]
"""Disjoint sets of ranks, each ascending."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Sizes of the axes. A rank's number counts tp fastest, then cp, dp and pp, as megatron's tp-cp-ep-dp-pp does."""

    tp: int
    cp: int
    dp: int
    pp: int
    ep: int = 1
    """Expert-parallel ranks: neighbours in a pipeline stage, whatever axes they lie on."""

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.dp * self.pp

    def coordinate(self, rank: int, axis: str) -> int:
        """Position of a rank along one axis."""
        return int((self._ranks == rank).nonzero()[0, _AXES.index(axis)])

    def sets(self, *axes: str) -> RankSets:
        """The ranks that differ in these axes only, for every choice of the others."""
        kept = [i for i, axis in enumerate(_AXES) if axis in axes]
        size = math.prod(getattr(self, axis) for axis in axes)
        last = self._ranks.movedim(kept, list(range(-len(kept), 0))).reshape(-1, size)
        return tuple(tuple(ranks) for ranks in last.tolist())

    def expert_sets(self) -> RankSets:
        """The ranks that together hold every expert of a stage: `ep` neighbours, each with its own experts."""
        return tuple(tuple(ranks) for ranks in self._ranks.reshape(-1, self.ep).tolist())

    def expert_data_sets(self) -> RankSets:
        """The ranks of a stage that hold the same experts."""
        by_stage = self._ranks.reshape(self.pp, -1, self.ep).transpose(1, 2)
        return tuple(tuple(ranks) for ranks in by_stage.reshape(self.pp * self.ep, -1).tolist())

    def end_sets(self) -> RankSets:
        """First and last rank of every pipeline."""
        return tuple(tuple(sorted({ranks[0], ranks[-1]})) for ranks in self.sets("pp"))

    @property
    def _ranks(self) -> torch.Tensor:
        return torch.arange(self.world_size).view(*(getattr(self, axis) for axis in _AXES))


# Slowest first: the last axis varies fastest in a rank's number.
_AXES = ("pp", "dp", "cp", "tp")


@dataclass
class GroupMaker:
    """Makes groups of the world's ranks; equal cuts give the same group.

    Args:
        timeout: of every collective over a group made here.
    """

    timeout: datetime.timedelta
    _made: dict[tuple[RankSets, str], dist.ProcessGroup | None] = field(default_factory=dict)

    def group(self, sets: RankSets, name: str, *, own: bool = False) -> dist.ProcessGroup | None:
        """This rank's group among `sets`; all ranks ask for the same groups in one order.

        Args:
            sets: of ranks.
            name: for debuggers.
            own: not shared with an equal cut, because collectives of both overlap: on one communicator they would queue.

        Returns:
            The group, or None if this rank is in none of the sets.
        """
        # sets of one rank each never communicate, so they need no communicator of their own
        alone = own and len(sets) < dist.get_world_size()
        if not alone and len(sets) == 1 and len(sets[0]) == dist.get_world_size():
            return dist.group.WORLD
        # equal cuts share one communicator and its buffers; a group of its own is told apart by its name
        key = (sets, name if alone else "")
        if key not in self._made:
            self._made[key] = self._make(sets, name)
        return self._made[key]

    def _make(self, sets: RankSets, name: str) -> dist.ProcessGroup | None:
        if dist.get_backend() == "nccl":
            # one ncclCommSplit for all sets at once; megatron's loop over sets makes every rank take part in each of them
            return dist.split_group(split_ranks=[list(ranks) for ranks in sets], timeout=self.timeout, group_desc=name)
        own = next((ranks for ranks in sets if dist.get_rank() in ranks), None)
        if own is None:
            return None
        # only the members take part, so that start-up does not grow with the number of sets
        return dist.new_group(list(own), timeout=self.timeout, use_local_synchronization=True, group_desc=name)
