"""The search tries every legal plan, keeps what fits, and says why the others lose; calibration finds known factors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bd3_megatron.config.schema import Config
from bd3_megatron.config.validate import validate
from bd3_megatron.errors import ConfigError
from bd3_megatron.planner.calibrate import Observation, calibrate, fitted_factors
from bd3_megatron.planner.machines import GIB, machine_of
from bd3_megatron.planner.plans import best_by_grid, rank_plans, why_not
from bd3_megatron.planner.scaling import SIZES, efficiency_curves, scaling_markdown, weak_scaling, weak_scaling_config
from bd3_megatron.planner.timing import step_time
from tests.unit.cost.cases import case

A100 = machine_of("a100-80g", peak_tflops=312.0)
SEVEN_B: dict[str, Any] = {
    "num_layers": 32,
    "hidden_size": 4096,
    "num_heads": 32,
    "num_kv_heads": 8,
    "ffn_hidden_size": 11008,
    "vocab_size": 32000,
}


def _seven_b(batch: int = 64) -> Config:
    train = {"steps": 1, "global_batch_size": batch}
    return case(model=SEVEN_B, data={"seq_len": 2048}, diffusion={"block_size": 16}, train=train)


def test_every_plan_is_legal_fits_and_uses_all_devices() -> None:
    found = rank_plans(_seven_b(), 16, A100)
    assert len(found.fitting) > 50 and found.too_large and found.illegal
    for plan in found.fitting:
        validate(plan.config, world_size=16)
        assert plan.devices == 16
        assert plan.memory.peak <= 76 * GIB
    assert all(plan.memory.peak > 76 * GIB for plan in found.too_large)


def test_every_axis_recomputation_and_stage_is_tried() -> None:
    found = rank_plans(_seven_b(), 8, A100)
    plans = [plan.config for plan in [*found.fitting, *found.too_large]]
    assert (
        {p.parallel.tp for p in plans}
        == {p.parallel.pp for p in plans}
        == {p.parallel.cp for p in plans}
        == {1, 2, 4, 8}
    )
    assert {p.parallel.zero_stage for p in plans} == {1, 2, 3}
    assert {p.train.recompute for p in plans} == {"none", "selective", "full"}
    assert {p.parallel.vpp for p in plans} >= {None, 2, 4}
    assert {p.train.micro_batch_size for p in plans} >= {1, 2, 4, 8}
    assert all(p.parallel.zero_stage == 1 for p in plans if p.parallel.pp > 1)


def test_the_fastest_comes_first_and_the_others_say_why_not() -> None:
    found = rank_plans(_seven_b(), 16, A100)
    rates = [plan.tokens_per_second for plan in found.fitting]
    assert rates == sorted(rates, reverse=True)
    best = found.fitting[0]
    assert why_not(best, best, A100) == "best"
    assert "% slower (" in why_not(found.fitting[-1], best, A100)
    assert "GiB too large, most of it" in why_not(found.too_large[-1], best, A100)


def test_experts_are_dealt_out_in_every_way() -> None:
    experts = {"number": 8, "top_k": 2, "width": 1376}
    config = case(
        model={**SEVEN_B, "experts": experts}, data={"seq_len": 2048}, diffusion={"block_size": 16},
        train={"steps": 1, "global_batch_size": 16},
    )  # fmt: skip
    found = rank_plans(config, 8, A100)
    plans = [plan.config.parallel for plan in [*found.fitting, *found.too_large]]
    assert {p.ep for p in plans} == {1, 2, 4, 8}
    assert all(p.zero_stage == 1 and p.vpp is None and p.tp * p.cp * p.replicas % p.ep == 0 for p in plans)
    assert any(plan.config.parallel.ep > 1 and f"ep{plan.config.parallel.ep}" in plan.label for plan in found.fitting)


def test_one_plan_stands_for_every_grid() -> None:
    grids = [plan.grid for plan in best_by_grid(rank_plans(_seven_b(), 8, A100))]
    assert len(grids) == len(set(grids)) > 10


def test_a_plan_knows_its_days_and_its_share_of_the_peak() -> None:
    best = rank_plans(_seven_b(), 8, A100).fitting[0]
    assert best.days(86_400 * best.tokens_per_second) == pytest.approx(1.0)
    assert 0.2 < best.mfu(A100) < 0.8
    assert "dp" in best.label and "mb " in best.label


def test_nothing_fits_on_a_small_device() -> None:
    found = rank_plans(_seven_b(), 1, A100)
    assert not found.fitting
    peaks = [plan.memory.peak for plan in found.too_large]
    assert peaks == sorted(peaks)


def test_no_legal_grid_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match="no grid of 8 devices is legal for this configuration; the last was refused"):
        rank_plans(replace(_seven_b(8), data=replace(_seven_b().data, seq_len=2040)), 8, A100)


def _cpu_cases() -> list[Config]:
    grids = [{"dp": 1}, {"dp": 2}, {"tp": 2}, {"pp": 2, "layers_per_stage": [2, 1]}, {"tp": 2, "dp": 2}, {"cp": 2}]
    return [case(parallel=grid) for grid in grids]


def test_calibration_recovers_what_made_the_measurements() -> None:
    machine = replace(machine_of("cpu", peak_tflops=0.05), cores=8)
    start = calibrate([Observation(_cpu_cases()[0], step_time(_cpu_cases()[0], machine).total)], machine)
    truth = replace(start, compute_factor=1.7, communication_factor=2.5, overhead_factor=0.6)
    seen = [Observation(c, step_time(c, machine, truth).total) for c in (_cpu_cases()[0], _cpu_cases()[4])]
    fitted = calibrate(seen, machine)
    for config in _cpu_cases():
        predicted = step_time(config, machine, fitted).total
        assert predicted == pytest.approx(step_time(config, machine, truth).total, rel=0.15)
    assert "overhead_factor" in fitted_factors(fitted)


def test_perfect_predictions_leave_the_factors_alone() -> None:
    machine = machine_of("cpu", peak_tflops=0.05)
    config = _cpu_cases()[0]
    fitted = calibrate([Observation(config, step_time(config, machine).total)], machine)
    assert (fitted.compute_factor, fitted.overhead_factor) == pytest.approx((1.0, 1.0), abs=1e-6)


def test_calibration_without_a_measurement_is_refused() -> None:
    machine = machine_of("cpu", peak_tflops=0.05)
    with pytest.raises(ConfigError, match="calibration needs at least one measured run"):
        calibrate([], machine)
    with pytest.raises(ConfigError, match="no positive time/step_seconds"):
        calibrate([Observation(_cpu_cases()[0], 0.0)], machine)


def test_weak_scaling_is_relative_to_the_smallest_that_fits() -> None:
    points = weak_scaling(A100, devices=(1, 2, 4), sizes=SIZES[:1])
    fitting = [p for p in points if p.efficiency is not None]
    assert fitting[0].efficiency == 1.0
    assert [x for x, _ in efficiency_curves(points)["1.3B"]] == [float(p.devices) for p in fitting]
    text = scaling_markdown(points, A100)
    assert "**not measured**" in text and "matrix_efficiency" in text and "312 TFLOP/s" in text


@pytest.mark.parametrize("size", SIZES)
def test_weak_scaling_sizes_are_legal(size: Any) -> None:
    validate(weak_scaling_config(size, 8), world_size=8)
