"""The learning rate at each step: no update is wasted at 0, every schedule joins its warm-up and ends where it says."""

from __future__ import annotations

import math

import pytest

from bd3_megatron.config.schema import OptimConfig
from bd3_megatron.engine.lr_schedule import learning_rate

TOTAL = 100


def rates(**fields: object) -> list[float]:
    config = OptimConfig(lr=2.0, **fields)  # type: ignore[arg-type]
    return [learning_rate(config, step, TOTAL) for step in range(TOTAL)]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd", "inverse_sqrt"])
def test_the_warmup_rises_linearly_to_the_peak(schedule: str) -> None:
    found = rates(schedule=schedule, warmup_steps=10)
    assert found[:10] == pytest.approx([0.2 * (n + 1) for n in range(10)])
    assert max(found) <= 2.0 and found[10] == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd", "inverse_sqrt"])
def test_without_warmup_the_first_update_has_the_peak(schedule: str) -> None:
    assert rates(schedule=schedule)[0] == 2.0


def test_constant_stays() -> None:
    assert set(rates(schedule="constant", warmup_steps=5)[5:]) == {2.0}


def test_cosine_is_halfway_in_the_middle_and_falls_to_its_floor() -> None:
    found = rates(schedule="cosine", warmup_steps=20, min_lr_ratio=0.1)
    assert found[60] == pytest.approx(2.0 * 0.55)
    assert found[20:] == sorted(found[20:], reverse=True)
    assert learning_rate(OptimConfig(lr=2.0, schedule="cosine", min_lr_ratio=0.1), TOTAL, TOTAL) == pytest.approx(0.2)


def test_wsd_is_stable_then_falls_linearly_over_its_share() -> None:
    found = rates(schedule="wsd", warmup_steps=10, decay_fraction=0.2, min_lr_ratio=0.5)
    assert set(found[10:81]) == {2.0}
    assert found[90] == pytest.approx(1.5)
    steps = [a - b for a, b in zip(found[80:], found[81:], strict=False)]
    assert steps == pytest.approx([0.05] * 19)
    assert found[-1] == pytest.approx(1.05)


def test_inverse_sqrt_halves_at_four_times_the_warmup() -> None:
    found = rates(schedule="inverse_sqrt", warmup_steps=16)
    assert found[15] == 2.0 and found[63] == pytest.approx(1.0)
    assert found[24] == pytest.approx(2.0 * math.sqrt(16 / 25))
