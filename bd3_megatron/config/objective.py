"""The objective that a configuration asks for, at the block size of one of its phases. Torch-free."""

from __future__ import annotations

from bd3_megatron.config.schema import Config
from bd3_megatron.diffusion.objective import Objective, objective_named


def objective_of(config: Config, *, block_size: int | None = None) -> Objective:
    """The objective of a run.

    Args:
        config: the run.
        block_size: S of a phase; None: the phase that the run starts with.
    """
    diffusion = config.diffusion
    first = diffusion.phases[0].block_size if diffusion.phases else diffusion.block_size
    return objective_named(
        diffusion.objective,
        block_size=first if block_size is None else block_size,
        views=diffusion.views,
        count_all_tokens=diffusion.count_all_tokens,
    )


def block_sizes(config: Config) -> list[int]:
    """Every block size the run trains at, in the order of its phases."""
    phases = [phase.block_size for phase in config.diffusion.phases]
    return phases or [objective_of(config).block_size]
