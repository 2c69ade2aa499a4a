"""The mean of several checkpoints of one run: the last k, the best k by held-out loss, or those that are named.

Decides: weights are added in float64 parameter by parameter, and the result is a checkpoint of kind "whole" that every
tool reads like any other. Which ones are best is read from the run's own record. Refuses: checkpoints of different
models, fewer than asked for, and records without evaluations.
Source: LAWA / checkpoint merging as in LLaDA2 (arXiv 2512.15745), which averages the k checkpoints of lowest loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bd3_megatron.checkpoint.layout import Manifest, checkpoint_folders, read_manifest
from bd3_megatron.checkpoint.read import CheckpointReader, open_checkpoint
from bd3_megatron.checkpoint.verify import problem_of, verify
from bd3_megatron.checkpoint.whole import write_whole
from bd3_megatron.errors import CheckpointError
from bd3_megatron.files import json_record

LOSS = "eval/nll_nats_per_token"


def last_checkpoints(run_dir: Path, count: int, *, warn: Callable[[str], None] | None = None) -> list[Path]:
    """The newest `count` complete checkpoints of a run, newest first.

    Raises:
        CheckpointError: there are fewer.
    """
    return _first(complete_checkpoints(run_dir, warn=warn), count, run_dir)


def best_checkpoints(run_dir: Path, count: int, *, warn: Callable[[str], None] | None = None) -> list[Path]:
    """The `count` complete checkpoints whose step was evaluated best, best first.

    Raises:
        CheckpointError: there are fewer.
    """
    losses = evaluated_losses(run_dir / "metrics.jsonl")
    evaluated = [(losses.get(read_manifest(path).step), path) for path in complete_checkpoints(run_dir, warn=warn)]
    # By loss, then by name: equal losses give the same choice on every machine.
    ranked = sorted((loss, str(path)) for loss, path in evaluated if loss is not None)
    return _first([Path(path) for _, path in ranked], count, run_dir)


def complete_checkpoints(run_dir: Path, *, warn: Callable[[str], None] | None = None) -> list[Path]:
    """Every checkpoint of a run whose files are as they were written, newest first."""
    found = []
    for path in checkpoint_folders(run_dir / "checkpoints"):
        problem = problem_of(path)
        if problem is None:
            found.append(path)
        elif warn is not None:
            warn(f"skips checkpoint {path.name}: {problem}")
    return found


def evaluated_losses(metrics: Path) -> dict[int, float]:
    """Held-out loss, nats per token, of every step that was evaluated."""
    losses: dict[int, float] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []:
        record = json_record(line) or {}
        if type(record.get("step")) is int and type(record.get(LOSS)) is float:
            # A step evaluated twice (after a resume) counts with its later value.
            losses[record["step"]] = record[LOSS]
    return losses


def average(paths: Sequence[Path], out: Path, *, raw: bool = False) -> Manifest:
    """Write the mean of checkpoints as a checkpoint.

    Args:
        paths: two or more, of one model; the first one's manifest is kept, with the origin added.
        out: the checkpoint's folder; must not exist.
        raw: average trained weights in place of their moving averages.

    Raises:
        CheckpointError: fewer than two, damaged, or of different models.
    """
    if len(paths) < 2:
        raise CheckpointError(f"{len(paths)} checkpoint is nothing to average; name two or more.")
    # Every byte is checked: a mean hides one damaged checkpoint.
    manifests = [verify(path) for path in paths]
    readers = [open_checkpoint(path) for path in paths]
    # All or none: a mean of averages and of trained weights is neither.
    which = "model" if raw or any("ema" not in reader.kinds() for reader in readers) else "ema"
    shapes = _shapes(readers[0])
    for reader in readers[1:]:
        if _shapes(reader) != shapes:
            raise CheckpointError(
                f"{reader.folder} and {readers[0].folder} are of different models; average one run's."
            )
    # The mean stands for the latest state: step, configuration and ids are taken from there.
    newest = max(manifests, key=lambda manifest: manifest.step)
    origin = {"averaged_steps": [manifest.step for manifest in manifests], "weights": which}
    single = {"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "dp": 1}
    # Written whole by one process; no optimizer state of a mean exists.
    described = replace(newest, grid=single, zero_stage=1, world_size=1, engine={}, origin=origin, files={})
    return write_whole(out, described, shapes, lambda name: _mean(readers, name, which))


def _shapes(reader: CheckpointReader) -> dict[str, tuple[int, ...]]:
    # expert biases are averaged with the routers that they belong to
    return {name: reader.shape(name) for name in (*reader.names(), *reader.bias_names())}


def _mean(readers: Sequence[CheckpointReader], name: str, which: str) -> Tensor:
    # In float64: the sum of k fp32 tensors would lose up to log2(k) bits.
    total = readers[0].tensor(name, which).double()
    for reader in readers[1:]:
        total += reader.tensor(name, which)
    return (total / len(readers)).to(torch.float32)


def _first(paths: list[Path], count: int, run_dir: Path) -> list[Path]:
    if len(paths) < count:
        raise CheckpointError(f"{run_dir} has {len(paths)} such checkpoints, {count} were asked for; ask for fewer.")
    return paths[:count]
