"""Noise is data, and data is a function: every rank of every grid computes the same noisy sample, bit for bit."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from bd3_megatron.data.sampler import BatchShare
from bd3_megatron.diffusion.noise_level import Interval
from bd3_megatron.diffusion.objective import BlockDiffusion
from bd3_megatron.parallel.pair_split import pair_layout
from bd3_megatron.parallel.topology import Topology
from bd3_megatron.train.batches import StepBatches
from bd3_megatron.train.plan import RunPlan
from tests.ranks.harness import run_ranks
from tests.ranks.parity import MASK_ID, job_config
from tests.unit.train.samples import Samples, SourceRows, rows_by_place

GRIDS: list[tuple[dict[str, Any], int, bool]] = [
    ({"dp": 2}, 2, False),
    ({"tp": 2, "sequence_parallel": True}, 4, False),
    ({"pp": 2}, 1, False),
    ({"cp": 2, "dp": 2}, 2, False),
    ({"pp": 2, "dp": 2}, 2, True),
]
"""Axes, micro-batch size, whether masks are resampled to the interval."""
STEPS, FIRST = 2, 3


def on_rank(parallel: dict[str, Any], micro: int, *, resample: bool) -> Any:
    config = job_config(
        parallel=parallel,
        train={"micro_batch_size": micro, "steps": 9},
        diffusion={"block_size": 4, "resample": resample},
    )
    interval = Interval(0.3, 0.8)

    def run(topology: Topology) -> tuple[dict[Any, Any], dict[Any, Any], int]:
        plan = RunPlan(config)
        batches = StepBatches(SourceRows(Samples()), plan, topology, first_step=FIRST, mask_id=MASK_ID, num_workers=0)
        # every row, also the dead ones that a rank without cp may leave out
        layout = pair_layout(
            BlockDiffusion(block_size=4),
            length=config.data.seq_len,
            cp=topology.cp,
            cp_rank=topology.cp_rank,
            drop_last_clean=False,
        )
        share = BatchShare(global_batch_size=8, micro_batch_size=micro, dp=topology.dp, dp_rank=topology.dp_rank)
        tokens, noise, masked = {}, {}, 0
        for step in range(FIRST, FIRST + STEPS):
            batch = batches.next(step, layout, interval)
            masked += batch.masked_count
            for micro_batch, index_B in zip(batch.micro_batches, share.step(plan.samples_before(step)), strict=True):
                found = rows_by_place(micro_batch, index_B, layout)
                tokens |= found[0]
                noise |= found[1]
        return tokens, noise, masked

    return run_ranks(run, config.parallel)


@functools.cache
def on_one(resample: bool) -> Any:
    return on_rank({}, 1, resample=resample)[0]


@pytest.mark.parametrize(("parallel", "micro", "resample"), GRIDS, ids=str)
def test_noise_is_the_same_on_every_grid(parallel: dict[str, Any], micro: int, resample: bool) -> None:
    tokens, noise, masked = on_one(resample)
    together: dict[Any, Any] = {}
    for rank_tokens, rank_noise, rank_masked in on_rank(parallel, micro, resample=resample):
        # every rank alone: what it holds is what one process holds there
        assert rank_tokens.items() <= tokens.items()
        assert rank_noise.items() <= noise.items()
        assert 0 < rank_masked <= masked
        together |= rank_noise
    assert together == noise
    assert len(noise) == masked > 0
