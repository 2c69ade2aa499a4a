"""The objective that a configuration asks for, at the block size of one of its phases. Torch-free."""

from __future__ import annotations

from bd3_megatron.config.schema import Config, PhaseConfig
from bd3_megatron.diffusion.axes import ObjectiveAxes
from bd3_megatron.diffusion.objective import Objective, objective_named


def objective_of(config: Config, *, block_size: int | None = None) -> Objective:
    """The objective of a run, with the axes of the phase that the run starts with.

    Args:
        config: the run.
        block_size: S of a phase; None: the phase that the run starts with.

    Raises:
        ConfigError: axes that contradict each other.
    """
    diffusion = config.diffusion
    start = diffusion.phases[0] if diffusion.phases else None
    first = diffusion.block_size if start is None else start.block_size
    return objective_named(
        diffusion.objective,
        block_size=first if block_size is None else block_size,
        views=diffusion.views,
        axes=axes_of(config, start),
    )


def axes_of(config: Config, phase: PhaseConfig | None) -> ObjectiveAxes:
    """The axes of a phase; None: of a run without phases.

    Raises:
        ConfigError: axes that contradict each other.
    """
    own = None if phase is None else phase.axes
    return (config.diffusion.axes if own is None else own).axes()


def block_sizes(config: Config) -> list[int]:
    """Every block size the run trains at, in the order of its phases."""
    phases = [phase.block_size for phase in config.diffusion.phases]
    return phases or [objective_of(config).block_size]
