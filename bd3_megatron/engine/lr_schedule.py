"""Learning rate as a function of the step: warm-up, then constant, cosine, stable/decay or inverse square root.

Decides: step n (0-based) of the warm-up uses lr (n + 1) / warmup_steps, so no update is wasted at rate 0 (the official
code's first one is). Arithmetic on numbers only; phases of a curriculum multiply it by their own factor.
Source: wsd as in MiniCPM (arXiv 2404.06395); inverse square root as in T5.
"""

from __future__ import annotations

import math

from bd3_megatron.config.schema import OptimConfig


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """The rate used by the update from step `step` to `step + 1`.

    Args:
        config: optim section.
        step: updates made so far, >= 0.
        total_steps: of the run; cosine and wsd end there.
    """
    if step < config.warmup_steps:
        # n + 1 and not n: the official code's first update is made at rate 0 and learns nothing.
        return config.lr * (step + 1) / config.warmup_steps
    return config.lr * _after_warmup(config, step, total_steps)


def _after_warmup(config: OptimConfig, step: int, total_steps: int) -> float:
    floor = config.min_lr_ratio
    if config.schedule == "cosine":
        done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    if config.schedule == "wsd":
        # The decay ends with the run: a longer budget moves it and leaves the stable part alone.
        decay_steps = max(1, round(config.decay_fraction * total_steps))
        left = (total_steps - step) / decay_steps
        return floor + (1 - floor) * min(1.0, max(0.0, left))
    if config.schedule == "inverse_sqrt":
        # Continues the warm-up's last rate without a jump.
        return math.sqrt(max(1, config.warmup_steps) / max(1, step + 1))
    return 1.0
