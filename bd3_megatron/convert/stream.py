"""Write a model folder tensor by tensor: memory for the largest tensor, whatever the model's size.

Decides: how tensors are dealt to safetensors files (at most `shard_bytes` each, with the index Hugging Face's loaders
read). What a folder holds besides is said by to_hf.py and its like.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from bd3_megatron.checkpoint.files import stream_safetensors
from bd3_megatron.convert.folder import copy_files, published
from bd3_megatron.convert.plain_source import INDEX, SINGLE, PlainSource
from bd3_megatron.convert.to_hf import (
    SHARD_BYTES,
    config_json,
    expected_shapes,
    generation_json,
    is_tokenizer_file,
    model_files_dir,
)
from bd3_megatron.errors import ConversionError
from bd3_megatron.files import write_json, write_text
from bd3_megatron.hf.configuration_bd3 import BD3Config
from bd3_megatron.sampling.folder import MODEL_TYPE

METADATA = {"format": "pt"}


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
        dtype: as stored.
        shard_bytes: size of one file, unless a single tensor is larger.
    """
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    filled = total = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = (dtype, shape)
        filled, total = filled + size, total + size
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file_name, specs in zip(names, shards, strict=True):
        stream_safetensors(folder / file_name, specs, lambda name: produce(name).to(dtype), METADATA)
    if len(shards) > 1:
        weight_map = {name: file for file, specs in zip(names, shards, strict=True) for name in specs}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / INDEX, index)


def stream_folder(
    source: PlainSource,
    config: BD3Config,
    out: Path,
    *,
    tokenizer_dir: Path | None = None,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
    card: str | None = None,
) -> list[str]:
    """The same folder as to_hf.write_folder, without ever holding the model.

    Args:
        source: exactly the parameters of `config`.
        config: shape and meaning of the model.
        out: the folder; an older exported folder there is replaced.
        tokenizer_dir: whose tokenizer files are copied; None: none.
        dtype: of the stored weights.
        shard_bytes: size of one weight file.
        card: text of README.md; None: none is written.

    Returns:
        Names of the tokenizer files copied, sorted.

    Raises:
        ConversionError: a missing, unknown or misshapen parameter, or an `out` that is not ours.
    """
    shapes = checked_shapes(source, config)
    with published(Path(out), model_type=MODEL_TYPE) as staging:
        write_json(staging / "config.json", config_json(config, dtype))
        write_json(staging / "generation_config.json", generation_json(config))
        stream_weights(staging, shapes, source.tensor, dtype=dtype, shard_bytes=shard_bytes)
        copy_files(model_files_dir(), staging, lambda path: path.suffix == ".py" and path.name != "__init__.py")
        if card is not None:
            write_text(staging / "README.md", card)
        return [] if tokenizer_dir is None else copy_files(tokenizer_dir, staging, is_tokenizer_file)


def checked_shapes(source: PlainSource, config: BD3Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of `config`, after comparing them with the source's.

    Raises:
        ConversionError: names the first offenders.
    """
    expected, there = expected_shapes(config), set(source.names())
    missing, unknown = sorted(set(expected) - there), sorted(there - set(expected))
    if missing or unknown:
        raise ConversionError(
            f"the source lacks {len(missing)} parameters {missing[:3]} and has {len(unknown)} unknown ones {unknown[:3]}; "
            f"it must hold exactly those of style={config.style} with {config.num_hidden_layers} layers."
        )
    for name, shape in expected.items():
        if source.shape(name) != shape:
            raise ConversionError(
                f"{name} has shape {list(source.shape(name))}; the configuration asks for {list(shape)}."
            )
    return expected
