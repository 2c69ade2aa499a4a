"""Rotary angles: position times frequency, each frequency twice, as exact far out as near 0."""

from __future__ import annotations

import math

import pytest
import torch

from bd3_megatron.model.rotary import rotary_angles, rotary_turn, turned


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_angles_are_position_times_frequency(dtype: torch.dtype) -> None:
    angle = rotary_angles(torch.tensor([0, 1, 5]), 8, 10_000.0, dtype=dtype)
    assert angle.shape == (3, 1, 1, 8) and angle.dtype == dtype
    for row, position in enumerate((0, 1, 5)):
        for i in range(4):
            expected = position * 10_000.0 ** (-2 * i / 8) % (2 * math.pi)
            assert angle[row, 0, 0, i] == angle[row, 0, 0, i + 4]
            assert angle[row, 0, 0, i].item() == pytest.approx(expected, rel=torch.finfo(dtype).eps * 8)


def test_the_same_position_has_the_same_angle_in_both_streams() -> None:
    angle = rotary_angles(torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]), 4, 10_000.0)
    assert torch.equal(angle[:4], angle[4:])


def test_samples_may_have_positions_of_their_own() -> None:
    position_PB = torch.tensor([[0, 3], [1, 0]])
    angle = rotary_angles(position_PB, 4, 10_000.0)
    assert angle.shape == (2, 2, 1, 4)
    assert torch.equal(angle[:, 1], rotary_angles(position_PB[:, 1], 4, 10_000.0)[:, 0])


def test_far_positions_are_as_exact_as_near_ones() -> None:
    far = torch.tensor([2**24 + 1])
    frequency = (1.0 / 10_000.0 ** (torch.arange(0, 8, 2, dtype=torch.float32) / 8)).double()
    exact = torch.cos(far.double()[:, None] * frequency)
    found = torch.cos(rotary_angles(far, 8, 10_000.0)[:, 0, 0, :4].double())
    # a product in fp32 would be off by whole turns here
    assert (found - exact).abs().max() < 1e-6


@pytest.mark.parametrize("position_PB", [torch.arange(6), torch.arange(12).view(6, 2)], ids=["shared", "own"])
def test_turning_is_rotate_half_with_its_gradient(position_PB: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(6, 2, 3, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    angles = rotary_angles(position_PB, 8, 10_000.0, dtype=torch.float64)
    first, second = heads.chunk(2, dim=-1)
    expected = heads * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()
    found = turned(heads, rotary_turn(angles))
    assert torch.allclose(found, expected, rtol=0, atol=1e-14)
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    grad, wanted = (torch.autograd.grad(out, heads, upstream)[0] for out in (found, expected))
    assert torch.allclose(grad, wanted, rtol=0, atol=1e-14)
