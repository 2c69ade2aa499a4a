"""Matrices and tables are decayed, norms and biases never; nothing is left out, and no group is empty on any stage."""

from __future__ import annotations

import pytest
from torch import nn

from bd3_megatron.engine.param_groups import param_groups


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.table = nn.Embedding(8, 4)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_only_matrices_are_decayed(decay: float) -> None:
    stage = Stage()
    decayed, plain = param_groups(stage, decay)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (decay, 0.0)
    assert [id(p) for p in decayed["params"]] == [id(stage.linear.weight), id(stage.table.weight)]
    assert [id(p) for p in plain["params"]] == [id(stage.linear.bias), id(stage.norm.weight), id(stage.norm.bias)]
