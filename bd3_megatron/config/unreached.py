"""Settings that a configuration names and that the run ends too early for, or that nothing in it makes use of.

Such a run is legal and may be meant (a short trial of a long configuration), so launchers say it and do not refuse it.
Phases and mixture stages that would never train are refused in `validate_run.py`. Arithmetic on a run from step 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from bd3_megatron.config.budget import batch_size_at, budget_setting, phase_spans, total_steps
from bd3_megatron.config.schema import Config, LogConfig
from bd3_megatron.errors import counted, shown


def unreached_settings(config: Config) -> list[str]:
    """What was asked for and will not happen, each as a sentence with both numbers.

    Args:
        config: validated.
    """
    return [
        *_unreached_rates(config),
        *_unreached_batch(config),
        *_unreached_measures(config),
        *_unreached_checkpoints(config),
    ]


def _unreached_rates(config: Config) -> Iterator[str]:
    optim, steps = config.optim, _steps(config)
    # the last update is the one from state steps - 1, and it has the rate lr x steps / warmup_steps
    if optim.warmup_steps > steps:
        reached = optim.lr * steps / optim.warmup_steps
        ends = f"the learning rate ends at {reached:.3g} of {optim.lr:g}"
        yield f"optim.warmup_steps={optim.warmup_steps} {_beyond(config)}: {ends}"
    if optim.min_lr_ratio > 0 and optim.schedule in ("constant", "inverse_sqrt"):
        yield f"optim.min_lr_ratio={optim.min_lr_ratio:g} has no effect with optim.schedule={optim.schedule}"
    for number, (phase, (first, end)) in enumerate(zip(config.diffusion.phases, phase_spans(config), strict=True)):
        length = min(end, steps) - first
        if phase.lr_warmup_steps > length:
            yield (
                f"diffusion.phases[{number}].lr_warmup_steps={phase.lr_warmup_steps} is more than the "
                f"{counted(length, 'step')} that the phase has: its warm-up "
                f"ends at {length / phase.lr_warmup_steps:.0%} of the rate"
            )


def _unreached_batch(config: Config) -> Iterator[str]:
    train, steps = config.train, _steps(config)
    last = batch_size_at(train, steps - 1)
    if last < train.global_batch_size:
        yield (
            f"train.batch_warmup_steps={train.batch_warmup_steps} {_beyond(config)}: the batch ends at {last} of "
            f"{counted(train.global_batch_size, 'sequence')}"
        )


def _unreached_measures(config: Config) -> Iterator[str]:
    evaluate, log, steps = config.evaluate, config.log, _steps(config)
    # an evaluation at the end stands for the one that would have come
    if evaluate.every_steps > steps and not evaluate.at_start_and_end:
        yield f"evaluate.every_steps={evaluate.every_steps} {_beyond(config)}: nothing is evaluated"
    if config.diffusion.search_every_steps:
        yield from _unreached_searches(config)
    # nobody asked for the default, and the last step is recorded anyway
    if log.every_steps > steps and log.every_steps != LogConfig.every_steps:
        yield f"log.every_steps={log.every_steps} {_beyond(config)}: only the last step is recorded"
    late = [step for step in log.profile_steps if step > steps]
    if late:
        yield f"log.profile_steps={shown(late)} {_beyond(config)}: no trace of them is written"


def _unreached_searches(config: Config) -> Iterator[str]:
    diffusion, steps, every = config.diffusion, _steps(config), config.diffusion.search_every_steps
    spans = phase_spans(config) or [(0, steps)]
    searched = diffusion.phases or (None,)
    wanted: dict[int, bool] = {}
    for phase, (first, end) in zip(searched, spans, strict=True):
        if phase is not None and phase.interval is not None:
            continue
        size = diffusion.block_size if phase is None else phase.block_size
        # the last multiple before the phase's and the run's last state, after which no batch is left that it could serve
        last = (min(end, steps) - 1) // every * every
        wanted[size] = wanted.get(size, False) or last >= max(first, every)
    for size, is_reached in wanted.items():
        if not is_reached:
            yield (
                f"diffusion.search_every_steps={every} meets no step of block size {size} in a run of {counted(steps, 'step')} "
                f"({budget_setting(config.train)}): its noise interval is never searched"
            )


def _unreached_checkpoints(config: Config) -> Iterator[str]:
    checkpoint, steps = config.checkpoint, _steps(config)
    keep, every = checkpoint.keep_every_steps, checkpoint.every_steps
    # saved are the multiples of every_steps and the end
    is_kept = keep and (steps % keep == 0 or (every and math.lcm(keep, every) <= steps))
    if keep and checkpoint.keep_last and not is_kept:
        yield (
            f"checkpoint.keep_every_steps={keep} meets no saved step in a run of {counted(steps, 'step')} "
            f"({budget_setting(config.train)}, checkpoint.every_steps={every}): no checkpoint is kept for it"
        )
    if config.train.spike_action == "rollback" and every >= steps:
        yield (
            f"train.spike_action=rollback has nothing to return to, since checkpoint.every_steps={every} {_beyond(config)}: "
            "the batch of a spike is left out"
        )


def _steps(config: Config) -> int:
    return total_steps(config.train, config.data.seq_len)


def _beyond(config: Config) -> str:
    return f"is not reached in a run of {counted(_steps(config), 'step')} ({budget_setting(config.train)})"
