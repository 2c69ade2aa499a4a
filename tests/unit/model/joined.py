"""Joining what tensor-parallel ranks hold: the product only cuts, and its checkpoints are joined piece by piece on disk."""

from __future__ import annotations

import torch
from torch import Tensor

from bd3_megatron.model.partition import Partition


def unshard(pieces: list[Tensor], partition: Partition) -> Tensor:
    """The whole tensor from all ranks' pieces, in rank order; inverse of `model.partition.shard`."""
    if partition.dim is None or len(pieces) == 1:
        return pieces[0]
    split = [piece.chunk(partition.strides, dim=partition.dim) for piece in pieces]
    return torch.cat([part[i] for i in range(partition.strides) for part in split], dim=partition.dim)
