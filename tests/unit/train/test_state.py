"""The train state goes through JSON unchanged."""

from __future__ import annotations

import json

from bd3_megatron.diffusion.noise_level import Interval
from bd3_megatron.train.state import TrainState


def test_the_state_survives_json() -> None:
    state = TrainState(
        step=7,
        samples_consumed=2**33 + 5,
        intervals={4: (0.45, 0.95), 16: (1e-3, 1.0)},
        skipped_steps=2,
        wandb_id="abc",
    )
    assert TrainState.from_json(json.loads(json.dumps(state.to_json()))) == state
    assert TrainState.from_json(json.loads(json.dumps(TrainState().to_json()))) == TrainState()


def test_a_searched_interval_goes_before_the_configured_one() -> None:
    state = TrainState(intervals={4: (0.45, 0.95)})
    assert state.interval(4, Interval()) == Interval(0.45, 0.95)
    assert state.interval(8, Interval(0.3, 0.8)) == Interval(0.3, 0.8)
