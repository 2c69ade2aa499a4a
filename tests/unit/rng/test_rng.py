"""Draws are functions of their arguments alone, have the right law, and permutations are one to one at any size.

Statistical tests draw with fixed seeds; each states n and the chance that a correct generator would fail it.
"""

from __future__ import annotations

import math

import pytest
import torch

from bd3_megatron import rng
from bd3_megatron.errors import RangeError
from bd3_megatron.rng import Purpose


def test_a_draw_does_not_depend_on_chunking_order_or_broadcasting() -> None:
    index = torch.arange(2**33, 2**33 + 12)
    position = torch.arange(40)
    whole = rng.uniform(3, Purpose.CORRUPT, index[:, None], position, 1)
    backwards = torch.stack([rng.uniform(3, Purpose.CORRUPT, int(i), position.flip(0), 1).flip(0) for i in index])
    assert torch.equal(whole, backwards)
    assert torch.equal(whole[:, 5], rng.uniform(3, Purpose.CORRUPT, index, torch.tensor(5), 1))


def test_every_argument_matters() -> None:
    base = rng.uniform(1, Purpose.CORRUPT, 10, 2, 3)
    others = [
        rng.uniform(2, Purpose.CORRUPT, 10, 2, 3),
        rng.uniform(1, Purpose.RESAMPLE, 10, 2, 3),
        rng.uniform(1, Purpose.CORRUPT, 10 + 2**32, 2, 3),
        rng.uniform(1, Purpose.CORRUPT, 10, 3, 2),
    ]
    assert all(base != other for other in others)


def test_purposes_are_distinct_and_never_renumbered() -> None:
    numbers = {purpose.name: purpose.value for purpose in Purpose}
    assert len(set(numbers.values())) == len(numbers)
    assert numbers["NOISE_LEVEL"] == 1 and numbers["CORRUPT"] == 3 and numbers["SAMPLE"] == 9


def test_uniforms_fill_the_unit_interval_evenly() -> None:
    """Chi-square over 64 cells, n = 2^16; a true uniform exceeds 63 + 5 sqrt(126) with probability < 1e-5."""
    draws = rng.uniform(0, Purpose.NOISE_LEVEL, torch.arange(2**16))
    counts = torch.histc(draws, bins=64, min=0.0, max=1.0)
    chi_square = ((counts - 1024) ** 2 / 1024).sum().item()
    assert chi_square < 63 + 5 * math.sqrt(126)


def test_neighbouring_draws_are_uncorrelated() -> None:
    """Lag-1 correlation along each counter axis, n = 65,280 or more; |r| sqrt(n) > 5 has probability 6e-7."""
    draws = rng.uniform(0, Purpose.CORRUPT, torch.arange(256)[:, None], torch.arange(256)) - 0.5
    for left, right in ((draws[1:], draws[:-1]), (draws[:, 1:], draws[:, :-1])):
        correlation = 12 * (left * right).mean().item()
        assert abs(correlation) * math.sqrt(left.numel()) < 5


def test_normals_have_unit_moments() -> None:
    """n = 2^16; mean, variance and fourth moment within five standard errors, false alarm 6e-7 each."""
    draws = rng.normal(4, Purpose.INIT, torch.arange(2**16))
    n = draws.numel()
    assert abs(draws.mean().item()) < 5 / math.sqrt(n)
    assert abs((draws**2).mean().item() - 1) < 5 * math.sqrt(2 / n)
    assert abs((draws**4).mean().item() - 3) < 5 * math.sqrt(96 / n)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 64, 1000, 4096, 5003])
def test_a_permutation_is_a_bijection(size: int) -> None:
    image = rng.permutation_index(9, Purpose.DATA_ORDER, 2, size, torch.arange(size))
    assert torch.equal(image.sort().values, torch.arange(size))


@pytest.mark.parametrize("size", [10**9 + 7, 2**32 - 1, 2**32 + 1, 2**40 + 123, 2**62])
def test_large_permutations_do_not_collide(size: int) -> None:
    position = torch.cat([torch.arange(5000), torch.arange(size - 5000, size)])
    image = rng.permutation_index(9, Purpose.DATA_ORDER, 0, size, position)
    assert image.unique().numel() == 10_000
    assert int(image.min()) >= 0 and int(image.max()) < size
    # A uniform image: the mean of n = 10^4 draws, five standard errors, false alarm 6e-7.
    assert abs(image.double().mean().item() / size - 0.5) < 5 / math.sqrt(12 * 10_000)


def test_any_part_of_a_permutation_may_be_asked_for_under_many_keys_at_once() -> None:
    key, position = torch.tensor([[0], [1], [2**40]]), torch.arange(50)
    table = rng.permutation_index(9, Purpose.STRATA, key, 50, position)
    for row, k in zip(table, key.flatten().tolist(), strict=True):
        assert torch.equal(row[7:19], rng.permutation_index(9, Purpose.STRATA, k, 50, position[7:19]))
    assert not torch.equal(table[0], table[1])


@pytest.mark.parametrize("size", [2, 3, 5, 8, 32])
def test_permutations_send_every_pair_everywhere(size: int) -> None:
    """Over n = 20,000 keys the images of positions (0, 1) fill the size (size - 1) ordered pairs evenly.

    Chi-square with d cells beyond the first; d + 5 sqrt(2 d) + 10 is exceeded with probability < 1e-5 at every d here.
    """
    keys = torch.arange(20_000)[:, None]
    image = rng.permutation_index(1, Purpose.STRATA, keys, size, torch.arange(2))
    cells = torch.bincount(image[:, 0] * size + image[:, 1], minlength=size * size).reshape(size, size)
    assert int(cells.diagonal().sum()) == 0
    expected = 20_000 / (size * (size - 1))
    off = cells[~torch.eye(size, dtype=torch.bool)].double()
    degrees = size * (size - 1) - 1
    assert ((off - expected) ** 2 / expected).sum().item() < degrees + 5 * math.sqrt(2 * degrees) + 10


def test_derived_seeds_differ_by_name_and_may_seed_again() -> None:
    seeds = {rng.generator_seed(0, Purpose.INIT, name) for name in ("a", "b", "layers.0.weight", "")}
    assert len(seeds) == 4 and all(0 <= s <= rng.MAX_SEED for s in seeds)
    assert rng.generator_seed(0, Purpose.INIT, "a") == rng.generator_seed(0, Purpose.INIT, "a")
    assert rng.generator_seed(1, Purpose.INIT, "a") not in seeds


def test_what_is_out_of_range_is_refused() -> None:
    with pytest.raises(RangeError, match=r"seed=-3 is outside \[0, 2\^48\); use a seed in that range\."):
        rng.uniform(-3, Purpose.CORRUPT, 0)
    with pytest.raises(RangeError, match=r"seed=-3 is outside"):
        rng.generator_seed(-3, Purpose.CORRUPT, "x")
    with pytest.raises(RangeError, match=r"index=-1 is outside"):
        rng.normal(0, Purpose.CORRUPT, -1)
    with pytest.raises(RangeError, match=r"3 coordinates were given; use two at most"):
        rng.uniform(0, Purpose.CORRUPT, 0, 1, 2, 3)
    with pytest.raises(RangeError, match=r"size=0 is outside \[1, 2\^62\]; use a size in that range\."):
        rng.permutation_index(0, Purpose.STRATA, 0, 0, 0)
    with pytest.raises(RangeError, match=r"position 0 to 4 leaves \[0, 4\); use 0 to 3\."):
        rng.permutation_index(0, Purpose.STRATA, 0, 4, torch.arange(5))


@pytest.mark.gpu
def test_a_gpu_has_the_same_bits() -> None:
    index, position = torch.arange(2**33, 2**33 + 64)[:, None], torch.arange(2048)
    here = rng.uniform(7, Purpose.CORRUPT, index, position)
    assert torch.equal(rng.uniform(7, Purpose.CORRUPT, index.cuda(), position.cuda()).cpu(), here)
    image = rng.permutation_index(7, Purpose.STRATA, 1, 2048, position)
    assert torch.equal(rng.permutation_index(7, Purpose.STRATA, 1, 2048, position.cuda()).cpu(), image)
