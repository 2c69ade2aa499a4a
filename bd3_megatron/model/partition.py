"""How each parameter is cut over tensor- or expert-parallel ranks: one table, by the last words of its name.

Names are global: `decoder.layers.<layer of the whole model>...`, whatever the pipeline split. Everything that cuts or
joins tensors (initialisation, checkpoints, conversion) asks this table and no other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

EMBEDDING = "embedding.word_embeddings.weight"
HEAD_WEIGHT = "output_layer.weight"
HEAD_BIAS = "output_layer.bias"
EXPERT_BIAS = "mlp.router.expert_bias"
"""Inside a layer; a buffer and no parameter, because no gradient moves it."""


@dataclass(frozen=True)
class Partition:
    """`dim` None: replicated. `strides` 2: the dimension holds two stacked tensors (gate; up), each cut on its own."""

    dim: int | None
    strides: int = 1
    axis: str = "tp"
    """Axis over whose ranks it is cut: tp, or ep for experts."""


def partition_of(name: str, *, gated: bool) -> Partition:
    """How the parameter called `name` is cut.

    Args:
        name: global parameter name.
        gated: the MLP's first matrix holds [gate; up] (SwiGLU).
    """
    if is_expert(name):
        # dealt out whole, each to one rank: gate and up stay together
        return Partition(0, axis="ep")
    # Column-parallel: output rows are dealt to ranks, q, k and v by whole groups of heads.
    if name in (EMBEDDING, HEAD_WEIGHT, HEAD_BIAS) or ".linear_qkv." in name:
        return Partition(0)
    if ".linear_fc1." in name:
        return Partition(0, 2 if gated else 1)
    # Row-parallel: their inputs are what the column-parallel matrices before them made on the same rank.
    if name.endswith((".linear_proj.weight", ".linear_fc2.weight")):
        return Partition(1)
    return Partition(None)


def is_expert(name: str) -> bool:
    """Whether the parameter holds routed experts (the shared one is an MLP like others)."""
    return ".mlp.experts." in name


def shard(full: Tensor, partition: Partition, rank: int, size: int) -> Tensor:
    """The piece of `full` that rank `rank` of `size` along the partition's axis holds (a view where possible)."""
    if partition.dim is None or size == 1:
        return full
    parts = full.chunk(partition.strides, dim=partition.dim)
    pieces = [part.chunk(size, dim=partition.dim)[rank] for part in parts]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=partition.dim)


def full_shape(local: tuple[int, ...], partition: Partition, size: int) -> tuple[int, ...]:
    """Shape of the whole tensor whose piece on each of `size` ranks has shape `local`."""
    if partition.dim is None:
        return local
    return tuple(n * size if d == partition.dim else n for d, n in enumerate(local))


def padded_vocab(vocab_size: int, multiple: int) -> int:
    """Table rows: the vocabulary (mask id included) padded to `multiple`, the same for every tp."""
    return math.ceil(vocab_size / multiple) * multiple
