"""Going on where a run stopped: from the newest checkpoint that is whole, or from the beginning, and saying which.

Decides: what may differ from the run that made the checkpoint. The grid, saving, logging and evaluation may; a budget may
grow; anything that changes what is learned must be named on the command line, and is listed and refused otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bd3_megatron.checkpoint.layout import checkpoint_folders
from bd3_megatron.checkpoint.load import load
from bd3_megatron.checkpoint.verify import newest_valid
from bd3_megatron.config.load import config_from_tree, flatten
from bd3_megatron.config.schema import Config
from bd3_megatron.engine.zero_engine import ZeroEngine
from bd3_megatron.errors import CheckpointError, ConfigError
from bd3_megatron.train.state import TrainState

FREE_SECTIONS = ("parallel", "checkpoint", "evaluate", "log", "throughput", "watch", "attention")
FREE_KEYS = (
    "run.dir",
    "run.overridden",
    "data.path",
    "data.num_workers",
    "train.steps",
    "train.tokens",
    "train.micro_batch_size",
    "train.recompute",
    "train.recompute_layers",
    "train.skip_dead_rows",
    "train.stop_file",
    "train.max_skipped_steps",
)


def resume(engine: ZeroEngine, run_dir: Path, config: Config, say: Callable[[str], None]) -> TrainState:
    """Load the newest whole checkpoint of the run, if there is one. Collective.

    Returns:
        The state to go on from.

    Raises:
        CheckpointError: all checkpoints are damaged, or the newest whole one is of another model.
        ConfigError: settings differ that were not named on the command line.
    """
    folder = run_dir / "checkpoints"
    found = newest_valid(folder, warn=say)
    if found is None:
        damaged = len(checkpoint_folders(folder))
        if damaged:
            raise CheckpointError(
                f"all {damaged} checkpoints in '{folder}' are damaged; restore one, or remove the folder to start anew."
            )
        say(f"no checkpoint in {run_dir}: starts anew")
        return TrainState()
    path, manifest = found
    refuse_changes(config_from_tree(manifest.config), config)
    load(engine, path)
    state = TrainState.from_json(manifest.train_state)
    say(f"resumes at step {state.step} from {path}")
    return state


def refuse_changes(saved: Config, config: Config) -> None:
    """Refuse settings that differ from the checkpoint's without being named.

    Raises:
        ConfigError: lists every one of them.
    """
    before, now = flatten(saved), flatten(config)
    changed = [key for key in now if before.get(key) != now[key] and not _may_change(key, config)]
    if changed:
        listed = "; ".join(f"{key} was {_short(before.get(key))} and is {_short(now[key])}" for key in changed)
        raise ConfigError(
            f"the checkpoint was made with other settings: {listed}; "
            f"restore them, or name what you mean to change on the command line, as {changed[0]}=VALUE."
        )


def _may_change(key: str, config: Config) -> bool:
    # of a nested value (a mixture's weight, a stream's split) the command line may name a part
    named = any(name == key or name.startswith(f"{key}.") for name in config.run.overridden)
    return key in FREE_KEYS or key.split(".")[0] in FREE_SECTIONS or named


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
