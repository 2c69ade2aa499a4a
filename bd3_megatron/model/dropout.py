"""Dropout's random state, set anew at every step: a run is reproducible on its grid, and after a resume.

Decides: the state follows from (seed, step, data-parallel rank, stage), so replicas drop different channels. Ranks of
one tensor-parallel group share it outside sequence-parallel regions, where their rows are equal, and differ inside,
where their rows differ: megatron's tracker sees to that. Recomputation restores the state through the same tracker.
Draws depend on the shapes a rank sees, so equality across grids is claimed at dropout 0 only.
"""

from __future__ import annotations

from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from bd3_megatron.parallel.topology import Topology
from bd3_megatron.rng import Purpose, generator_seed


def seed_dropout(seed: int, step: int, topology: Topology) -> None:
    """Set megatron's tracker (and the default state) for one step.

    Args:
        seed: run.seed.
        step: updates made so far.
        topology: this rank's coordinates in the grid.
    """
    # By replica and stage: replicas must drop different channels, and stages are different layers.
    coordinates = f"step {step} dp {topology.dp_rank} pp {topology.pp_rank}"
    # megatron adds the tp rank and keeps 32 bits of what torch takes
    model_parallel_cuda_manual_seed(generator_seed(seed, Purpose.DROPOUT, coordinates) % 2**31)
