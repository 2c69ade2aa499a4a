"""The grid of ranks as an object that everyone is handed; nobody asks megatron's globals.

Holds sizes, coordinates and process groups, and the unit DeepSpeed shards and averages over, which is dp x cp:
context-parallel ranks hold the same weights and different rows. Refuses a world size that does not match the axes.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from bd3_megatron.compat import megatron as megatron_compat
from bd3_megatron.compat.device import collective_backend, raise_open_files_limit
from bd3_megatron.config.schema import ParallelConfig
from bd3_megatron.errors import GridError
from bd3_megatron.parallel.groups import Grid, GroupMaker


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Sizes, coordinates and process groups of this rank. `vpp` counts model chunks a stage holds."""

    tp: int
    pp: int
    cp: int
    dp: int
    ep: int
    vpp: int
    sequence_parallel: bool
    rank: int
    tp_rank: int
    pp_rank: int
    cp_rank: int
    dp_rank: int
    device: torch.device
    groups: ProcessGroupCollection = field(repr=False)
    shard_group: dist.ProcessGroup = field(repr=False)
    """Ranks with the same weights (dp x cp): gradients are averaged and optimizer state is cut over it."""
    model_group: dist.ProcessGroup = field(repr=False)
    """Ranks that together hold one model (tp x pp): norms are summed over it."""
    embedding_group: dist.ProcessGroup | None = field(repr=False)
    """First and last stage, which both hold a tied table; None with one stage."""
    expert_group: dist.ProcessGroup = field(repr=False)
    """Ranks of a stage that together hold every expert once, over tp, cp and dp: rows travel over it."""
    expert_data_group: dist.ProcessGroup = field(repr=False)
    """Ranks of a stage with the same experts: the state of experts is cut over it."""

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def shard_size(self) -> int:
        return self.dp * self.cp

    @property
    def ep_rank(self) -> int:
        return dist.get_rank(self.expert_group)

    def along(self, axis: str) -> tuple[int, int]:
        """(this rank's coordinate, size) of an axis that cuts parameters: "tp" or "ep"."""
        return (self.ep_rank, self.ep) if axis == "ep" else (self.tp_rank, self.tp)

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    @property
    def grid(self) -> dict[str, int]:
        sizes = {"tp": self.tp, "pp": self.pp, "vpp": self.vpp, "cp": self.cp, "dp": self.dp}
        # checkpoints that are older than experts have no such axis
        return sizes if self.ep == 1 else sizes | {"ep": self.ep}

    def holds(self, chunk: int) -> tuple[bool, bool]:
        """(is first, is last) of model chunk `chunk` of this rank in the order of layers."""
        return self.is_first_stage and chunk == 0, self.is_last_stage and chunk == self.vpp - 1

    def last_stage_rank(self) -> int:
        """Global rank of the last stage in this rank's pipeline."""
        return dist.get_process_group_ranks(self.groups.pp)[-1]


def join(config: ParallelConfig, *, rank: int, world_size: int, device: torch.device) -> Topology:
    """Meet the other ranks (env:// rendezvous) and build the grid.

    Args:
        config: the axes; dp None takes what the others leave.
        rank, world_size: of this job.
        device: where this rank computes.

    Raises:
        GridError: the axes do not multiply to the world size.
    """
    raise_open_files_limit()
    megatron_compat.install()
    timeout = datetime.timedelta(seconds=config.collective_timeout_seconds)
    if not dist.is_initialized():
        # with a device NCCL connects at once, which `split_group` needs
        device_id = device if device.type == "cuda" else None
        dist.init_process_group(
            collective_backend(device), rank=rank, world_size=world_size, timeout=timeout, device_id=device_id
        )
    grid = _grid(config, world_size)
    vpp = config.vpp if (config.vpp or 1) > 1 else None
    # joining the same grid again in one process finds its groups
    groups = megatron_compat.published_groups()
    if groups is None:
        groups = _groups(grid, timeout)
        megatron_compat.publish_groups(groups, vpp=vpp)
    elif (found := {axis: getattr(groups, axis).size() for axis in ("tp", "cp", "dp", "pp", "ep")}) != vars(grid):
        raise GridError(
            f"this process is on the grid {found} and cannot join {vars(grid)}; leave the first one before."
        )
    return Topology(
        tp=grid.tp,
        pp=grid.pp,
        cp=grid.cp,
        dp=grid.dp,
        ep=grid.ep,
        vpp=vpp or 1,
        sequence_parallel=config.sequence_parallel,
        rank=rank,
        tp_rank=grid.coordinate(rank, "tp"),
        pp_rank=grid.coordinate(rank, "pp"),
        cp_rank=grid.coordinate(rank, "cp"),
        dp_rank=grid.coordinate(rank, "dp"),
        device=device,
        groups=groups,
        shard_group=groups.dp_cp,
        model_group=groups.mp,
        embedding_group=groups.embd if grid.pp > 1 else None,
        expert_group=groups.ep,
        expert_data_group=groups.expt_dp,
    )


def _grid(config: ParallelConfig, world_size: int) -> Grid:
    """The grid of so many ranks.

    Raises:
        GridError: the axes do not multiply to the world size.
    """
    if world_size % config.model_ranks:
        raise GridError(
            f"world size {world_size} is not a multiple of tp x pp x cp = {config.model_ranks}; change an axis."
        )
    if world_size // config.pp % config.ep:
        raise GridError(f"ep={config.ep} does not divide the {world_size // config.pp} ranks of a stage; change ep.")
    return Grid(tp=config.tp, cp=config.cp, dp=world_size // config.model_ranks, pp=config.pp, ep=config.ep)


def _groups(grid: Grid, timeout: datetime.timedelta) -> ProcessGroupCollection:
    """The groups in use, made in the same order on every rank."""
    maker = GroupMaker(timeout)
    return ProcessGroupCollection(
        tp=maker.group(grid.sets("tp"), "tp"),
        # gathers of keys run while buckets of gradients are reduced over dp x cp
        cp=maker.group(grid.sets("cp"), "cp", own=True),
        dp=maker.group(grid.sets("dp"), "dp"),
        pp=maker.group(grid.sets("pp"), "pp"),
        dp_cp=maker.group(grid.sets("dp", "cp"), "dp_cp"),
        mp=maker.group(grid.sets("tp", "pp"), "tp_pp"),
        ep=maker.group(grid.expert_sets(), "ep"),
        expt_tp=maker.group(grid.sets(), "self"),
        expt_dp=maker.group(grid.expert_data_sets(), "expert_dp"),
        # last: inner stages are in none of these sets, and gloo's names count the groups a rank has made so far
        embd=maker.group(grid.end_sets(), "embedding"),
    )


def leave() -> None:
    """Tear down groups; after this the process may join another grid (tests) or end."""
    # first: megatron's names must not outlive the groups they point at
    megatron_compat.forget_groups()
    if dist.is_initialized():
        dist.destroy_process_group()


class DeepSpeedMpu:
    """The model-parallel unit DeepSpeed asks for its groups (0.19.8 probes others with hasattr; they must stay absent).

    DeepSpeed's "model parallel" is everything that is not data parallel: tp x pp.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        # context-parallel ranks hold the same weights and see other rows: for DeepSpeed they are data-parallel ranks
        return self._topology.shard_group

    def get_data_parallel_world_size(self) -> int:
        return self._topology.shard_size

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._topology.shard_group)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._topology.model_group

    def get_model_parallel_world_size(self) -> int:
        return self._topology.tp * self._topology.pp

    def get_model_parallel_rank(self) -> int:
        # tp counts fastest, as in `Grid`
        return self._topology.pp_rank * self._topology.tp + self._topology.tp_rank

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._topology.groups.tp

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._topology.tp

    def get_tensor_model_parallel_rank(self) -> int:
        return self._topology.tp_rank

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        return self._topology.groups.pp

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._topology.pp
