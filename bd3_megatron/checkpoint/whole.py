"""Write a checkpoint of kind "whole": weights only, parameter by parameter, from one process.

Decides: what an imported model, or an average of checkpoints, looks like to those who load checkpoints. Such a
checkpoint loads on any grid without a universal form; moments start at zero and the average starts at the weights.
Costs: the largest tensor; files of at most WEIGHTS_FILE_BYTES.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bd3_megatron.checkpoint.files import check_space, stream_safetensors
from bd3_megatron.checkpoint.layout import (
    MANIFEST,
    MANIFEST_DIGEST,
    WEIGHTS_DIR,
    FileRecord,
    Manifest,
    digest_bytes,
    manifest_bytes,
)
from bd3_megatron.checkpoint.manifest_fields import WHOLE_KIND
from bd3_megatron.errors import CheckpointError
from bd3_megatron.files import whole, write_bytes, write_text
from bd3_megatron.lease import held_output

# A tensor larger than this gets a file of its own.
WEIGHTS_FILE_BYTES = 4 * 2**30


def write_whole(
    out: Path,
    manifest: Manifest,
    shapes: Mapping[str, tuple[int, ...]],
    produce: Callable[[str], Tensor],
    *,
    check: Callable[[Path], object] | None = None,
) -> Manifest:
    """Write a checkpoint of weights.

    Args:
        out: the checkpoint's folder; must not exist.
        manifest: without files; its kind is set here.
        shapes: of every parameter, by global name, padding rows included.
        produce: makes one whole parameter; stored as fp32.
        check: called with the finished folder before it gets its name; its error leaves nothing behind.

    Returns:
        The manifest as written.

    Raises:
        CheckpointError: `out` exists, or the disk is too small.
        FileError, LaunchError: it cannot be written.
        FolderHeldError: another process is writing it.
    """
    with held_output(out):
        if out.exists():
            raise CheckpointError(f"{out} exists; name a new folder, or remove it first.")
        # Four bytes an element: whole weights are stored in fp32.
        check_space(out.parent, 4 * sum(math.prod(shape) for shape in shapes.values()))
        return _write(out, manifest, shapes, produce, check)


def _write(
    out: Path,
    manifest: Manifest,
    shapes: Mapping[str, tuple[int, ...]],
    produce: Callable[[str], Tensor],
    check: Callable[[Path], object] | None,
) -> Manifest:
    with whole(out) as temporary:
        files = _write_weights(temporary, shapes, produce)
        complete = replace(manifest, kind=WHOLE_KIND, files=files)
        content = manifest_bytes(complete)
        write_bytes(temporary / MANIFEST, content)
        write_text(temporary / MANIFEST_DIGEST, f"{digest_bytes(content)}\n")
        # Before the folder has its name: weights that do not prove equal are never published.
        if check is not None:
            check(temporary)
    return complete


def _write_weights(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], produce: Callable[[str], Tensor]
) -> dict[str, FileRecord]:
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        if shards[-1] and filled + size > WEIGHTS_FILE_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = (torch.float32, shape)
        filled += size
    files = {}
    for number, specs in enumerate(shards):
        name = f"{WEIGHTS_DIR}/part-{number:05d}.safetensors"
        files[name] = stream_safetensors(folder / name, specs, lambda key: produce(key).float(), {})
    return files
