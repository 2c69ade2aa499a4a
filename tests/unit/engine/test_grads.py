"""Which gradients are partial over tensor-parallel ranks, and where DeepSpeed keeps them; the sums are in tests/ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bd3_megatron.engine.grads import deepspeed_gradients, needs_tensor_sum
from tests.unit.parallel.places import place

LAYER = "decoder.layers.0."


@pytest.mark.parametrize(
    ("name", "sequence_parallel", "partial"),
    [
        ("input_layernorm.weight", True, True),
        ("input_layernorm.weight", False, False),
        # each rank normed the queries of its own heads
        ("self_attention.q_layernorm.weight", False, True),
        ("self_attention.k_layernorm.weight", False, True),
        ("mlp.linear_fc1.weight", False, False),
        ("self_attention.linear_qkv.weight", False, False),
    ],
)
def test_replicated_parameters_with_partial_gradients_are_summed(
    name: str, sequence_parallel: bool, partial: bool
) -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
    assert needs_tensor_sum(LAYER + name, parameter, place(tp=2)) == partial
    assert not needs_tensor_sum(LAYER + name, parameter, place(tp=1))


def test_deepspeeds_accumulator_goes_before_grad() -> None:
    parameter = nn.Parameter(torch.ones(2))
    assert deepspeed_gradients(parameter) == []
    parameter.grad = torch.ones(2)
    assert deepspeed_gradients(parameter)[0] is parameter.grad
    accumulator = parameter.grad_accum = torch.zeros(2)  # type: ignore[attr-defined]
    assert deepspeed_gradients(parameter)[0] is accumulator
