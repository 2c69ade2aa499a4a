"""The manifest of a run's present state, files excepted. Knows the engine's counters; reads no clock."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bd3_megatron.checkpoint.layout import MANIFEST, Manifest
from bd3_megatron.checkpoint.pieces import adam_step
from bd3_megatron.config.load import config_from_tree, to_tree
from bd3_megatron.config.schema import Config
from bd3_megatron.errors import CheckpointError, ConfigError, cut

if TYPE_CHECKING:
    from bd3_megatron.engine.zero_engine import ZeroEngine

QUOTED_CHARACTERS = 240
"""Of the reason in a sentence that names a manifest's path too."""
RECORDED_PACKAGES = ("bd3-megatron", "torch", "deepspeed", "megatron-core")


def describe_run(
    engine: ZeroEngine,
    config: Config,
    *,
    step: int,
    samples_consumed: int,
    train_state: dict[str, Any],
    evaluation: dict[str, Any],
) -> Manifest:
    """What the manifest says before the files are known.

    Args:
        engine: between two steps.
        config: the run.
        step: optimizer updates done.
        samples_consumed: position in the order of data.
        train_state: the trainer's own; plain JSON.
        evaluation: how likelihood is measured; plain JSON.
    """
    topology, vocabulary = engine.model.topology, engine.model.vocabulary
    # Not every optimizer of DeepSpeed has the attribute; bf16 and fp32 training does not scale the loss.
    loss_scale = getattr(engine.engine.optimizer, "loss_scale", 1.0)
    return Manifest(
        step=step,
        samples_consumed=samples_consumed,
        grid=topology.grid,
        zero_stage=engine.stage,
        world_size=topology.world_size,
        config=to_tree(config),
        git_commit=source_commit(),
        seeds={"run": config.run.seed},
        vocab_size=vocabulary.size,
        mask_id=vocabulary.mask_id,
        train_state=train_state,
        evaluation=evaluation,
        engine={
            "adam_step": adam_step(engine),
            "skipped_steps": engine.skipped_steps,
            "global_steps": int(engine.engine.global_steps),
            "ema_updates": None if engine.ema is None else engine.ema.num_updates,
            "loss_scale": float(loss_scale) if isinstance(loss_scale, int | float) else 1.0,
        },
        software=software_versions(),
    )


def config_of(manifest: Manifest, folder: Path) -> Config:
    """The configuration of the run that saved a checkpoint.

    Args:
        manifest: of the checkpoint.
        folder: of the checkpoint, for the sentence.

    Raises:
        CheckpointError: no run could have it. Nobody who reads the checkpoint wrote these settings.
    """
    try:
        return config_from_tree(manifest.config)
    except ConfigError as error:
        made_by = (
            "" if manifest.git_commit is None else f", or the program that made it (commit {manifest.git_commit:.12})"
        )
        raise CheckpointError(
            f"the checkpoint's own settings, config in {folder / MANIFEST}, are refused: "
            f"{cut(str(error).rstrip('.'), QUOTED_CHARACTERS)}; use another checkpoint{made_by}."
        ) from error


def software_versions() -> dict[str, str]:
    """Versions of what writes checkpoints, as far as they are installed."""
    found = {}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def source_commit() -> str | None:
    """The commit this package runs from: of the checkout, or as noted in a launcher's copy of one; None elsewhere."""
    # A launcher copies the checkout without .git to its jobs and writes the commit beside the package.
    noted = Path(__file__).resolve().parents[2] / "COMMIT"
    root = noted.with_name(".git")
    try:
        if noted.is_file():
            return noted.read_text().strip() or None
        # Read from git's files: compute nodes need not have git installed.
        head = (root / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        loose = root / name
        if loose.is_file():
            return loose.read_text().strip()
        # git moves branch heads from their loose files into this one when it packs.
        packed = (root / "packed-refs").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    return next((line.split()[0] for line in packed if line.endswith(f" {name}")), None)
