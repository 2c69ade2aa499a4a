"""A run that would leave out something it was asked for is refused, with both numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from bd3_megatron.config.load import load_config
from bd3_megatron.config.validate import validate
from bd3_megatron.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
DEBUG = CONFIGS / "debug_cpu.yaml"
STAGES = "data.stages=[{{mixture: {{a: 1}}, {0}}}, {{mixture: {{b: 1}}}}]"


@pytest.mark.parametrize(
    "overrides",
    [
        ["diffusion.phases=[{block_size: 8, steps: 29}, {block_size: 4}]"],
        ["diffusion.phases=[{block_size: 8, steps: 29}, {block_size: 4, steps: 1}]"],
        ["diffusion.phases=[{block_size: 8, tokens: 14848}, {block_size: 4}]"],
        [STAGES.format("steps: 29")],
        [STAGES.format("tokens: 15296")],
        ["data.valid_fraction=0"],
        ["data.valid_fraction=0", "data.path=prepared", "evaluate.every_steps=5"],
        ["evaluate.every_steps=5", "diffusion.search_every_steps=5"],
        ["watch.hang_factor=20", "watch.hang_seconds=1199"],
        ["watch.hang_seconds=5000"],
        ["optim.lr=1.0", "optim.weight_decay=0.99"],
    ],
)
def test_what_happens_as_asked_passes(overrides: list[str]) -> None:
    validate(load_config(DEBUG, overrides))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["diffusion.phases=[{block_size: 8, steps: 30}, {block_size: 4}]"],
            r"^diffusion\.phases\[1\] begins at step 30 and the run ends at step 30 \(train\.steps=30\), so it would never train;"
            r" raise the budget, shorten the phases before it, or leave it out\.$",
        ),
        (
            ["diffusion.phases=[{block_size: 8, tokens: 14849}, {block_size: 4}]"],
            r"^diffusion\.phases\[1\] begins at step 30 and the run ends at step 30",
        ),
        (
            ["diffusion.phases=[{block_size: 8, steps: 10}, {block_size: 4, steps: 19}]"],
            r"^diffusion\.phases end at step 29 and the run has 30 steps \(train\.steps=30\); lower the budget, or leave out",
        ),
        (
            [STAGES.format("steps: 30")],
            r"^data\.stages\[1\] begins at sample 240 and the run ends at sample 240 \(train\.steps=30\), so it would never be",
        ),
        ([STAGES.format("tokens: 15297")], r"^data\.stages\[1\] begins at sample 240 and the run ends at sample 240"),
        (
            ["data.valid_fraction=0", "evaluate.every_steps=5"],
            r"^data\.valid_fraction=0\.0 holds no text out, and evaluate\.every_steps=5 needs held-out rows; hold some "
            r"out, or set evaluate\.every_steps to 0\.$",
        ),
        (
            ["data.valid_fraction=0", "evaluate.at_start_and_end=true"],
            r"at_start_and_end=True needs held-out rows; .* or set evaluate\.at_start_and_end to false\.$",
        ),
        (
            ["data.valid_fraction=0", "diffusion.search_every_steps=5"],
            r"and diffusion\.search_every_steps=5 needs held-out",
        ),
        (
            ["evaluate.official=true", "evaluate.draws=4"],
            r"^evaluate\.draws=4 with evaluate\.official=true, which scores one draw; leave one of them out\.$",
        ),
        (
            ["diffusion.search_every_steps=5", "diffusion.search_widths=[]"],
            r"^diffusion\.search_every_steps=5 with search_widths=\[\] leaves no intervals to compare; give widths",
        ),
        (
            ["diffusion.search_every_steps=5", "diffusion.phases=[{block_size: 4, interval: [0.3, 0.8]}]"],
            r"^diffusion\.search_every_steps=5 has nothing to search for, because every phase names its interval; leave one out",
        ),
        (["run.dir=/"], r"^run\.dir=/ is the root of the file system; name a folder of its own, such as runs/first\.$"),
        (["run.dir=//usr/.."], r"^run\.dir=//usr/\.\. is the root of the file system"),
        (
            ["train.spike_action=rollback"],
            r"^train\.spike_action=rollback with train\.spike_factor=0, which looks for no spike; set spike_factor, for example",
        ),
        (
            ["train.spike_action=rollback", "train.spike_factor=3", "checkpoint.every_steps=0"],
            r"^train\.spike_action=rollback with checkpoint\.every_steps=0: no checkpoint is saved before the end, so there is",
        ),
        (
            ["optim.lr=10", "optim.weight_decay=0.1"],
            r"^optim\.lr=10\.0 x optim\.weight_decay=0\.1 = 1 is 1 or more, so each update would take away all of a weight;",
        ),
        (
            ["watch.hang_factor=20", "watch.hang_seconds=1200"],
            r"^watch\.hang_seconds=1200 is not below parallel\.collective_timeout_seconds=1200, so the collective would give up "
            r"before the watchdog names the rank; raise the time-out to more than 1200, or lower hang_seconds\.$",
        ),
    ],
)
def test_what_could_not_happen_as_asked_is_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        validate(load_config(DEBUG, overrides))


def test_a_curriculum_that_a_small_budget_never_reaches_is_refused_with_both_numbers() -> None:
    config = load_config(CONFIGS / "ar_to_bd_qwen3_0b6.yaml", ["train.tokens=4096"])
    with pytest.raises(ConfigError, match=r"^diffusion\.phases\[1\] begins at step 4769 and the run ends at step 1 "):
        validate(config)


def test_a_stop_file_is_never_somebodys_file(tmp_path: Path) -> None:
    precious, empty = tmp_path / "thesis.md", tmp_path / "stop"
    precious.write_text("years of work")
    empty.touch()
    for path, held in ((precious, "holds 13 bytes"), (tmp_path, "is a folder")):
        with pytest.raises(
            ConfigError, match=f"^train.stop_file={path} {held}, and a stop file is removed once it is ob"
        ):
            validate(load_config(DEBUG, [f"train.stop_file={path}"]))
    for path in (empty, tmp_path / "new"):
        validate(load_config(DEBUG, [f"train.stop_file={path}"]))
