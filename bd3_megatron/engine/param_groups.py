"""Which parameters are decayed: matrices and tables are, norms and biases never. Routed experts are a group of their own."""

from __future__ import annotations

from typing import Any

from torch import nn

from bd3_megatron.compat.deepspeed import EXPERT_GROUP
from bd3_megatron.model.partition import is_expert


def param_groups(root: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimizer groups, decayed first, and a third of routed experts where the model has them.

    None is empty on any pipeline stage, because every stage has a layer (with experts, where there are any).

    Args:
        root: the rank's chunks.
        weight_decay: of the first group.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    experts: list[nn.Parameter] = []
    for name, parameter in root.named_parameters():
        # By dimension and not by name: every norm and bias is a vector, every matrix and table is not.
        (experts if is_expert(name) else decayed if parameter.dim() > 1 else plain).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay, "name": "decayed"},
        {"params": plain, "weight_decay": 0.0, "name": "plain"},
    ]
    # the name must be that of the process groups (stage_1_and_2.py:880)
    if experts:
        groups.append({"params": experts, "weight_decay": weight_decay, "name": EXPERT_GROUP, "moe": True})
    return groups
