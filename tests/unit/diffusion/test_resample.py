"""Resampling is the conditioned law, and its biases are the documented ones, exactly."""

from __future__ import annotations

import math

import pytest
import torch

from bd3_megatron.diffusion.noise_level import Interval
from bd3_megatron.diffusion.noise_schedule import noise_schedule
from bd3_megatron.diffusion.resample import allowed_counts, conditional_count, has_allowed_count, inside_probability
from bd3_megatron.errors import RangeError
from tests.unit.diffusion.laws import all_masks, estimator_moment, mask_law

LINEAR = noise_schedule("loglinear")


@pytest.mark.parametrize(
    "block_size, interval, percent",
    [(4, (0.3, 0.8), 18.6), (4, (0.45, 0.95), -3.5), (16, (0.3, 0.8), 1.4), (16, (0.45, 0.95), 4.1)],
)
def test_the_documented_biases_are_exact(block_size: int, interval: tuple[float, float], percent: float) -> None:
    """E[masked / t] over its true value 1: all 2^S masks, quadrature over t."""
    masked_fraction = all_masks(block_size).double().mean(dim=1)
    biased, true = (
        estimator_moment(masked_fraction, LINEAR, Interval(*interval), resample=resample, num_nodes=48)
        for resample in (True, False)
    )
    assert true == pytest.approx(1.0, abs=1e-12)
    assert round(100 * (biased - 1), 1) == percent


@pytest.mark.parametrize(
    "interval", [Interval(0.3, 0.8), Interval(0.25, 0.75), Interval(1e-3, 0.5), Interval(0.5, 1.0)]
)
@pytest.mark.parametrize("block_size", [2, 4, 5])
def test_the_count_has_the_law_of_redrawing_until_inside(block_size: int, interval: Interval) -> None:
    assert has_allowed_count(interval, block_size)
    masks = all_masks(block_size)
    low, high = allowed_counts(interval, block_size)
    lower = Interval(interval.beta if low else 1e-3, interval.omega)
    for p in (0.001, 0.3, 0.77, 1.0 if high == block_size else 0.99):
        probability = torch.tensor([p], dtype=torch.float64)
        law = mask_law(probability, masks)[0]
        allowed = (masks.sum(1) >= low) & (masks.sum(1) <= high)
        inside = inside_probability(probability, block_size, lower)
        assert inside.item() == pytest.approx(law[allowed].sum().item(), rel=1e-12)
        # An even grid of uniforms turns probabilities into counts, to within one grid step a value.
        grid = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
        counts = conditional_count(grid, probability.expand(20_000), block_size, interval)
        for m in range(block_size + 1):
            wanted = law[allowed & (masks.sum(1) == m)].sum().item() / inside.item()
            assert abs((counts == m).double().mean().item() - wanted) <= 1.01 / 20_000


@pytest.mark.parametrize(
    "block_size, interval, counts",
    [
        (4, Interval(0.3, 0.8), (2, 3)),
        (4, Interval(0.45, 0.95), (2, 3)),
        (20, Interval(0.45, 0.95), (9, 19)),
        (10, Interval(0.3, 0.7), (3, 7)),
        (16, Interval(1e-3, 0.5), (0, 8)),
        (16, Interval(0.5, 1.0), (8, 16)),
        (16, Interval(), (0, 16)),
    ],
)
def test_bounds_are_included_and_the_ends_of_the_range_not_enforced(
    block_size: int, interval: Interval, counts: tuple[int, int]
) -> None:
    assert allowed_counts(interval, block_size) == counts


def test_long_blocks_do_not_underflow() -> None:
    t = torch.tensor([0.3, 0.55, 0.8], dtype=torch.float64)
    inside = inside_probability(t, 1024, Interval(0.3, 0.8))
    assert 0.4 < inside[0] < 0.6 and inside[1] == pytest.approx(1.0) and math.isfinite(inside[2])
    counts = conditional_count(torch.tensor([0.0, 0.5, 1 - 2**-53]), t, 1024, Interval(0.3, 0.8))
    assert (counts >= 308).all() and (counts <= 819).all()


def test_an_interval_between_two_counts_is_refused() -> None:
    assert not has_allowed_count(Interval(0.3, 0.4), 4)
    sentence = r"interval \[0\.3, 0\.4\] holds no multiple of 1/4, so no mask of block_size=4 lies inside; widen it"
    with pytest.raises(RangeError, match=sentence):
        allowed_counts(Interval(0.3, 0.4), 4)
    with pytest.raises(RangeError, match=sentence):
        inside_probability(torch.tensor([0.5]), 4, Interval(0.3, 0.4))
    with pytest.raises(RangeError, match=sentence):
        conditional_count(torch.tensor([0.5]), torch.tensor([0.5]), 4, Interval(0.3, 0.4))
