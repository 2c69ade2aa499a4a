"""DeepSpeed's universal form of a checkpoint: every parameter whole, one folder each, readable from any grid.

Contract: under zero/, in DeepSpeed's layout, each parameter's folder holds fp32, moments and step, a .pt file each; ema/
holds the averaged weights likewise. All ranks convert together, each every n-th parameter, out of core. A finished form is
kept beside the checkpoint and used again; one made from another manifest is made anew.
Source: DeepSpeed 0.19.8 deepspeed/checkpoint/ds_to_universal.py, universal_checkpoint.py.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bd3_megatron.checkpoint import agree
from bd3_megatron.checkpoint.describe import config_of
from bd3_megatron.checkpoint.files import check_space, write_torch
from bd3_megatron.checkpoint.layout import (
    AVERAGES_KIND,
    MANIFEST,
    TEMPORARY_PREFIX,
    UNIVERSAL_SUFFIX,
    WEIGHTS_KIND,
    digest_bytes,
)
from bd3_megatron.checkpoint.pieces import MOMENTS
from bd3_megatron.checkpoint.read import CheckpointReader
from bd3_megatron.checkpoint.restricted_pickle import open_pt
from bd3_megatron.checkpoint.universal_info import universal_info
from bd3_megatron.compat.deepspeed import EXPERT_GROUP
from bd3_megatron.errors import CheckpointError, FileError
from bd3_megatron.files import discard, move, write_text
from bd3_megatron.model.partition import Partition, partition_of

# Holds the digest of the manifest that the form was made from: a checkpoint saved again makes it stale.
COMPLETE = "COMPLETE"
ZERO_DIR = "zero"
# DeepSpeed's layout has no averages; they get a tree of their own beside zero/.
_EMA_DIR = "ema"


def universal_form(reader: CheckpointReader) -> Path:
    """The universal form of a checkpoint, made now unless it is there. Collective when there is a process group.

    Args:
        reader: of a verified checkpoint; its files are let go.

    Returns:
        The folder beside it.

    Raises:
        CheckpointError: on every rank, when it could not be made.
    """
    path = reader.folder
    target = path.with_name(path.name + UNIVERSAL_SUFFIX)
    source = digest_bytes((path / MANIFEST).read_bytes())
    # Rank 0 decides for all: file systems may show a new file to one node later than to another.
    if agree.from_first(_made_from(target) == source):
        return target
    rank, size = agree.rank_and_size()
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{target.name}")
    # Each step ends on all ranks before the next begins: nobody writes into a folder that is being removed.
    _in_step(lambda: _renew(temporary, _form_bytes(reader)) if rank == 0 else None)
    _in_step(lambda: _convert(reader, temporary, rank=rank, size=size))
    _in_step(lambda: _publish(temporary, target, source) if rank == 0 else None)
    return target


class UniversalReader:
    """Whole tensors of a universal form, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def tensor(self, name: str, kind: str) -> Tensor:
        """A whole parameter's fp32, exp_avg, exp_avg_sq or ema."""
        folder = self._folder / (_EMA_DIR if kind == AVERAGES_KIND else ZERO_DIR) / name
        return open_pt(folder / f"{WEIGHTS_KIND if kind == AVERAGES_KIND else kind}.pt")["param"]


def _made_from(target: Path) -> str | None:
    try:
        return (target / COMPLETE).read_text().strip()
    except OSError:
        return None


def _in_step(action: Callable[[], None]) -> None:
    """One step of all ranks; whatever fails on one of them is raised on every rank. Collective."""

    def told() -> None:
        try:
            action()
        except (CheckpointError, FileError, OSError) as error:
            raise CheckpointError(f"the universal form could not be made: {error}") from error

    agree.together(CheckpointError, told)


def _form_bytes(reader: CheckpointReader) -> int:
    """Size of the form: every kind of state of every parameter, fp32."""
    elements = sum(math.prod(reader.shape(name)) for name in reader.names())
    return elements * len(reader.kinds()) * torch.float32.itemsize


def _renew(temporary: Path, needed_bytes: int) -> None:
    # what a killed conversion left goes first: it may be what fills the disk
    shutil.rmtree(temporary, ignore_errors=True)
    check_space(temporary.parent, needed_bytes)
    temporary.mkdir()


def _convert(reader: CheckpointReader, out: Path, *, rank: int, size: int) -> None:
    # Our restricted, memory-mapped reader and not ds_to_universal, which unpickles whatever it is given, reads a rank's
    # whole file at once and leaves four small files a fragment; a test holds the two equal.
    gated = reader.manifest.config["model"].get("style", "modern") == "modern"
    kinds = reader.kinds()
    # Every size-th parameter: no rank needs another's result, and none waits before the end.
    for name in reader.names()[rank::size]:
        partition = partition_of(name, gated=gated)
        folder = out / ZERO_DIR / name
        for kind in (WEIGHTS_KIND, *MOMENTS):
            if kind in kinds:
                write_torch(folder / f"{kind}.pt", _entry(reader.tensor(name, kind), partition))
        if MOMENTS[0] in kinds:
            # DeepSpeed keeps Adam's count by parameter; ours is one number of the run.
            write_torch(folder / "step.pt", torch.tensor(float(reader.manifest.engine.get("adam_step") or 0)))
        if AVERAGES_KIND in kinds:
            write_torch(
                out / _EMA_DIR / name / f"{WEIGHTS_KIND}.pt", _entry(reader.tensor(name, AVERAGES_KIND), partition)
            )
    if rank == 0:
        _write_globals(reader, out, gated=gated)
    reader.close()


def _entry(whole: Tensor, partition: Partition) -> dict[str, Any]:
    """DeepSpeed's record of one tensor: how it is to be cut again, and the tensor."""
    if partition.dim is None:
        return {"param": whole}
    # Two stacked matrices, [gate; up]: each is cut by itself.
    if partition.strides == 2:
        return {"cat_dim": 0, "param_n_sub_params": 2, "param": whole}
    return {"cat_dim": partition.dim, "param": whole}


def _write_globals(reader: CheckpointReader, out: Path, *, gated: bool) -> None:
    """What DeepSpeed's loader reads beside the parameters: hyperparameters of the groups, and one model file."""
    manifest = reader.manifest
    optim = config_of(manifest, reader.folder).optim
    # Only DeepSpeed's loader reads these; ours takes hyperparameters from the run's configuration.
    group = {"lr": optim.lr, "betas": tuple(optim.betas), "eps": optim.adam_eps}
    groups = [{**group, "weight_decay": optim.weight_decay, "name": "decayed"}]
    groups.append({**group, "weight_decay": 0.0, "name": "plain"})
    if manifest.config["model"].get("experts") is not None:
        groups.append({**group, "weight_decay": optim.weight_decay, "name": EXPERT_GROUP})
    version = manifest.software.get("deepspeed", "0.19.8")
    state = {"ds_version": version, "clip_grad": optim.clip_grad_norm, "param_groups": groups}
    write_torch(out / ZERO_DIR / "optimizer_state.pt", state)
    counters = {name: manifest.engine.get(name) or 0 for name in ("skipped_steps", "global_steps")}
    model = {"module": {}, "lr_scheduler": None, "ds_version": version, **counters, **universal_info(gated=gated)}
    # Tensor parallelism is 1 here, because every tensor is whole.
    world = {"dp_world_size": manifest.grid["dp"] * manifest.grid["cp"], "mp_world_size": 1}
    write_torch(out / "mp_rank_00_model_states.pt", model | world)


def _publish(temporary: Path, target: Path, source: str) -> None:
    write_text(temporary / COMPLETE, f"{source}\n")
    discard(target)
    move(temporary, target)
