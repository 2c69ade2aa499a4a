"""Mixtures of sources by weight: which source sample i comes from, and how many it gave before, in closed form.

Contract: weights become a repeating pattern in which every prefix gives each source its exact share to less than one
sample. Stages begin at given indices; counts carry over. Nothing is drawn and nothing is stored.
Refuses: negative weights, weights that are all zero, stages out of order.
Source: Tijdeman, "The chairman assignment problem", Discrete Mathematics 32, 1980.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from bd3_megatron.data.packing import Ints
from bd3_megatron.errors import ConfigError

# Positions of the pattern. Weights are exact where their fractions have a common denominator of at most this, else
# they are rounded to multiples of 1 / MAX_PATTERN.
MAX_PATTERN = 1 << 16
# Weights are typed as decimals: four digits after the point become exact fractions.
_MAX_DENOMINATOR = 10_000


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Weights that hold from an index on."""

    start: int
    """First sample index, in the order of consumption, of the stage."""
    weights: tuple[float, ...]
    """One weight a source, 0 or more; only their ratios matter."""


@dataclass
class Mixture:
    """Where sample i comes from."""

    stages: Sequence[Stage]
    num_sources: int = field(init=False)
    _patterns: list[_Pattern] = field(init=False, repr=False)
    _counts_before: Ints = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check(self.stages)
        self.num_sources = len(self.stages[0].weights)
        self._patterns = [_Pattern(stage.weights) for stage in self.stages]
        counts = np.zeros((len(self.stages), self.num_sources), dtype=np.int64)
        for number in range(1, len(self.stages)):
            length = self.stages[number].start - self.stages[number - 1].start
            # A source goes on where the stage before left it: no row is repeated or skipped at a change of weights.
            counts[number] = counts[number - 1] + self._patterns[number - 1].counts(np.asarray([length]))[0]
        self._counts_before = counts

    @staticmethod
    def of(weights: Sequence[float]) -> Mixture:
        """A mixture with the same weights from beginning to end."""
        return Mixture([Stage(start=0, weights=tuple(weights))])

    def locate(self, index: Ints) -> tuple[Ints, Ints]:
        """Source and count of samples.

        Args:
            index: int64 [B], sample indices in the order of consumption, 0 or more.

        Returns:
            source int64 [B], and how many samples of that source came before: int64 [B].
        """
        # One source needs no pattern, and this is the path of every batch of a plain run.
        if self.num_sources == 1:
            return np.zeros_like(index), index
        starts = np.asarray([stage.start for stage in self.stages], dtype=np.int64)
        stage_of = np.searchsorted(starts, index, side="right") - 1
        source, count = np.zeros_like(index), np.zeros_like(index)
        for stage in np.unique(stage_of).tolist():
            chosen = stage_of == stage
            local_source, local_count = self._patterns[stage].locate(index[chosen] - starts[stage])
            source[chosen] = local_source
            count[chosen] = local_count + self._counts_before[stage][local_source]
        return source, count


class _Pattern:
    """One repeating pattern: source of every position, and counts before it."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.shares = apportion(weights)
        self.period = int(self.shares.sum())
        self.places = chairman(self.shares)
        steps = self.places[:, None] == np.arange(len(self.shares))
        # Counts before each position of the pattern: with them any index is located without a walk.
        self.before = np.concatenate([np.zeros((1, len(self.shares)), dtype=np.int64), np.cumsum(steps, axis=0)])

    def locate(self, index: Ints) -> tuple[Ints, Ints]:
        turn, place = np.divmod(index, self.period)
        source = self.places[place]
        return source, turn * self.shares[source] + self.before[place, source]

    def counts(self, length: Ints) -> Ints:
        turn, place = np.divmod(length, self.period)
        return turn[:, None] * self.shares + self.before[place]


def apportion(weights: Sequence[float]) -> Ints:
    """Whole shares with the weights' ratios: exact where a small common denominator exists, else by largest remainder.

    Args:
        weights: 0 or more, not all 0.

    Returns:
        int64 [num_sources], sum at most 2^16.

    Raises:
        ConfigError: a positive weight too small to be drawn at all.
    """
    ratios = [Fraction(weight).limit_denominator(_MAX_DENOMINATOR) for weight in weights]
    scale = math.lcm(*(ratio.denominator for ratio in ratios))
    whole = [int(ratio * scale) for ratio in ratios]
    common = math.gcd(*whole)
    # A weight that is close to no small fraction is not replaced by one; it is rounded to 1 / MAX_PATTERN below.
    close = all(math.isclose(float(r), w, rel_tol=1e-9) for r, w in zip(ratios, weights, strict=True))
    if common and close and sum(whole) // common <= MAX_PATTERN:
        return np.asarray([n // common for n in whole], dtype=np.int64)
    total = math.fsum(weights)
    exact = [weight / total * MAX_PATTERN for weight in weights]
    shares = [math.floor(value) for value in exact]
    # Ties go to the first source, so that equal weights give the same pattern on every machine.
    by_remainder = sorted(range(len(exact)), key=lambda s: (shares[s] - exact[s], s))
    for source in by_remainder[: MAX_PATTERN - sum(shares)]:
        shares[source] += 1
    for weight, share in zip(weights, shares, strict=True):
        if weight > 0 and share == 0:
            raise ConfigError(
                f"mixture weight {weight} is less than 1/{MAX_PATTERN} of the total {total} and would never be drawn; "
                "raise it or leave the source out."
            )
    return np.asarray(shares, dtype=np.int64)


def chairman(shares: Ints) -> Ints:
    """Order M = sum(shares) positions so that every prefix is less than one sample from each exact share.

    Args:
        shares: int64 [num_sources], 0 or more, not all 0.

    Returns:
        int64 [M], the source of each position.
    """
    total = int(shares.sum())
    given = np.zeros_like(shares)
    places = np.empty(total, dtype=np.int64)
    for place in range(total):
        # A source may be served once its share has grown past what it has; of those, the first to fall due.
        # Integers only: floats would decide ties by rounding.
        may = (place + 1) * shares > given * total
        deadline = np.where(may, _deadline(given, shares, total), np.iinfo(np.int64).max)
        source = int(np.argmin(deadline))
        places[place] = source
        given[source] += 1
    return places


def _deadline(given: Ints, shares: Ints, total: int) -> Ints:
    """Last position by which each source must be served to stay less than one behind: ceil((given + 1) M / share)."""
    # A source of weight 0 is never allowed to be chosen; this only avoids its division by zero.
    safe = np.maximum(shares, 1)
    return -(-(given + 1) * total // safe)


def _check(stages: Sequence[Stage]) -> None:
    if not stages or stages[0].start != 0:
        raise ConfigError("a mixture begins at index 0; give its first stage start=0.")
    for before, after in zip(stages, stages[1:], strict=False):
        # Equal starts would give a stage of no samples, and the order of two such stages no meaning.
        if after.start <= before.start:
            raise ConfigError(f"mixture stage at {after.start} does not come after {before.start}; sort the stages.")
    for stage in stages:
        if len(stage.weights) != len(stages[0].weights):
            raise ConfigError(
                f"mixture stage at {stage.start} has {len(stage.weights)} weights for {len(stages[0].weights)} sources; "
                "give one each."
            )
        if not all(math.isfinite(w) and w >= 0 for w in stage.weights) or not any(stage.weights):
            raise ConfigError(
                f"mixture weights {list(stage.weights)} are not all 0 or more with one positive; mend them."
            )
