"""Interval search: the clipped interval under which one block's loss estimate varies least, from shared forward passes.

Contract: the winner has the smallest variance of `token_nll.block_losses`, over data and noise; all candidates are
scored from the same passes, and batches and ranks may be merged in any grouping.
Costs: C numbers a block, no forward pass of its own. The official search runs 36 candidates x 100 batches apart.
Source: BD3-LM (arXiv 2503.09573), variance of the gradient estimator under clipped schedules; West, "Updating mean and
variance estimates", CACM 1979, and Chan, Golub, LeVeque 1979 for the merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bd3_megatron.diffusion.constants import MIN_T, SEARCH_WIDTHS
from bd3_megatron.diffusion.noise_level import Interval
from bd3_megatron.diffusion.noise_schedule import NoiseSchedule
from bd3_megatron.diffusion.resample import allowed_counts, has_allowed_count, inside_probability
from bd3_megatron.errors import RangeError, check_shape

FULL = Interval(MIN_T, 1.0)
FULL_MASKING = Interval(1.0, 1.0)


@dataclass(frozen=True)
class Moments:
    """Weighted moments of each of C candidates' block losses; all fields float64 [C]."""

    weight: Tensor
    """Sum of weights; without resampling the number of blocks."""
    squared_weight: Tensor
    """Sum of squared weights."""
    mean: Tensor
    """Weighted mean, 0 where nothing was seen."""
    squared_deviation: Tensor
    """Weighted sum of squared deviations from the mean."""

    @classmethod
    def none(cls, num_candidates: int, device: torch.device | str = "cpu") -> Moments:
        """Moments of no block at all: the neutral element of `merge`."""
        return cls.unpack(torch.zeros(4, num_candidates, dtype=torch.float64, device=device))

    @classmethod
    def of(cls, value_X: Tensor, weight_CX: Tensor) -> Moments:
        """Moments of X values under each candidate's weights (>= 0)."""
        # float64: sums run over many thousand blocks, and the variances of two candidates may be close.
        value_X, weight_CX = value_X.to(torch.float64), weight_CX.to(torch.float64)
        weight = weight_CX.sum(dim=1)
        mean = torch.where(weight > 0, (weight_CX * value_X).sum(dim=1) / weight.clamp(min=1e-300), 0.0)
        deviation = (weight_CX * (value_X - mean[:, None]) ** 2).sum(dim=1)
        return cls(weight, (weight_CX**2).sum(dim=1), mean, deviation)

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of blocks together."""
        # Chan, Golub and LeVeque's merge is associative and commutative up to rounding, so any grouping of ranks will
        # do.
        weight = self.weight + other.weight
        share = torch.where(weight > 0, other.weight / weight.clamp(min=1e-300), 0.0)
        step = other.mean - self.mean
        return Moments(
            weight,
            self.squared_weight + other.squared_weight,
            self.mean + step * share,
            self.squared_deviation + other.squared_deviation + step**2 * self.weight * share,
        )

    def variance(self) -> Tensor:
        """Unbiased variance of one block's loss: float64 [C], NaN where fewer than two blocks were seen."""
        # The weighted form of n - 1: with equal weights it is the number of blocks less one.
        freedom = self.weight - self.squared_weight / self.weight
        return torch.where(freedom > 1e-9 * self.weight, self.squared_deviation / freedom, torch.nan)

    def num_effective_blocks(self) -> Tensor:
        """How many equally weighted blocks would say as much: float64 [C]."""
        return torch.where(self.weight > 0, self.weight**2 / self.squared_weight.clamp(min=1e-300), 0.0)

    def pack(self) -> Tensor:
        """As one float64 tensor [4, C], to be gathered (not summed) over ranks."""
        # Means do not add: a sum over ranks of this tensor would be wrong, so ranks gather it and merge.
        return torch.stack([self.weight, self.squared_weight, self.mean, self.squared_deviation])

    @classmethod
    def unpack(cls, packed: Tensor) -> Moments:
        """The inverse of `pack`.

        Raises:
            ShapeError: not [4, C].
        """
        check_shape("packed moments", packed.shape, (4, None))
        return cls(*packed.to(torch.float64).unbind(0))


def candidates(
    block_size: int, widths: Sequence[float] = SEARCH_WIDTHS, custom: Sequence[Interval] = ()
) -> tuple[Interval, ...]:
    """The intervals to compare: the paper's, then the custom ones not among them.

    Args:
        block_size: S; block size 1 compares only [MIN_T, 1] and full masking, plus `custom`.
        widths: of the paper's intervals, each in (0, 1]; they start at 0, .05, .1, ... and end at 1 or before.
        custom: further intervals.

    Returns:
        Distinct intervals; (MIN_T, 1) first.

    Raises:
        RangeError: a width outside (0, 1].
    """
    # A block of one token is either masked or teaches nothing, so only full masking competes with the whole interval.
    found = [FULL, FULL_MASKING] if block_size == 1 else [FULL, *_sliding(widths)]
    return tuple(dict.fromkeys([*found, *custom]))


def passes(intervals: Sequence[Interval]) -> tuple[Interval, ...]:
    """From which intervals noise must be drawn so that every candidate is scored: one pass for all, one a point."""
    # A point interval (full masking at block size 1) is never hit by chance and needs a pass of its own.
    points = [interval for interval in intervals if interval.width == 0]
    return tuple(dict.fromkeys([*([FULL] if len(points) < len(intervals) else []), *points]))


def score(
    loss_BK: Tensor,
    t_BK: Tensor,
    *,
    intervals: Sequence[Interval],
    drawn_from: Interval,
    is_counted_BK: Tensor | None = None,
) -> Moments:
    """Moments of one pass's block losses under every candidate, without resampling.

    Args:
        loss_BK: float [B, K] from `token_nll.block_losses`, of masks that were not resampled.
        t_BK: float [B, K], the levels they were drawn at.
        intervals: C candidates.
        drawn_from: the interval t_BK is uniform on; one of `passes(intervals)`.
        is_counted_BK: bool [B, K], False for blocks of padding; None = all.

    Returns:
        Moments over C candidates; weight 0 for those this pass cannot speak for.

    Raises:
        ShapeError: shapes differ.
    """
    check_shape("loss_BK", loss_BK.shape, t_BK.shape)
    # A t drawn from the full interval that falls inside [beta, omega] is a draw from U[beta, omega], so one pass
    # serves every candidate that holds its t.
    weight_CX = _inside(t_BK.to(loss_BK.device), intervals, drawn_from)
    return _moments(loss_BK, weight_CX, is_counted_BK)


def score_resampled(
    loss_BK: Tensor,
    t_BK: Tensor,
    drawn_BK: Tensor,
    *,
    intervals: Sequence[Interval],
    drawn_from: Interval,
    block_size: int,
    schedule: NoiseSchedule,
    is_counted_BK: Tensor | None = None,
) -> Moments:
    """As `score`, for training that resamples masks to its interval; the pass itself does not resample.

    Args:
        loss_BK, t_BK, intervals, drawn_from, is_counted_BK: as in `score`.
        drawn_BK: int64 [B, K], NoisyBatch.drawn_BK.
        block_size: S.
        schedule: the one the masks were drawn with.

    Returns:
        Moments over C candidates; a candidate that holds no multiple of 1 / S has weight 0 and cannot win.

    Raises:
        ShapeError: shapes differ.
    """
    check_shape("loss_BK", loss_BK.shape, t_BK.shape)
    check_shape("drawn_BK", drawn_BK.shape, t_BK.shape)
    t_BK, drawn_BK = t_BK.to(loss_BK.device), drawn_BK.to(loss_BK.device)
    weight_CX = _inside(t_BK, intervals, drawn_from)
    probability_BK = schedule.mask_probability(t_BK)
    for row_X, interval in zip(weight_CX, intervals, strict=True):
        # Under this candidate training could draw no mask at all.
        if not has_allowed_count(interval, block_size):
            row_X.zero_()
            continue
        low, high = allowed_counts(interval, block_size)
        is_inside_BK = (drawn_BK >= low) & (drawn_BK <= high)
        # Resampling keeps the law of t and conditions only the mask, so a draw counts 1 / P(inside | t).
        odds_BK = is_inside_BK / inside_probability(probability_BK, block_size, interval).clamp(min=1e-300)
        row_X.mul_(odds_BK.flatten())
    return _moments(loss_BK, weight_CX, is_counted_BK)


def least_varying(intervals: Sequence[Interval], moments: Moments, *, min_blocks: float = 2.0) -> int:
    """The candidate whose block loss varies least; of equals the first.

    Args:
        intervals: C candidates.
        moments: over the same, of all passes, batches and ranks.
        min_blocks: candidates that fewer effective blocks speak for are not considered.

    Returns:
        Its index in `intervals`.

    Raises:
        ShapeError: moments of another number of candidates.
        RangeError: no candidate has been seen often enough.
    """
    check_shape("moments", moments.mean.shape, (len(intervals),))
    # Unlike the official search the variance is over all blocks at once, not per batch and summed.
    variance = moments.variance()
    is_known = (moments.num_effective_blocks() >= min_blocks) & variance.isfinite()
    if not bool(is_known.any()):
        raise RangeError(
            f"none of {len(intervals)} intervals was seen in {min_blocks:g} blocks; score more held-out batches."
        )
    # argmin takes the first of equals, so ranks that merged the same moments choose the same interval.
    return int(torch.where(is_known, variance, torch.inf).argmin())


def _sliding(widths: Sequence[float]) -> list[Interval]:
    intervals = []
    for width in widths:
        if not 0.0 < width <= 1.0:
            raise RangeError(f"search width {width:g} is outside (0, 1]; use widths such as 0.5.")
        # Twentieths are counted, not added up, so that every end is the float nearest to its decimal.
        for twentieth in range(int((1.0 - width) * 20 + 1e-9) + 1):
            start = twentieth / 20
            intervals.append(Interval(max(start, MIN_T), min(round(start + width, 9), 1.0)))
    return intervals


def _inside(t_BK: Tensor, intervals: Sequence[Interval], drawn_from: Interval) -> Tensor:
    """1 where a draw counts for a candidate: float64 [C, B * K]."""
    rows = []
    for interval in intervals:
        within = drawn_from.beta <= interval.beta and interval.omega <= drawn_from.omega
        # Points speak only for themselves: a t that equals 1 by chance was drawn from another law.
        speaks = interval == drawn_from if 0.0 in (interval.width, drawn_from.width) else within
        rows.append(interval.holds(t_BK).flatten() & speaks)
    return torch.stack(rows).to(torch.float64)


def _moments(loss_BK: Tensor, weight_CX: Tensor, is_counted_BK: Tensor | None) -> Moments:
    if is_counted_BK is not None:
        check_shape("is_counted_BK", is_counted_BK.shape, loss_BK.shape)
        weight_CX = weight_CX * is_counted_BK.flatten().to(weight_CX.device)
    return Moments.of(loss_BK.flatten(), weight_CX)
