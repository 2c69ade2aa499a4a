"""The weight is the derivative of the mask probability over it, for every schedule, up to both ends."""

from __future__ import annotations

import math

import pytest
import torch

from bd3_megatron.diffusion.constants import MIN_T
from bd3_megatron.diffusion.noise_schedule import SCHEDULES, NoiseSchedule, noise_schedule
from bd3_megatron.errors import RangeError

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)


def test_the_five_schedules_of_the_paper_are_there() -> None:
    assert [s.name for s in SCHEDULES] == ["loglinear", "cosine", "square", "sqrt", "log"]
    assert all(noise_schedule(s.name) is s for s in SCHEDULES)


@every_schedule
def test_the_weight_is_the_numeric_derivative_over_the_probability(schedule: NoiseSchedule) -> None:
    t = torch.linspace(2 * MIN_T, 1 - 1e-4, 1001, dtype=torch.float64)
    h = 1e-6
    slope = (schedule.mask_probability(t + h) - schedule.mask_probability(t - h)) / (2 * h)
    assert torch.allclose(schedule.loss_weight(t), slope / schedule.mask_probability(t), rtol=1e-6, atol=0)


@every_schedule
def test_the_weight_is_the_exact_derivative_at_both_ends(schedule: NoiseSchedule) -> None:
    t = torch.tensor([MIN_T, 1.0], dtype=torch.float64, requires_grad=True)
    probability = schedule.mask_probability(t)
    (slope,) = torch.autograd.grad(probability.sum(), t)
    assert torch.allclose(schedule.loss_weight(t), slope / probability, rtol=1e-12, atol=0)


@every_schedule
def test_probability_rises_to_one_and_probability_times_weight_stays_bounded(schedule: NoiseSchedule) -> None:
    t = torch.linspace(MIN_T, 1, 10_001, dtype=torch.float64)
    probability, weight = schedule.mask_probability(t), schedule.loss_weight(t)
    assert (probability.diff() > 0).all() and 0 < probability[0] < 0.04
    assert probability[-1].item() == pytest.approx(1.0, abs=1e-15)
    assert (weight > 0).all() and (weight.diff() < 0).all()
    # p' is largest for the square root, 1 / (2 sqrt(MIN_T)) = 15.8, and at most 2 for all others.
    assert (probability * weight).max() <= (15.82 if schedule.name == "sqrt" else 2.0)


@pytest.mark.parametrize(
    "name, probability, weight",
    [
        ("loglinear", 0.25, 4.0),
        ("cosine", 1 - math.cos(math.pi / 8), math.pi / 2 / math.tan(math.pi / 16)),
        ("square", 0.0625, 8.0),
        ("sqrt", 0.5, 2.0),
        ("log", math.log2(1.25), 1 / (1.25 * math.log(1.25))),
    ],
)
def test_values_by_hand_at_a_quarter(name: str, probability: float, weight: float) -> None:
    t = torch.tensor(0.25, dtype=torch.float64)
    assert noise_schedule(name).mask_probability(t).item() == pytest.approx(probability, rel=1e-14)
    assert noise_schedule(name).loss_weight(t).item() == pytest.approx(weight, rel=1e-14)


@every_schedule
def test_shape_and_dtype_are_kept_and_the_smallest_fp32_level_is_allowed(schedule: NoiseSchedule) -> None:
    t = torch.full((2, 3), MIN_T, dtype=torch.float32)
    for out in (schedule.mask_probability(t), schedule.loss_weight(t)):
        assert out.shape == (2, 3) and out.dtype == torch.float32 and out.isfinite().all()


@pytest.mark.parametrize("bad", [0.0, 5e-4, 1.0001, -0.1, float("nan")])
def test_levels_outside_the_range_are_refused(bad: float) -> None:
    t = torch.tensor([0.5, bad])
    sentence = r"outside \[0\.001, 1\]; clip it there \(every loss weight diverges at t = 0\)\."
    with pytest.raises(RangeError, match=sentence):
        noise_schedule("loglinear").mask_probability(t)
    with pytest.raises(RangeError, match=r"t reaches from .* outside"):
        noise_schedule("loglinear").loss_weight(t)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(RangeError, match=r"'linear' is not known; use loglinear, cosine, square, sqrt or log\."):
        noise_schedule("linear")
