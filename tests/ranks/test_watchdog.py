"""A rank that does not come to a collective is named, with its line of code, and every rank ends."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bd3_megatron.config.schema import ParallelConfig, WatchConfig
from bd3_megatron.parallel.topology import Topology
from bd3_megatron.process.stop import StopRequest
from bd3_megatron.process.watchdog import Watchdog, straggler_metrics
from tests.ranks.harness import run_ranks

LIMIT_SECONDS = 2.0


def watched(folder: Path, topology: Topology) -> Watchdog:
    os.environ["SLURMD_NODENAME"] = f"node{topology.rank}"
    watch = WatchConfig(hang_factor=1.0, hang_seconds=LIMIT_SECONDS)
    return Watchdog(watch, folder, rank=topology.rank, world_size=topology.world_size)


def reads_of_reports(topology: Topology, folder: Path) -> None:
    """From here on this rank notes every report that it reads."""
    read = Path.read_text

    def noted(self: Path, *args: Any, **options: Any) -> str:
        if self.name.startswith("rank-") and self.suffix == ".json":
            with (folder / f"reads-{topology.rank}").open("a") as file:
                file.write("x")
        return read(self, *args, **options)

    Path.read_text = noted  # type: ignore[method-assign]


def test_a_rank_that_does_not_enter_a_collective_is_named_with_its_stack(tmp_path: Path) -> None:
    def on_rank(topology: Topology) -> None:
        watchdog = watched(tmp_path, topology)
        reads_of_reports(topology, tmp_path)
        with watchdog.watching(0):
            for step in range(1, 4):
                if step == 3 and topology.rank == 1:
                    threading.Event().wait()
                StopRequest().ask(topology.device)
                watchdog.step_done(step)

    with pytest.raises(AssertionError, match="rank"):
        run_ranks(on_rank, ParallelConfig(dp=3))
    found = json.loads((tmp_path / "status.json").read_text())
    assert found["status"] == "hung" and found["step"] == 2
    assert "after step 2 (limit 2 s): rank 1 (node node1) is in no collective" in found["reason"]
    assert found["reason"].endswith("the others wait in all_reduce")
    # rank 0 reads one report a rank, the others none
    assert [file.name for file in tmp_path.glob("reads-*")] == ["reads-0"]
    assert (tmp_path / "reads-0").stat().st_size == 3
    stacks = [(tmp_path / f"logs/hang/rank-{rank}.txt").read_text() for rank in range(3)]
    assert "wait" in stacks[1] and all("in ask" in stacks[rank] for rank in (0, 2))


def test_a_stopped_rank_is_named_by_its_silence(tmp_path: Path) -> None:
    def on_rank(topology: Topology) -> None:
        (tmp_path / f"pid-{topology.rank}").write_text(str(os.getpid()))
        watchdog = watched(tmp_path, topology)
        with watchdog.watching(0):
            if topology.rank == 0:
                os.kill(os.getpid(), signal.SIGSTOP)
            dist.barrier()

    with pytest.raises(AssertionError, match="did not end in time: \\[0\\]"):
        run_ranks(on_rank, ParallelConfig(dp=2), timeout=40)
    assert "rank 0 does not answer any more" in json.loads((tmp_path / "status.json").read_text())["reason"]


def test_the_slowest_rank_is_in_the_record() -> None:
    def on_rank(topology: Topology) -> tuple[dict[str, float], dict[str, float]]:
        own = {"time/forward_seconds": 1.0 + topology.rank, "time/backward_seconds": 1.0}
        device = torch.device("cpu")
        return straggler_metrics(own, device)(), straggler_metrics(own if topology.rank else {}, device)()

    assert (
        run_ranks(on_rank, ParallelConfig(dp=3))
        == [({"time/slowest_rank": 2, "time/slowest_over_median": 4.0 / 3.0}, {})] * 3
    )
