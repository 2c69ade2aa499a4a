"""The train state goes through JSON unchanged, and a foreign one is read or refused in a sentence."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bd3_megatron.errors import CheckpointError
from bd3_megatron.train.state import TrainState
from tests.json_mutations import num_refused

STATE = TrainState(
    step=7,
    samples_consumed=2**33 + 5,
    block_size=16,
    intervals={4: (0.45, 0.95), 16: (1e-3, 1.0)},
    skipped_steps=2,
    skipped_in_a_row=1,
    finite_step=6,
    recent_losses=[2.5, 3.0],
    rolled_back_to=5,
    tokenizer={"fingerprint": "ab", "mask": 256},
    rows={"train": [{"rows": 9, "documents": 4, "tokens": 99}], "valid": None},
    data={"stages": [{"start": 0, "weights": [1.0]}]},
    wandb_id="abc",
)


def stored(state: TrainState) -> dict[str, Any]:
    return json.loads(json.dumps(state.to_json()))


@pytest.mark.parametrize("state", [STATE, TrainState()], ids=["full", "new"])
def test_the_state_survives_json(state: TrainState) -> None:
    assert TrainState.from_json(stored(state), "manifest.json") == state


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"step": "7"},
            r"^m\.json is damaged \(train_state\.step='7' is not a whole number; give a whole number\); use",
        ),
        ({"step": -1}, r"train_state\.step=-1 is outside \[0, "),
        ({"skipped_steps": 10**30}, r"train_state\.skipped_steps=10+ is outside"),
        ({"recent_losses": [float("nan")]}, r"train_state\.recent_losses\[0\]=nan is not finite"),
        ({"intervals": {"4": [0.5]}}, r"train_state\.intervals\.4=\[0\.5\] has 1 value; it takes 2"),
        ({"intervals": {"x": [0.5, 1]}}, r"train_state\.intervals='x' is not a whole number"),
        ({"rows": {"train": [{"rows": 1}], "valid": None}}, r"train_state\.rows\.train\[0\]\.documents is not set"),
        (
            {"steps": 7},
            r"unknown key train_state\.steps; did you mean train_state\.step\?\); use another checkpoint\.$",
        ),
    ],
)
def test_a_state_that_no_run_has_is_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        TrainState.from_json(stored(STATE) | change, "m.json")


def test_a_changed_state_is_read_or_refused_in_one_sentence() -> None:
    assert 100 < num_refused(stored(STATE), "state", 300, lambda tree: TrainState.from_json(tree, "m.json")) < 300
