"""Which layers are covered, megatron's settings for them, and the fused activation against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bd3_megatron.compat import megatron
from bd3_megatron.model.activation import activate
from bd3_megatron.model.recompute import Recompute, rebuilt
from tests import tolerances


@pytest.mark.parametrize(
    ("recompute", "parts", "whole"),
    [
        (Recompute(), [], []),
        (Recompute.of_setting("none", 2), [], []),
        (Recompute.of_setting("selective", None), [0, 1, 2, 3], []),
        (Recompute.of_setting("full", 3), [], [0, 1, 2]),
        (Recompute.of_setting("selective", 9), [0, 1, 2, 3], []),
    ],
    ids=str,
)
def test_the_first_layers_of_a_chunk_are_covered(recompute: Recompute, parts: list[int], whole: list[int]) -> None:
    assert [index for index in range(4) if recompute.of_parts(index)] == parts
    assert [index for index in range(4) if recompute.of_all(index)] == whole


def test_only_whole_layers_are_the_blocks_business() -> None:
    assert Recompute().block_settings(4) == Recompute.of_setting("selective", 2).block_settings(4) == {}
    layers = [Recompute.of_setting("full", n).block_settings(4)["recompute_num_layers"] for n in (1, None)]
    assert layers == [1, 4]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_gated_activation_is_torchs(dtype: torch.dtype) -> None:
    inner = torch.randn(5, 3, 14, dtype=dtype, generator=torch.Generator().manual_seed(0), requires_grad=True)
    gate, up = inner.chunk(2, dim=-1)
    found, expected = activate(inner, None, gated=True), F.silu(gate) * up
    grad, wanted = (torch.autograd.grad(out, inner, torch.ones_like(out))[0] for out in (found, expected))
    assert torch.equal(found, expected)
    tolerance = tolerances.FAST_PATH_FP64 if dtype == torch.float64 else tolerances.FAST_PATH_FP32
    assert torch.allclose(grad, wanted, rtol=0, atol=tolerance)


def test_a_released_output_is_gone_until_its_gradient_comes() -> None:
    megatron.install()
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    rows = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    active, release = rebuilt(torch.tanh, rows)
    out = active @ weight
    release(out)
    assert active.untyped_storage().nbytes() == 0
    out.square().sum().backward()
    expected = torch.autograd.grad((torch.tanh(rows) @ weight).square().sum(), [rows, weight])
    assert rows.grad is not None and weight.grad is not None
    assert torch.equal(rows.grad, expected[0]) and torch.equal(weight.grad, expected[1])
