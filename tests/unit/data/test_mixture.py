"""Mixtures give every source its exact share of any window, count by count, across stages."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest

from bd3_megatron.data.mixture import MAX_PATTERN, Mixture, Stage, apportion, chairman
from bd3_megatron.errors import ConfigError


def test_every_window_is_within_two_samples_of_the_exact_share() -> None:
    chosen = random.Random(1)
    for _ in range(25):
        weights = [chosen.choice([0.1, 0.25, 1, 2, 3, 5, 0.5]) for _ in range(chosen.randint(1, 6))]
        exact = [Fraction(weight).limit_denominator(10**4) for weight in weights]
        shares = [weight / sum(exact) for weight in exact]
        source, _ = Mixture.of(weights).locate(np.arange(400))
        for _ in range(40):
            start = chosen.randrange(400)
            stop = chosen.randint(start, 400)
            for number, share in enumerate(shares):
                count = int(np.sum(source[start:stop] == number))
                assert abs(count - share * (stop - start)) < 2
                assert abs(int(np.sum(source[:stop] == number)) - share * stop) < 1


def test_a_whole_period_has_exactly_the_weights() -> None:
    source, count = Mixture.of([0.7, 0.2, 0.1]).locate(np.arange(1000))
    assert np.bincount(source).tolist() == [700, 200, 100]
    for number in range(3):
        assert count[source == number].tolist() == list(range(int(np.sum(source == number))))


def test_counts_are_in_closed_form_at_any_index() -> None:
    mixture = Mixture.of([3, 1, 2])
    far = 2**40 + np.arange(12)
    source, count = mixture.locate(far)
    for number in range(3):
        mine = count[source == number]
        assert np.all(np.diff(mine) == 1)
        # 2^40 is 4 more than a multiple of the period 6, of which the source has its weight
        assert mine[0] == 2**40 // 6 * mixture.stages[0].weights[number] + np.sum(
            mixture.locate(np.arange(4))[0] == number
        )


def test_stages_carry_counts_over_so_that_no_row_is_repeated_or_skipped() -> None:
    chosen = random.Random(7)
    for _ in range(20):
        starts = sorted(chosen.sample(range(1, 200), k=chosen.randint(0, 3)))
        stages = [
            Stage(start=s, weights=tuple(float(chosen.randint(0, 4)) + (k == 0) for k in range(3)))
            for s in [0, *starts]
        ]
        mixture = Mixture(stages)
        source, count = mixture.locate(np.arange(300))
        for number in range(3):
            assert count[source == number].tolist() == list(range(int(np.sum(source == number))))


def test_a_source_of_weight_zero_is_never_drawn() -> None:
    source, _ = Mixture.of([0.0, 1.0, 2.0]).locate(np.arange(1000))
    assert 0 not in source


def test_weights_without_a_small_common_denominator_are_apportioned_to_one_in_65536() -> None:
    weights = [123_456_789.0, 987_654_321.0, 5_000_003.0]
    shares = apportion(weights)
    assert int(shares.sum()) == MAX_PATTERN
    for weight, share in zip(weights, shares, strict=True):
        assert abs(weight / sum(weights) - share / MAX_PATTERN) < 1 / MAX_PATTERN


def test_the_chairman_keeps_every_prefix_within_one() -> None:
    for shares in ([1], [1, 1, 1], [5, 3, 1, 1], [100, 1], [7, 7, 2, 50, 1, 1, 1]):
        places = chairman(np.asarray(shares))
        for n in range(1, len(places) + 1):
            for number, share in enumerate(shares):
                assert abs(int(np.sum(places[:n] == number)) - Fraction(share * n, sum(shares))) < 1


@pytest.mark.parametrize(
    ("stages", "sentence"),
    [
        ([], "a mixture begins at index 0"),
        ([Stage(start=5, weights=(1.0,))], "a mixture begins at index 0"),
        ([Stage(start=0, weights=(1.0,)), Stage(start=0, weights=(1.0,))], "stage at 0 does not come after 0; sort"),
        (
            [Stage(start=0, weights=(1.0,)), Stage(start=3, weights=(1.0, 2.0))],
            "has 2 weights for 1 sources; give one each",
        ),
        ([Stage(start=0, weights=(1.0, -1.0))], r"weights \[1.0, -1.0\] are not all 0 or more"),
        ([Stage(start=0, weights=(0.0, 0.0))], "with one positive; mend them"),
        ([Stage(start=0, weights=(1.0, float("nan")))], "are not all 0 or more"),
        ([Stage(start=0, weights=(1.0, 1e-7))], "less than 1/65536 of the total .* would never be drawn"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(stages: list[Stage], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Mixture(stages)
