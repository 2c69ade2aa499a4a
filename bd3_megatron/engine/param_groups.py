"""Which parameters are decayed: matrices and tables are, norms and biases never."""

from __future__ import annotations

from typing import Any

from torch import nn


def param_groups(root: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimizer groups, decayed first; both non-empty on every pipeline stage, because every stage has a layer.

    Args:
        root: the rank's chunks.
        weight_decay: of the first group.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for _, parameter in root.named_parameters():
        # By dimension and not by name: every norm and bias is a vector, every matrix and table is not.
        (decayed if parameter.dim() > 1 else plain).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay, "name": "decayed"},
        {"params": plain, "weight_decay": 0.0, "name": "plain"},
    ]
