"""Levels are stratified over the global batch, permuted, and the same for every way of cutting it.

Statistical tests draw with fixed seeds; each states n and the chance that a correct generator would fail it.
"""

from __future__ import annotations

import math

import pytest
import torch

from bd3_megatron.diffusion.noise_level import Interval, noise_levels
from bd3_megatron.errors import RangeError, ShapeError

G, K = 16, 8
FULL = Interval()


def levels(index: torch.Tensor, seed: int = 0, interval: Interval = FULL, **options: bool) -> torch.Tensor:
    return noise_levels(seed, index, num_blocks=K, interval=interval, group_size=G, **options)


def test_every_stratum_of_a_group_is_used_exactly_once() -> None:
    for interval in (FULL, Interval(0.3, 0.8), Interval(0.45, 0.95)):
        t = levels(torch.arange(5 * G), interval=interval)
        assert t.dtype == torch.float64 and t.shape == (5 * G, K) and interval.holds(t).all()
        stratum = ((t - interval.beta) / interval.width * (G * K)).floor().long()
        for group in stratum.reshape(5, G * K):
            assert torch.equal(group.sort().values, torch.arange(G * K))


@pytest.mark.parametrize("dp, micro_batch", [(1, 1), (1, 16), (2, 4), (4, 2), (8, 1)])
def test_levels_do_not_depend_on_the_grid(dp: int, micro_batch: int) -> None:
    first = 2**33 * G
    whole = levels(torch.arange(first, first + 2 * G))
    for rank in range(dp):
        for m in range(2 * G // (dp * micro_batch)):
            start = (m * dp + rank) * micro_batch
            index = torch.arange(first + start, first + start + micro_batch)
            assert torch.equal(levels(index), whole[start : start + micro_batch])


def test_any_subset_in_any_order_across_groups() -> None:
    whole = levels(torch.arange(3 * G))
    some = torch.tensor([40, 3, 17, 3, 31])
    assert torch.equal(levels(some), whole[some])


def test_groups_and_seeds_differ() -> None:
    t = levels(torch.arange(2 * G))
    assert not torch.equal(t[:G], t[G:])
    assert not torch.equal(t, levels(torch.arange(2 * G), seed=1))


def test_strata_are_not_tied_to_a_block_index_or_a_place_in_the_batch() -> None:
    """Correlation of t with block index and with place, n = 400 groups x 128; |r| sqrt(n) > 5 has chance 6e-7.

    The unpermuted strata of the official code have correlation 1 with the block index for one sequence a device.
    """
    t = levels(torch.arange(400 * G)).reshape(400, G, K)
    for axis in (torch.arange(K).double()[None, None, :], torch.arange(G).double()[None, :, None]):
        axis = axis.expand_as(t)
        correlation = torch.corrcoef(torch.stack([t.flatten(), axis.flatten()]))[0, 1].item()
        assert abs(correlation) * math.sqrt(t.numel()) < 5


def test_every_block_sees_every_level() -> None:
    """The level of one fixed (place, block) over 4,000 groups is uniform: 16 cells, chi-square < 15 + 5 sqrt(30).

    A true uniform exceeds it with probability < 1e-4.
    """
    t = levels(torch.arange(4000) * G + 5)[:, 3]
    counts = torch.histc(t, bins=16, min=FULL.beta, max=1.0)
    assert ((counts - 250) ** 2 / 250).sum().item() < 15 + 5 * math.sqrt(30)


def test_stratification_lowers_the_variance_of_a_batch_mean() -> None:
    """n = 300 groups of 128 levels: independent draws vary 128^2 times more in theory; a factor of 100 is asked.

    The ratio of two sample variances of n = 300 being 100 times off has a chance below 1e-100.
    """
    index = torch.arange(300 * G)
    stratified, independent = (levels(index, stratified=s).reshape(300, -1).mean(1).var() for s in (True, False))
    assert stratified * 100 < independent


def test_independent_levels_fill_the_interval() -> None:
    """n = 6,400; mean within five standard errors, chance of a false alarm 6e-7."""
    t = levels(torch.arange(50 * G), interval=Interval(0.2, 0.6), stratified=False)
    assert abs(t.mean().item() - 0.4) < 5 * 0.4 / math.sqrt(12 * t.numel())


def test_full_masking_is_a_point() -> None:
    assert (levels(torch.arange(G), interval=Interval(1.0, 1.0)) == 1.0).all()


def test_one_block_one_sample() -> None:
    t = noise_levels(0, torch.tensor([7]), num_blocks=1, interval=FULL, group_size=1)
    assert t.shape == (1, 1) and FULL.holds(t).all()
    assert noise_levels(0, torch.empty(0, dtype=torch.int64), num_blocks=4, interval=FULL, group_size=2).shape == (0, 4)


def test_intervals_outside_the_range_are_refused() -> None:
    with pytest.raises(RangeError, match=r"interval \[0, 1\] leaves \[0\.001, 1\]; use 0\.001 <= beta <= omega <= 1"):
        Interval(0.0, 1.0)
    with pytest.raises(RangeError, match=r"interval \[0\.5, 1\.2\] leaves"):
        Interval(0.5, 1.2)
    with pytest.raises(RangeError, match=r"interval \[0\.8, 0\.3\] is empty; use beta <= omega\."):
        Interval(0.8, 0.3)
    with pytest.raises(RangeError, match=r"leaves"):
        Interval(float("nan"), 1.0)


def test_bad_requests_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"index_B is torch.int32 \[4\]; expected torch.int64 \[any\]\."):
        levels(torch.arange(4, dtype=torch.int32))
    with pytest.raises(ShapeError, match=r"index_B is torch.int64 \[1, 4\]"):
        levels(torch.arange(4)[None])
    with pytest.raises(RangeError, match=r"index -2 is negative; count samples from 0 in the order of consumption\."):
        levels(torch.tensor([3, -2]))
    with pytest.raises(RangeError, match=r"num_blocks=0 and group_size=4 must both be 1 or more\."):
        noise_levels(0, torch.arange(4), num_blocks=0, interval=FULL, group_size=4)
