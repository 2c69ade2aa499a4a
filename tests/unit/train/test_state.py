"""The train state goes through JSON unchanged."""

from __future__ import annotations

import json

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
