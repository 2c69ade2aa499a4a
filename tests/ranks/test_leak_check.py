"""Context-parallel ranks examine together what each of them sees; a leak on one of them stops all."""

from __future__ import annotations

import pytest
import torch

from bd3_megatron.attention.select import named
from bd3_megatron.errors import LeakError
from bd3_megatron.parallel.topology import Topology
from bd3_megatron.train.doctor import diagnose_together
from tests.ranks.harness import run_ranks
from tests.unit.cost.cases import case
from tests.unit.train.leaks import planted


@pytest.mark.parametrize("packing", ["wrap", "isolated"])
def test_ranks_that_share_rows_examine_together(packing: str) -> None:
    config = case(
        model={"hidden_size": 128},
        parallel={"cp": 2},
        data={"packing": packing},
        diffusion={"views": 2},
        train={"micro_batch_size": 2},
    )
    leak = "the second chunk of a context-parallel rank leaks"

    def on_rank(topology: Topology) -> tuple[str, str]:
        said = diagnose_together(config, {4: named("structured")}, topology, torch.float32)
        mine = planted(leak, "structured") if topology.cp_rank == 1 else named("structured")
        with pytest.raises(LeakError) as caught:
            diagnose_together(config, {4: mine}, topology, torch.float32)
        return said, str(caught.value)

    (said, first), (_, second) = run_ranks(on_rank, config.parallel)
    assert said.startswith("no leak: block_size=4 by structured/cpu, over 32 positions")
    # rank 1 holds positions 8 to 24 of both streams
    assert first == second and "block_size=4:\n  noisy block 4 of view 0: clean block 4 influences it" in first
