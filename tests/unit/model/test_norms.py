"""Norms equal torch's own; statistics are fp32 for bf16 input, and weights are marked under sequence parallelism."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bd3_megatron.model.norms import LayerNorm, RMSNorm
from tests import tolerances

D = 12


def norm_of(kind: type, dtype: torch.dtype, *, sequence_parallel: bool = False) -> torch.nn.Module:
    config = SimpleNamespace(params_dtype=dtype, sequence_parallel=sequence_parallel)
    made = kind(config, D, eps=1e-3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(D, generator=generator).to(dtype))
    return made


def reference(norm: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    parameters = [p.to(x.dtype) for p in norm.parameters()]
    if isinstance(norm, RMSNorm):
        return torch.nn.functional.rms_norm(x, (D,), parameters[0], 1e-3)
    return torch.nn.functional.layer_norm(x, (D,), *parameters, 1e-3)


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_fp64_equals_torch(kind: type) -> None:
    x = torch.randn(3, 2, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 5 + 1
    norm = norm_of(kind, torch.float64)
    assert torch.allclose(norm(x), reference(norm, x), rtol=0, atol=tolerances.EXACT_FP64 * 10)


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_bf16_statistics_are_taken_in_fp32(kind: type) -> None:
    # rows with a large mean: in bf16 the mean of squares, or the deviation from the mean, would lose everything
    x = (torch.randn(4, D, generator=torch.Generator().manual_seed(2)) + 40).bfloat16()
    norm = norm_of(kind, torch.bfloat16)
    found, expected = norm(x), reference(norm, x.float())
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() <= 2**-7 * expected.abs().max()


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_weights_are_marked_for_the_sum_over_tensor_ranks(kind: type, sequence_parallel: bool) -> None:
    norm = norm_of(kind, torch.float32, sequence_parallel=sequence_parallel)
    assert [p.sequence_parallel for p in norm.parameters()] == [sequence_parallel] * len(list(norm.parameters()))
