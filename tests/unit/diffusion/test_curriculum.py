"""Phases are half-open and exact at their seams; a state belongs to the phase that led to it."""

from __future__ import annotations

import pytest

from bd3_megatron.diffusion.curriculum import Curriculum, LrSegment, Phase
from bd3_megatron.errors import ConfigError, RangeError

SEQ_LEN = 64


def curriculum(*phases: Phase, total_steps: int = 30) -> Curriculum:
    return Curriculum(phases, total_steps, SEQ_LEN)


def test_every_step_belongs_to_exactly_one_phase_and_seams_are_exact() -> None:
    c = curriculum(Phase(block_size=64, steps=10), Phase(block_size=4, steps=5), Phase(block_size=16))
    assert c.seams() == (0, 10, 15)
    places = [c.phase_at(step) for step in range(30)]
    assert [p.number for p in places] == [0] * 10 + [1] * 5 + [2] * 15
    assert [p.step for p in places] == [*range(10), *range(5), *range(15)]
    assert [p.first_step + p.step for p in places] == list(range(30))
    assert {p.number: p.num_steps for p in places} == {0: 10, 1: 5, 2: 15}
    assert c.phase_at(9).phase.block_size == 64 and c.phase_at(10).phase.block_size == 4


def test_the_final_state_belongs_to_the_phase_that_led_to_it() -> None:
    bounded = curriculum(Phase(block_size=64, steps=10), Phase(block_size=4, steps=20))
    assert bounded.phase_at(30).number == 1 and bounded.phase_at(30).step == 19
    stopped_at_a_seam = curriculum(Phase(block_size=64, steps=10), Phase(block_size=4, steps=20), total_steps=10)
    assert stopped_at_a_seam.phase_at(10).number == 0


def test_a_longer_run_agrees_with_a_shorter_one_where_both_are() -> None:
    phases = (Phase(block_size=64, steps=10), Phase(block_size=4, steps=50))
    short, long = curriculum(*phases, total_steps=20), curriculum(*phases, total_steps=60)
    assert all(short.phase_at(step) == long.phase_at(step) for step in range(20))


def test_a_state_was_trained_by_the_update_that_led_to_it() -> None:
    c = curriculum(Phase(block_size=64, steps=10), Phase(block_size=4, steps=5), Phase(block_size=16))
    assert [c.trained_block_size(step) for step in (0, 1, 10, 11, 15, 16, 30)] == [64, 64, 64, 4, 4, 16, 16]


def test_learning_rate_segments() -> None:
    c = curriculum(
        Phase(block_size=64, steps=10, lr=LrSegment(warmup_steps=4)),
        Phase(block_size=4, lr=LrSegment(start=1.0, end=0.0)),
    )
    factors = [c.phase_at(step).lr_factor for step in range(30)]
    assert factors[:10] == [0.25, 0.5, 0.75] + [1.0] * 7
    assert factors[10] == 1.0 and factors[20] == 0.5 and factors[29] == pytest.approx(0.05)
    cosine = LrSegment(start=1.0, end=0.2, shape="cosine")
    assert [round(cosine.factor(s, 4), 6) for s in range(4)] == [1.0, 0.882843, 0.6, 0.317157]


def test_bad_curricula_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"A phase has steps=0; use 1 or more\."):
        Phase(block_size=4, steps=0)
    with pytest.raises(ConfigError, match=r"A phase has block_size=-1; use 1 or more\."):
        Phase(block_size=-1)
    with pytest.raises(ConfigError, match=r"lr segment start=-1 end=1 warmup_steps=0 has a negative number"):
        LrSegment(start=-1)
    with pytest.raises(ConfigError, match=r"A curriculum of 0 phases and 30 steps is empty; give one of each\."):
        curriculum()
    with pytest.raises(ConfigError, match=r"block_size=48 does not divide seq_len=64; use 1, 2, 4, 8, 16, 32 or 64\."):
        curriculum(Phase(block_size=48))
    with pytest.raises(ConfigError, match=r"Phase 0 has no length; only the last phase may be open\."):
        curriculum(Phase(block_size=4), Phase(block_size=8, steps=5))
    with pytest.raises(ConfigError, match=r"The phases end at step 15 but the run has 30 steps; shorten the run or"):
        curriculum(Phase(block_size=4, steps=10), Phase(block_size=8, steps=5))
    for step in (-1, 31):
        with pytest.raises(
            RangeError, match=rf"step={step} is outside the run's \[0, 30\]; ask for a step inside it\."
        ):
            curriculum(Phase(block_size=4)).phase_at(step)
