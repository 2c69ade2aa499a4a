"""One rank that was asked to stop stops them all, at the same step and for the same reason."""

from __future__ import annotations

import signal

import torch

from bd3_megatron.config.schema import ParallelConfig
from bd3_megatron.parallel.topology import Topology
from bd3_megatron.process.stop import StopRequest
from tests.ranks.harness import run_ranks


def test_one_rank_asked_is_all_ranks_told() -> None:
    def on_rank(topology: Topology) -> list[str | None]:
        stop = StopRequest()
        stop.install()
        stop.ask(torch.device("cpu"))
        found = [stop.agreed()]
        if topology.rank == 1:
            signal.raise_signal(signal.SIGUSR1)
        stop.ask(torch.device("cpu"))
        found.append(stop.agreed())
        return found

    assert run_ranks(on_rank, ParallelConfig(dp=3)) == [[None, "signal"]] * 3
