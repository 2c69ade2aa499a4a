"""A run's length in closed form: the same numbers as counting step by step, at any size and at once."""

from __future__ import annotations

import pytest

from bd3_megatron.config.budget import batch_size_at, samples_before, steps_for_tokens, total_steps
from bd3_megatron.config.schema import TrainConfig

WARMUPS = [(first, whole, steps) for first in (1, 2, 3, 5) for whole in (5, 8, 16, 31) for steps in (1, 6, 7, 20)]


@pytest.mark.parametrize(("first", "whole", "steps"), WARMUPS)
def test_the_batch_grows_linearly_in_multiples_and_the_samples_are_their_sum(
    first: int, whole: int, steps: int
) -> None:
    train = TrainConfig(warmup_batch_size=first, global_batch_size=whole, batch_warmup_steps=steps)
    sizes = [batch_size_at(train, step) for step in range(40)]
    grown = [(first + (whole - first) * step // steps) // first * first for step in range(steps)]
    assert sizes == grown + [whole] * (40 - steps)
    assert [samples_before(train, step) for step in range(41)] == [sum(sizes[:step]) for step in range(41)]


@pytest.mark.parametrize(("first", "whole", "steps"), WARMUPS[::3])
def test_tokens_take_the_fewest_steps_that_see_them(first: int, whole: int, steps: int) -> None:
    train = TrainConfig(warmup_batch_size=first, global_batch_size=whole, batch_warmup_steps=steps)
    for start in (0, 1, 5, 30):
        for tokens in (-3, 0, 1, 7, 8, 100, 1000):
            found = steps_for_tokens(train, 4, tokens, start)
            seen = [4 * (samples_before(train, start + n) - samples_before(train, start)) for n in range(found + 1)]
            assert seen[-1] >= tokens and (found == 0 or seen[-2] < tokens)


def test_the_greatest_budget_is_counted_at_once() -> None:
    train = TrainConfig(warmup_batch_size=3, global_batch_size=10**5, batch_warmup_steps=10**9, tokens=10**18)
    assert samples_before(train, 10**9) == sum_by_levels(3, 10**5, 10**9)
    assert steps_for_tokens(train, 2, 10**18) > 10**9


def sum_by_levels(first: int, whole: int, steps: int) -> int:
    """Samples of the warm-up, each batch size times the steps that have it."""
    total, begin, level = 0, 0, 1
    while begin < steps:
        # the next level begins where (whole - first) * step reaches level * steps * first
        end = min(steps, -(-level * steps * first // (whole - first)))
        total += first * level * (end - begin)
        begin, level = end, level + 1
    return total


def test_a_run_has_its_steps_or_those_of_its_tokens() -> None:
    assert total_steps(TrainConfig(steps=7, global_batch_size=2), 4) == 7
    assert total_steps(TrainConfig(tokens=17, global_batch_size=2), 4) == 3
