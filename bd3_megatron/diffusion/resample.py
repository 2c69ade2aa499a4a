"""Resampling of masks to an interval: the number of masked tokens of a block, given that its fraction lies inside.

Contract: a draw from the binomial law conditioned on the allowed counts; which m tokens are masked is a uniform choice,
made in `corrupt.py`. The estimator is biased; use it to reproduce the paper, not otherwise.
Refuses: intervals that hold no multiple of 1 / S.
Costs: S + 1 numbers a block, in float64.
Source: diffusion.py of kuleshov-group/bd3lms, _resample_q_xt (BD3-LM, arXiv 2503.09573).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bd3_megatron.diffusion.constants import MIN_T
from bd3_megatron.diffusion.noise_level import Interval
from bd3_megatron.errors import RangeError

# beta * S and omega * S are rarely whole in binary: .45 * 20 must count as 9.
_ROUNDING = 1e-9


def allowed_counts(interval: Interval, block_size: int) -> tuple[int, int]:
    """The smallest and the largest number of masked tokens whose fraction lies inside, bounds included.

    Args:
        interval: of the masked fraction; its end at MIN_T or 1 is not enforced.
        block_size: S.

    Returns:
        (low, high), 0 <= low <= high <= S.

    Raises:
        RangeError: no multiple of 1 / S lies inside.
    """
    low, high = _counts(interval, block_size)
    if low > high:
        raise RangeError(
            f"interval [{interval.beta:g}, {interval.omega:g}] holds no multiple of 1/{block_size}, so no mask of "
            f"block_size={block_size} lies inside; widen it or switch resampling off."
        )
    return low, high


def has_allowed_count(interval: Interval, block_size: int) -> bool:
    """Whether any mask of a block lies inside, so that `allowed_counts` answers."""
    low, high = _counts(interval, block_size)
    return low <= high


def inside_probability(probability: Tensor, block_size: int, interval: Interval) -> Tensor:
    """P(the masked fraction of a block lies inside the interval).

    Args:
        probability: float tensor, any shape, in (0, 1]: the chance of masking a token.
        block_size: S.
        interval: as in `allowed_counts`.

    Returns:
        float64 of the same shape, in (0, 1].

    Raises:
        RangeError: no multiple of 1 / S lies inside.
    """
    low, high = allowed_counts(interval, block_size)
    return _log_binomial(probability, block_size)[..., low : high + 1].logsumexp(dim=-1).exp().clamp(max=1.0)


def conditional_count(uniform: Tensor, probability: Tensor, block_size: int, interval: Interval) -> Tensor:
    """How many tokens of a block are masked, given that the fraction lies inside the interval.

    Args:
        uniform: float64 tensor in [0, 1), one draw a block.
        probability: float tensor of the same shape, in (0, 1].
        block_size: S.
        interval: as in `allowed_counts`.

    Returns:
        int64 of the same shape, in the allowed counts.

    Raises:
        RangeError: no multiple of 1 / S lies inside.
    """
    low, high = allowed_counts(interval, block_size)
    # The paper redraws the mask at the same t until its fraction lies inside. The same law is drawn here from one
    # uniform number: no loop, no block that never ends, and a function of its counter like every other draw.
    mass = _log_binomial(probability, block_size)[..., low : high + 1].softmax(dim=-1)
    below = mass.cumsum(dim=-1)[..., :-1]
    # The loss weight is not changed, hence the bias: under the log-linear schedule E[masked * weight] is off by
    # +18.6 % at S = 4 on [.3, .8], -3.5 % at S = 4 on [.45, .95], +1.4 % and +4.1 % at S = 16 on the same two.
    return low + (uniform[..., None] >= below).sum(dim=-1)


def _counts(interval: Interval, block_size: int) -> tuple[int, int]:
    # As in the official code, bounds equal to MIN_T and 1 are not enforced.
    low = 0 if interval.beta <= MIN_T else math.ceil(interval.beta * block_size - _ROUNDING)
    high = block_size if interval.omega >= 1.0 else math.floor(interval.omega * block_size + _ROUNDING)
    return low, high


def _log_binomial(probability: Tensor, block_size: int) -> Tensor:
    """log P(m of S tokens are masked), m = 0..S in a new last dim, float64."""
    p = probability.to(torch.float64)[..., None]
    m = torch.arange(block_size + 1, dtype=torch.float64, device=p.device)
    ways = math.lgamma(block_size + 1) - torch.lgamma(m + 1) - torch.lgamma(block_size - m + 1)
    # xlogy and xlog1py are 0 where their first argument is 0, so p = 1 gives no NaN.
    return ways + torch.special.xlogy(m, p) + torch.special.xlog1py(block_size - m, -p)
