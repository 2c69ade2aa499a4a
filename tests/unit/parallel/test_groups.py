"""The sets of ranks are megatron's, and joining a grid costs a few group calls a rank, however large the world."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.parallel_state import RankGenerator
from torch.testing._internal.distributed.fake_pg import FakeStore

from bd3_megatron.config.schema import ParallelConfig
from bd3_megatron.errors import GridError
from bd3_megatron.parallel.groups import Grid
from bd3_megatron.parallel.topology import Topology, join, leave

MOST_CALLS = 16
SECONDS = 77


@pytest.mark.parametrize("sizes", [(2, 2, 2, 2), (1, 1, 8, 1), (4, 1, 2, 3), (1, 2, 3, 4)])
def test_the_sets_are_those_of_megatron(sizes: tuple[int, ...]) -> None:
    grid = Grid(tp=sizes[0], cp=sizes[1], dp=sizes[2], pp=sizes[3])
    theirs = RankGenerator(tp=grid.tp, cp=grid.cp, ep=1, dp=grid.dp, pp=grid.pp, order="tp-cp-ep-dp-pp")
    for axes in (("tp",), ("cp",), ("dp",), ("pp",), ("dp", "cp"), ("tp", "pp")):
        expected = sorted(tuple(ranks) for ranks in theirs.get_ranks("-".join(axes)))
        assert sorted(grid.sets(*axes)) == expected
        for ranks in expected if len(axes) == 1 else ():
            assert [grid.coordinate(rank, axes[0]) for rank in ranks] == list(range(len(ranks)))
    assert grid.sets() == tuple((rank,) for rank in range(grid.world_size))


@pytest.fixture
def count_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Ranks each group was made of; the calls themselves go through."""
    calls: list[Any] = []
    for name in ("new_group", "split_group"):
        real = getattr(dist, name)
        monkeypatch.setattr(dist, name, lambda *a, real=real, **k: calls.append((a, k)) or real(*a, **k))
    yield calls
    leave()


def join_alone(parallel: ParallelConfig, *, rank: int, world_size: int) -> Topology:
    """One rank of a world whose other ranks are made up by torch's fake process group."""
    timeout = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore(), timeout=timeout)
    return join(parallel, rank=rank, world_size=world_size, device=torch.device("cpu"))


@pytest.mark.parametrize("world_size", [8, 512, 1024])
@pytest.mark.parametrize(
    ("axes", "most"), [({}, 1), ({"tp": 2, "pp": 2, "cp": 2}, 9), ({"tp": 8}, 3), ({"pp": 8, "vpp": 2}, 5)]
)
def test_a_rank_makes_few_groups_in_a_world_of_any_size(
    count_calls: list[Any], world_size: int, axes: dict[str, int], most: int
) -> None:
    parallel = ParallelConfig(**axes, collective_timeout_seconds=SECONDS)
    topology = join_alone(parallel, rank=world_size - 1, world_size=world_size)
    assert len(count_calls) <= most <= MOST_CALLS
    for _, options in count_calls:
        assert options["timeout"] == datetime.timedelta(seconds=SECONDS) and "backend" not in options
    assert topology.grid == {"vpp": 1, "cp": 1, "tp": 1, "pp": 1} | axes | {"dp": topology.dp}
    assert dist.get_process_group_ranks(topology.shard_group)[-1] == world_size - 1
    assert len(dist.get_process_group_ranks(topology.model_group)) == topology.tp * topology.pp
    again = join(parallel, rank=world_size - 1, world_size=world_size, device=torch.device("cpu"))
    assert again.groups.pp is topology.groups.pp and again.shard_group is topology.shard_group
    assert len(count_calls) <= most


def test_cuts_that_are_alike_share_a_group(count_calls: list[Any]) -> None:
    topology = join_alone(ParallelConfig(tp=2), rank=5, world_size=8)
    assert topology.shard_group is topology.groups.dp and topology.groups.cp is topology.groups.pp
    assert topology.model_group is topology.groups.tp
    assert topology.groups.ep.size() == 1 and topology.embedding_group is None
    with pytest.raises(GridError, match=r"is on the grid \{'tp': 2, .*'dp': 4.* and cannot join .*'tp': 4"):
        join(ParallelConfig(tp=4), rank=5, world_size=8, device=torch.device("cpu"))
    leave()
    overlapping = join_alone(ParallelConfig(cp=8), rank=5, world_size=8)
    assert overlapping.groups.cp is not overlapping.shard_group is dist.group.WORLD
    leave()
    assert join_alone(ParallelConfig(), rank=0, world_size=8).shard_group is dist.group.WORLD


def test_inner_stages_are_in_no_embedding_group(count_calls: list[Any]) -> None:
    ranks = {}
    for rank in range(4):
        group = join_alone(ParallelConfig(pp=4), rank=rank, world_size=4).embedding_group
        ranks[rank] = None if group is None else dist.get_process_group_ranks(group)
        leave()
    assert ranks == {0: [0, 3], 1: None, 2: None, 3: [0, 3]}
