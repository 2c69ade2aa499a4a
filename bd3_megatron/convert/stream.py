"""Write the weights of a model folder tensor by tensor, with memory for the largest one.

Files hold at most `shard_bytes` each and come with the index that Hugging Face's loaders read; convert/to_hf.py writes
the rest of the folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bd3_megatron.checkpoint.files import stream_safetensors
from bd3_megatron.convert.plain_source import INDEX, SINGLE
from bd3_megatron.files import write_json

# Files that object stores and hubs take; one tensor larger than this gets its own.
SHARD_BYTES = 8 * 2**30
# transformers asks for this mark of the framework that wrote a file.
METADATA = {"format": "pt"}
FP32_SUFFIX = ".expert_bias"


def stream_weights(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    produce: Callable[[str], Tensor],
    *,
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """model.safetensors, or shards with an index.

    Args:
        folder: exists.
        shapes: every tensor, in the order of the files.
        produce: makes one tensor, in any dtype.
        dtype: as stored; expert biases stay fp32.
        shard_bytes: size of one file, unless a single tensor is larger.
    """
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    filled = total = 0
    for name, shape in shapes.items():
        # added to scores of one decimal's distance, and 4 bytes an expert
        kept = torch.float32 if name.endswith(FP32_SUFFIX) else dtype
        size = math.prod(shape) * kept.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = (kept, shape)
        filled, total = filled + size, total + size
    # One file needs no index, and loaders look for this name first.
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file_name, specs in zip(names, shards, strict=True):
        stream_safetensors(folder / file_name, specs, partial(_stored, produce, specs), METADATA)
    if len(shards) > 1:
        weight_map = {name: file for file, specs in zip(names, shards, strict=True) for name in specs}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / INDEX, index)


def _stored(
    produce: Callable[[str], Tensor], specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], name: str
) -> Tensor:
    return produce(name).to(specs[name][0])
