"""The average follows the paper's warmed-up decay, and a swap undone leaves no trace."""

from __future__ import annotations

import pytest
import torch

from bd3_megatron.engine.ema import Ema

MADE, LEFT_OUT = torch.tensor(1.0), torch.tensor(0.0)


def test_the_average_is_the_recursion() -> None:
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(5, generator=generator), torch.randn(3, generator=generator)]
    ema, expected = Ema(weights, 0.8), [w.double() for w in weights]
    for number in range(1, 20):
        for w in weights:
            w.add_(torch.randn(w.shape, generator=generator))
        ema.update(weights, MADE)
        keep = min(0.8, (1 + number) / (10 + number))
        expected = [keep * e + (1 - keep) * w for e, w in zip(expected, weights, strict=True)]
    assert ema.num_updates == 19
    for found, exact in zip(ema.shards, expected, strict=True):
        assert torch.allclose(found.double(), exact, atol=1e-5)


def test_an_update_that_was_left_out_changes_no_average() -> None:
    weight = torch.randn(7, generator=torch.Generator().manual_seed(1))
    ema = Ema([weight], 0.9)
    ema.update([weight + 1], MADE)
    before = ema.shards[0].clone()
    ema.update([weight + 2], LEFT_OUT)
    assert torch.equal(ema.shards[0], before) and ema.num_updates == 1
    ema.num_updates = 89
    ema.update([weight + 1], MADE)
    # 91 / 100 of a decay of 0.9: the cap holds
    assert torch.allclose(ema.shards[0], 0.9 * before + 0.1 * (weight + 1)) and ema.num_updates == 90


def test_the_average_owns_its_memory() -> None:
    weight = torch.ones(2)
    ema = Ema([weight], 0.9)
    weight.zero_()
    assert ema.shards[0].tolist() == [1.0, 1.0]


def test_two_swaps_are_none() -> None:
    weight = torch.randn(7, generator=torch.Generator().manual_seed(1))
    before, ema = weight.clone(), Ema([torch.full((7,), 0.1)], 0.9)
    average = ema.shards[0].clone()
    ema.swap([weight])
    assert torch.equal(weight, average) and torch.equal(ema.shards[0], before)
    ema.swap([weight])
    assert torch.equal(weight, before) and torch.equal(ema.shards[0], average)


def test_a_swap_with_other_tensors_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        Ema([torch.ones(2)], 0.9).swap([torch.ones(2), torch.ones(2)])
