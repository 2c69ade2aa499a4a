"""The MLP's activation with its bias: tanh-GELU or SwiGLU, on CUDA as megatron's compiled kernels, else written out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_gelu import bias_gelu_impl
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from torch import Tensor
from torch.autograd.function import once_differentiable

COMPILED = "megatron (compiled)"
WRITTEN_OUT = "torch (written out)"


def elementwise_kernel(device: torch.device) -> str:
    """What activates rows and adds residuals: megatron's compiled kernels would compile C++ on a CPU, for little."""
    return COMPILED if device.type == "cuda" else WRITTEN_OUT


def activate(inner: Tensor, bias: Tensor | None, *, gated: bool) -> Tensor:
    """Activated rows of an MLP.

    Args:
        inner: [..., F], or gate and up [..., 2 F].
        bias: of `inner`'s width, to be added before; None only where the MLP is gated.
        gated: silu(gate) * up; else GELU in its tanh form.

    Returns:
        [..., F].
    """
    compiled = elementwise_kernel(inner.device) == COMPILED
    if gated:
        if compiled:
            return bias_swiglu_impl(inner, bias)
        return _SwiGlu.apply(inner if bias is None else inner + bias)
    # megatron's kernel has no form without it.
    assert bias is not None, "the paper's MLP has a bias"
    return bias_gelu_impl(inner, bias) if compiled else F.gelu(inner + bias, approximate="tanh")


class _SwiGlu(torch.autograd.Function):
    """silu(gate) * up of rows [gate; up]; keeps the rows alone and writes both gradients where they belong."""

    @staticmethod
    def forward(ctx: Any, inner: Tensor) -> Tensor:
        # autograd's own graph would also keep silu(gate), as wide as the MLP.
        ctx.save_for_backward(inner)
        gate, up = inner.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        (inner,) = ctx.saved_tensors
        gate, up = inner.chunk(2, dim=-1)
        grad = torch.empty_like(inner)
        d_gate, d_up = grad.chunk(2, dim=-1)
        # Into the halves of one tensor: the two gradients need no concatenation.
        torch.ops.aten.silu.out(gate, out=d_up).mul_(upstream)
        torch.ops.aten.silu_backward.grad_input(upstream * up, gate, grad_input=d_gate)
        return grad
