"""RMSNorm and LayerNorm for megatron's specs.

megatron-core's own `WrappedTorchNorm` refuses sequence parallelism and its other norms need TransformerEngine or Apex
(transformer/torch_norm.py:32), so these two are written out. Statistics are taken in fp32 (fp64 for fp64 input). Under
sequence parallelism a rank sees only its rows, so weights are marked and their gradients summed over tp (engine/grads).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FUSED = "torch (one kernel)"


def norm_kernel(x: Tensor) -> str:
    """What norms such rows: on CUDA torch's own kernel, which takes fp32 statistics of narrow rows."""
    return FUSED if x.device.type == "cuda" else "torch (written out)"


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + layer_norm_eps) * weight over the last dim."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.layer_norm_eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Each tp rank sees only its rows: engine/grads sums the gradients of what is marked.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if norm_kernel(x) == FUSED:
            return F.rms_norm(x, self.weight.shape, self.weight, self.layer_norm_eps)
        return _RmsNorm.apply(x, self.weight, self.layer_norm_eps)


class _RmsNorm(torch.autograd.Function):
    """One node that keeps its input as it came and one number per row; on CPU half the passes of the written-out form."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer_norm_eps: float) -> Tensor:
        wide = x.to(_statistics_dtype(x))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(layer_norm_eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        # rounded once, after the weight, as the exported model and torch's fused kernel do
        return (wide * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        normed, grad = x * inverse, upstream.to(inverse.dtype)
        along = grad * normed
        # with n = x / rms: d x = (w g - n mean(n w g)) / rms
        mean = (along @ weight.to(along.dtype)).unsqueeze(-1).div_(x.shape[-1])
        d_x = (grad * weight).addcmul_(normed, mean, value=-1).mul_(inverse)
        return d_x.to(x.dtype), along.flatten(0, -2).sum(0).to(weight.dtype), None


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + layer_norm_eps) * weight + bias over the last dim."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.layer_norm_eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if norm_kernel(x) == FUSED:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.layer_norm_eps)
        return _LayerNorm.apply(x, self.weight, self.bias, self.layer_norm_eps)


class _LayerNorm(torch.autograd.Function):
    """torch's kernels on wide rows, of which the narrow ones are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, layer_norm_eps: float) -> Tensor:
        rows, wide_weight, wide_bias = (t.to(_statistics_dtype(x)) for t in (x, weight, bias))
        out, mean, inverse = torch.native_layer_norm(rows, weight.shape, wide_weight, wide_bias, layer_norm_eps)
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, inverse = ctx.saved_tensors
        grad, rows, *affine = (t.to(mean.dtype) for t in (upstream, x, weight, bias))
        grads = torch.ops.aten.native_layer_norm_backward(
            grad, rows, weight.shape, mean, inverse, *affine, [True, True, True]
        )
        return *(g.to(t.dtype) for g, t in zip(grads, (x, weight, bias), strict=True)), None
