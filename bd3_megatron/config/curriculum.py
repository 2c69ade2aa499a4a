"""The curriculum that a configuration asks for: the one answer to which phase an update belongs to.

The run's plan, the evaluation of a state and the converters ask here. Imports torch through `Interval`, so launchers and
validation, which need lengths only, ask `budget.py`.
"""

from __future__ import annotations

from bd3_megatron.config.budget import phase_steps, total_steps
from bd3_megatron.config.objective import axes_of, objective_of
from bd3_megatron.config.schema import Config, PhaseConfig
from bd3_megatron.diffusion.curriculum import Curriculum, LrSegment, Phase
from bd3_megatron.diffusion.noise_level import Interval


def curriculum_of(config: Config, *, num_steps: int | None = None) -> Curriculum:
    """The phases of a run; one where the configuration names none.

    Args:
        config: the run.
        num_steps: updates of the run, where a resumed run's budget says otherwise than its configuration does.

    Raises:
        ConfigError: phases that end before the run, or a block size that does not divide seq_len.
    """
    diffusion, train, seq_len = config.diffusion, config.train, config.data.seq_len
    phases: list[Phase] = []
    first = 0
    for phase in diffusion.phases:
        steps = phase_steps(train, seq_len, phase, first)
        phases.append(_phase(config, phase, steps))
        first += steps or 0
    if not phases:
        size = objective_of(config).block_size
        interval = Interval(*diffusion.interval_at(size))
        phases = [Phase(block_size=size, interval=interval, axes=axes_of(config, None))]
    return Curriculum(tuple(phases), total_steps(train, seq_len) if num_steps is None else num_steps, seq_len)


def _phase(config: Config, phase: PhaseConfig, steps: int | None) -> Phase:
    return Phase(
        block_size=phase.block_size,
        steps=steps,
        interval=Interval(*(phase.interval or config.diffusion.interval_at(phase.block_size))),
        axes=axes_of(config, phase),
        lr=LrSegment(start=phase.lr_start, end=phase.lr_end, warmup_steps=phase.lr_warmup_steps),
    )
