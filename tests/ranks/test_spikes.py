"""A batch far worse than its neighbours does not move the weights: it is left out, or the run returns to its checkpoint
and goes on behind it; the record says which, on every grid alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.ranks.train_runs import train, train_config, write_data

STEPS = 24


def spiky(
    tmp_path: Path, name: str, action: str, *, tokens: int | None = None, **parallel: int
) -> list[dict[str, Any]]:
    """A run that hardly learns, so that its losses scatter about one mean and some stand 4 % above it."""
    config = train_config(
        tmp_path / "data",
        tmp_path / name,
        train={
            "steps": STEPS if tokens is None else None,
            "tokens": tokens,
            "micro_batch_size": 8,
            "spike_factor": 1.04,
            "spike_action": action,
        },
        optim={"lr": 1e-9},
        checkpoint={"every_steps": 6, "keep_last": 0},
        parallel=parallel,
    )
    train(config)
    return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]


def test_a_spike_is_skipped_and_counted_on_every_grid(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    records = spiky(tmp_path, "one", "skip")
    spikes = [r["step"] for r in records if r.get("event") == "loss_spike"]
    assert spikes and min(spikes) > 16
    last = records[-1]
    assert (last["step"], last["optim/skipped_steps"]) == (STEPS, len(spikes))
    on_grid = spiky(tmp_path, "two", "skip", tp=2)
    assert [r["step"] for r in on_grid if r.get("event") == "loss_spike"] == spikes


def test_a_rollback_goes_on_behind_the_batch(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    records = spiky(tmp_path, "run", "rollback")
    rollbacks = [r for r in records if r.get("event") == "rollback"]
    assert rollbacks
    assert len({r["step"] for r in rollbacks}) == len(rollbacks), "a checkpoint is returned to once"
    for one in rollbacks:
        assert one["step"] % 6 == 0 and one["from_step"] > one["step"]
    steps = [r["step"] for r in records if "loss/train_nats_per_token" in r]
    assert steps == list(range(1, STEPS + 1))
    # every sample seen on the way counts once, those before a rollback too
    lost = sum(r["from_step"] - r["step"] for r in rollbacks)
    assert records[-1]["tokens"] == (STEPS + lost) * 8 * 32


def test_a_rollback_uses_up_a_budget_of_tokens(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    records = spiky(tmp_path, "run", "rollback", tokens=STEPS * 8 * 32)
    lost = sum(r["from_step"] - r["step"] for r in records if r.get("event") == "rollback")
    assert lost and records[-1]["step"] == STEPS - lost
    assert records[-1]["tokens"] == STEPS * 8 * 32
