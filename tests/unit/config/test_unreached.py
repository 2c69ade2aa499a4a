"""What a run ends too early for is said with both numbers, and what it just reaches is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from bd3_megatron.config.load import load_config
from bd3_megatron.config.unreached import unreached_settings
from bd3_megatron.config.validate import validate

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
GUARD = ["train.spike_factor=3", "train.spike_action=rollback"]
BATCH = ["train.warmup_batch_size=2"]


def said(*overrides: str) -> list[str]:
    """Of debug_cpu, which has 30 steps and saves every 10."""
    config = load_config(CONFIGS / "debug_cpu.yaml", overrides)
    validate(config)
    return unreached_settings(config)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_runs_reach_all_that_they_ask_for(path: Path) -> None:
    assert unreached_settings(load_config(path)) == []


@pytest.mark.parametrize(
    ("reached", "beyond", "sentence"),
    [
        (
            ["optim.warmup_steps=30"],
            ["optim.warmup_steps=31"],
            "optim.warmup_steps=31 is not reached in a run of 30 steps (train.steps=30): the learning rate ends at 0.000968 of "
            "0.001",
        ),
        (
            ["optim.min_lr_ratio=0.1", "optim.schedule=wsd"],
            ["optim.min_lr_ratio=0.1"],
            "optim.min_lr_ratio=0.1 has no effect with optim.schedule=constant",
        ),
        (
            [
                "diffusion.phases=[{block_size: 8, steps: 20, lr_warmup_steps: 20}, {block_size: 4, lr_warmup_steps: 10}]"
            ],
            [
                "diffusion.phases=[{block_size: 8, steps: 20, lr_warmup_steps: 25}, {block_size: 4, lr_warmup_steps: 10}]"
            ],
            "diffusion.phases[0].lr_warmup_steps=25 is more than the 20 steps that the phase has: its warm-up ends at 80% of "
            "the rate",
        ),
        (
            ["diffusion.phases=[{block_size: 8, steps: 20}, {block_size: 4, steps: 99, lr_warmup_steps: 10}]"],
            ["diffusion.phases=[{block_size: 8, steps: 20}, {block_size: 4, steps: 99, lr_warmup_steps: 20}]"],
            "diffusion.phases[1].lr_warmup_steps=20 is more than the 10 steps that the phase has: its warm-up ends at 50% of "
            "the rate",
        ),
        (
            [*BATCH, "train.batch_warmup_steps=29"],
            [*BATCH, "train.batch_warmup_steps=30"],
            "train.batch_warmup_steps=30 is not reached in a run of 30 steps (train.steps=30): the batch ends at 6 of 8 "
            "sequences",
        ),
        (
            ["evaluate.every_steps=30"],
            ["evaluate.every_steps=31"],
            "evaluate.every_steps=31 is not reached in a run of 30 steps (train.steps=30): nothing is evaluated",
        ),
        (
            ["evaluate.every_steps=31", "evaluate.at_start_and_end=true"],
            ["evaluate.every_steps=31", "train.steps=null", "train.tokens=15000"],
            "evaluate.every_steps=31 is not reached in a run of 30 steps (train.tokens=15000): nothing is evaluated",
        ),
        (
            ["log.every_steps=30"],
            ["log.every_steps=31"],
            "log.every_steps=31 is not reached in a run of 30 steps (train.steps=30): only the last step is recorded",
        ),
        (
            ["log.profile_steps=[1, 30]"],
            ["log.profile_steps=[1, 31, 40]"],
            "log.profile_steps=[31, 40] is not reached in a run of 30 steps (train.steps=30): no trace of them is written",
        ),
        (
            ["diffusion.search_every_steps=29"],
            ["diffusion.search_every_steps=30"],
            "diffusion.search_every_steps=30 meets no step of block size 4 in a run of 30 steps (train.steps=30): its noise "
            "interval is never searched",
        ),
        (
            # its first phase has an interval of its own
            [
                "diffusion.search_every_steps=15",
                "diffusion.phases=[{block_size: 8, steps: 15, interval: [0.1, 1]}, {block_size: 4}]",
            ],
            ["diffusion.search_every_steps=15", "diffusion.phases=[{block_size: 8, steps: 15}, {block_size: 4}]"],
            "diffusion.search_every_steps=15 meets no step of block size 8 in a run of 30 steps (train.steps=30): its noise "
            "interval is never searched",
        ),
        (
            ["checkpoint.every_steps=4", "checkpoint.keep_every_steps=14"],
            ["checkpoint.every_steps=4", "checkpoint.keep_every_steps=16", "train.steps=15"],
            "checkpoint.keep_every_steps=16 meets no saved step in a run of 15 steps (train.steps=15, checkpoint.every_steps=4)"
            ": no checkpoint is kept for it",
        ),
        (
            [*GUARD, "checkpoint.every_steps=29"],
            [*GUARD, "checkpoint.every_steps=30"],
            "train.spike_action=rollback has nothing to return to, since checkpoint.every_steps=30 is not reached in a run of 30 "
            "steps (train.steps=30): the batch of a spike is left out",
        ),
    ],
)
def test_what_is_just_reached_passes_and_what_lies_beyond_is_said(
    reached: list[str], beyond: list[str], sentence: str
) -> None:
    assert said(*reached) == []
    assert said(*beyond) == [sentence]


@pytest.mark.parametrize("end", ["train.steps=20", "checkpoint.keep_last=0"])
def test_a_kept_checkpoint_may_be_the_last_one_or_any(end: str) -> None:
    kept = ["checkpoint.every_steps=0", "checkpoint.keep_every_steps=20"]
    assert said(*kept, end) == [] and len(said(*kept)) == 1


def test_defaults_are_nothing_that_was_asked_for() -> None:
    assert said("log.every_steps=10", "train.steps=3", "checkpoint.every_steps=1000") == []
