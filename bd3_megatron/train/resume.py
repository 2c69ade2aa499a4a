"""Going on where a run stopped: from the newest checkpoint that is whole, or from the beginning, and saying which.

Every setting that differs from the checkpoint's is said with both values. The grid, saving, logging and evaluation may
differ freely, what changes learning must be named on the command line, and what gives the stored numbers another meaning
is refused, unless `run.reinterpret` is named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bd3_megatron.checkpoint.describe import QUOTED_CHARACTERS, config_of
from bd3_megatron.checkpoint.layout import MANIFEST, Manifest, checkpoint_folders
from bd3_megatron.checkpoint.load import load
from bd3_megatron.checkpoint.verify import newest_valid
from bd3_megatron.config.load import flatten
from bd3_megatron.config.schema import Config
from bd3_megatron.errors import CheckpointError, ConfigError, cut
from bd3_megatron.train.plan import RunPlan
from bd3_megatron.train.state import DataIdentity, TrainState

if TYPE_CHECKING:
    from bd3_megatron.engine.zero_engine import ZeroEngine

UNCOMPARED = ("run.overridden", "run.reinterpret")
"""What a launch says about itself."""
# The grid, saving, logging and evaluation: a run may be moved to other machines without naming it.
FREE_SECTIONS = ("parallel", "checkpoint", "evaluate", "log", "throughput", "watch", "attention")
FREE_KEYS = (
    "run.dir",
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
    # what is measured changes, what is learned does not
    "rows.valid",
)
TEXT_KEYS = ("data.path", "data.text", "data.mixture", "data.stages")
"""Which text is read."""
MEANING_SECTIONS = ("model", "tokenizer")
"""Shapes, or what stored weights and token ids stand for."""
MEANING_KEYS = ("diffusion.objective",)
# They need to be named like any other learning setting, but give no stored number another meaning.
LEARNING_KEYS = ("model.dropout", "model.init_std", "model.experts.bias_rate", "model.experts.counted_rows")
"""Of the model section, what changes how it learns but not what its weights are."""
HELD_OUT = "rows.held_out_fraction"
"""Share of documents that the training text has left out so far."""
VALUE_CHARACTERS = 60


@dataclass(frozen=True)
class Change:
    """A setting that differs from the checkpoint's."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        before, now = self.before, self.now
        # Of a nested section only the settings that differ, which else might be cut away.
        if isinstance(before, dict) and isinstance(now, dict) and set(before) == set(now):
            apart = [name for name in before if before[name] != now[name]]
            before, now = ({name: tree[name] for name in apart} for tree in (before, now))
        return f"{self.key} was {_short(before)} and is {_short(now)}"

    @property
    def is_free(self) -> bool:
        """What is learned does not depend on it."""
        return self.key in FREE_KEYS or self.key.split(".")[0] in FREE_SECTIONS or self.key == HELD_OUT

    @property
    def is_meaning(self) -> bool:
        """The checkpoint's numbers would stand for something else."""
        # Documents held out from now on were trained on: their loss would pass for that of unseen text.
        if self.key == HELD_OUT:
            return bool(self.now > self.before)
        in_section = self.key.split(".")[0] in MEANING_SECTIONS and self.key not in LEARNING_KEYS
        return in_section or self.key in MEANING_KEYS

    def is_named(self, config: Config) -> bool:
        """The command line names it, or a part of its value (a mixture's weight, a stream's split)."""
        # no setting counts the text: whoever names what is read means the text that is there now
        keys = TEXT_KEYS if self.key == "rows.train" else (self.key,)
        return any(name == key or name.startswith(f"{key}.") for name in config.run.overridden for key in keys)

    @property
    def remedy(self) -> str:
        """The setting that a command line names to allow it."""
        return TEXT_KEYS[0] if self.key == "rows.train" else self.key


def resume(
    engine: ZeroEngine, run_dir: Path, config: Config, identity: DataIdentity, say: Callable[[str], None]
) -> TrainState:
    """Load the newest whole checkpoint of the run, if there is one. Collective.

    Args:
        engine: takes the weights.
        run_dir: the run's folder.
        config: of this attempt.
        identity: tokenizer and row counts of the data.
        say: told what is resumed and what differs.

    Returns:
        The state to go on from.

    Raises:
        CheckpointError: all checkpoints are damaged, or the newest whole one is of another model.
        ConfigError: settings differ that may not, or were not named on the command line.
    """
    folder = run_dir / "checkpoints"
    # Verified before it is chosen: a torn newest checkpoint falls back to the one before it.
    found = newest_valid(folder, warn=say)
    if found is None:
        damaged = len(checkpoint_folders(folder))
        # Starting anew here would overwrite a run that may only need a file restored.
        if damaged:
            raise CheckpointError(
                f"all {damaged} checkpoints in '{folder}' are damaged; restore one, or remove the folder to start anew."
            )
        say(f"no checkpoint in {run_dir}: starts anew")
        return TrainState(**identity.to_json(), origin_step=0, origin_samples=0)
    path, manifest = found
    saved, state = saved_run(path, manifest)
    # checkpoints of older versions do not know their data
    known = DataIdentity(tokenizer=state.tokenizer or identity.tokenizer, rows=state.rows or identity.rows)
    changed = changes(saved, config, data=(known, identity))
    # Before any weight is touched.
    refuse_changes(changed, config)
    load(engine, path)
    state.tokenizer, state.rows = dict(identity.tokenizer), dict(identity.rows)
    # Samples consumed so far are a fact, whatever batch sizes this attempt has.
    plan = _plan_from_origin(manifest, config, state)
    # only samples are asked of it: this attempt's budget may end before the step that was reached
    if plan is None or plan.samples_before(manifest.step) != state.samples_consumed:
        state.origin_step, state.origin_samples = state.step, state.samples_consumed
    say(f"resumes at step {state.step} from {path}")
    for change in changed:
        say(f"since that checkpoint: {change}")
    return state


def saved_run(path: Path, manifest: Manifest) -> tuple[Config, TrainState]:
    """Settings and state that a checkpoint holds, found to agree with each other.

    Args:
        path: the checkpoint's folder, for sentences.
        manifest: its manifest.

    Raises:
        CheckpointError: one of them is damaged, or no run with these settings comes to this state.
    """
    where = str(path / MANIFEST)
    config, state = config_of(manifest, path), TrainState.from_json(manifest.train_state, where)
    try:
        due = _due(manifest, config, state)
    except ConfigError as error:
        reason = cut(str(error).rstrip("."), QUOTED_CHARACTERS)
        raise CheckpointError(
            f"the settings in {where} are no plan of a run: {reason}; use another checkpoint."
        ) from error
    for name, value in due.items():
        found = getattr(state, name)
        if found != value:
            raise CheckpointError(
                f"{where}: train_state.{name}={found}, and at step {manifest.step} its settings come to {value}; "
                "use another checkpoint."
            )
    return config, state


def _due(manifest: Manifest, config: Config, state: TrainState) -> dict[str, Any]:
    """What the state of that step must hold, by field."""
    due: dict[str, Any] = {"step": manifest.step, "samples_consumed": manifest.samples_consumed}
    plan = _plan_from_origin(manifest, config, state)
    if plan is None:
        return due
    due["samples_consumed"] = plan.samples_before(manifest.step)
    if manifest.step > plan.origin_step:
        due["block_size"] = plan.phase_at(manifest.step - 1).phase.block_size
    return due


def _plan_from_origin(manifest: Manifest, config: Config, state: TrainState) -> RunPlan | None:
    first, samples = state.origin_step, state.origin_samples
    # older checkpoints do not say where their attempt began, and batches may have changed on the way
    return None if first is None or samples is None or first > manifest.step else RunPlan(config, first, samples)


def changes(saved: Config, config: Config, *, data: tuple[DataIdentity, DataIdentity] | None = None) -> list[Change]:
    """Every setting that differs.

    Args:
        saved: the checkpoint's.
        config: this attempt's.
        data: the checkpoint's and this attempt's.
    """
    before, now = _compared(saved), _compared(config)
    if data is not None:
        was, is_now = data
        before |= _identity_values(was, len(is_now.rows["train"]))
        now |= _identity_values(is_now, len(was.rows["train"]))
    return [
        Change(key, before.get(key), value)
        for key, value in now.items()
        if before.get(key, value if key == HELD_OUT else None) != value and key not in UNCOMPARED
    ]


def refuse_changes(changed: list[Change], config: Config) -> None:
    """Refuse what may not differ, or differs without being named.

    Raises:
        ConfigError: lists every one of them with both values.
    """
    # From the command line only: left in a file, it would allow every later change too.
    reinterprets = config.run.reinterpret and "run.reinterpret" in config.run.overridden
    other = [] if reinterprets else [change for change in changed if change.is_meaning]
    if other:
        raise ConfigError(
            f"the checkpoint's numbers would mean something else: {'; '.join(map(str, other))}; restore the setting, begin in "
            "a new run.dir, or name run.reinterpret=true on the command line if that is what you want."
        )
    unnamed = [c for c in changed if not (c.is_free or c.is_meaning or c.is_named(config))]
    if unnamed:
        raise ConfigError(
            f"the checkpoint was made with other settings: {'; '.join(map(str, unnamed))}; "
            f"restore them, or name what you mean to change on the command line, as {unnamed[0].remedy}=VALUE."
        )


def _identity_values(identity: DataIdentity, num_sources: int) -> dict[str, Any]:
    """What is compared of a run's data; of the training sources the first `num_sources`, since a mixture may grow."""
    # documents and tokens, not rows: how they are cut into rows is compared by its own settings
    names = ("documents", "tokens", "supervised")
    counts = [{name: source[name] for name in names if name in source} for source in identity.rows["train"]]
    values = {f"tokenizer.{name}": value for name, value in identity.tokenizer.items()}
    # not known of checkpoints of older versions
    values |= {HELD_OUT: fraction} if (fraction := identity.rows.get("held_out_fraction")) is not None else {}
    return values | {"rows.train": counts[:num_sources], "rows.valid": identity.rows["valid"]}


def _compared(config: Config) -> dict[str, Any]:
    model = config.model
    # what is derived may also be written down
    derived = {"num_kv_heads": model.kv_heads, "head_dim": model.head_width, "ffn_hidden_size": model.ffn_width}
    return {
        **flatten(config),
        **{f"model.{name}": value for name, value in derived.items()},
    }


def _short(value: Any) -> str:
    return cut(str(value), VALUE_CHARACTERS)
