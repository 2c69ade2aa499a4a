"""Noise schedules: how likely a token is masked at noise level t, and how much its loss weighs.

With p(t) = 1 - alpha(t) the probability that a token is masked, the bound on the likelihood is
    NELBO = E_t E_mask [ sum over masked tokens of  p'(t) / p(t) * -log p_theta(token) ],   t uniform.
Refuses: unknown names, t outside [MIN_T, 1].
Source: BD3-LM (arXiv 2503.09573), noise schedules; noise_schedule.py of kuleshov-group/bd3lms, without the eps that its
cosine adds to both formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bd3_megatron.diffusion.constants import MIN_T
from bd3_megatron.errors import RangeError, either


@dataclass(frozen=True)
class NoiseSchedule:
    """One row of the table SCHEDULES below."""

    name: str
    probability_law: Callable[[Tensor], Tensor]
    weight_law: Callable[[Tensor], Tensor]

    def mask_probability(self, t: Tensor) -> Tensor:
        """p(t), the probability that a token is masked.

        Args:
            t: float tensor, any shape, in [MIN_T, 1].

        Returns:
            Tensor of t's shape and dtype, in (0, 1].

        Raises:
            RangeError: t outside [MIN_T, 1].
        """
        check_noise_level(t)
        return self.probability_law(t)

    def loss_weight(self, t: Tensor) -> Tensor:
        """p'(t) / p(t), the weight of a masked token's NLL.

        Args:
            t: float tensor, any shape, in [MIN_T, 1].

        Returns:
            Tensor of t's shape and dtype, positive.

        Raises:
            RangeError: t outside [MIN_T, 1].
        """
        check_noise_level(t)
        return self.weight_law(t)


def noise_schedule(name: str) -> NoiseSchedule:
    """The schedule of that name.

    Raises:
        RangeError: no schedule has this name.
    """
    for schedule in SCHEDULES:
        if schedule.name == name:
            return schedule
    names = either(schedule.name for schedule in SCHEDULES)
    raise RangeError(f"noise_schedule={name!r} is not known; use {names}.")


def check_noise_level(t: Tensor) -> None:
    """Refuse noise levels outside [MIN_T, 1] (NaN included).

    Raises:
        RangeError: with the offending extremes.
    """
    # This reads t back, which makes a GPU wait; t has one number a block, so callers keep it on the CPU.
    if t.numel() == 0 or bool(((t >= MIN_T) & (t <= 1.0)).all()):
        return
    raise RangeError(
        f"t reaches from {t.min().item():g} to {t.max().item():g}, outside [{MIN_T:g}, 1]; "
        f"clip it there (every loss weight diverges at t = 0)."
    )


# name, p(t), weight = p'(t) / p(t). All have p(1) = 1. Every weight diverges at t = 0, hence t starts at MIN_T; p *
# weight = p' is what must stay bounded.
SCHEDULES = (
    NoiseSchedule("loglinear", lambda t: t.clone(), lambda t: 1.0 / t),
    NoiseSchedule(
        "cosine",
        # 1 - cos(x) = 2 sin(x / 2)^2 keeps its digits near t = 0, where the difference loses them.
        lambda t: 2.0 * torch.sin(math.pi / 4 * t) ** 2,
        lambda t: (math.pi / 2) / torch.tan(math.pi / 4 * t),
    ),
    NoiseSchedule("square", lambda t: t * t, lambda t: 2.0 / t),
    NoiseSchedule("sqrt", lambda t: torch.sqrt(t), lambda t: 0.5 / t),
    NoiseSchedule(
        "log",
        # p = log2(1 + t); log1p keeps the digits of a small t.
        lambda t: torch.log1p(t) / math.log(2.0),
        lambda t: 1.0 / ((1.0 + t) * torch.log1p(t)),
    ),
)
