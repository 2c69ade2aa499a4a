"""megatron's column- and row-parallel linear layers, with a short way for a rank that holds the whole matrix.

Contract: at tp = 1 the same products in the same order as megatron's, to the bit, as one autograd node where megatron has two
and the decorators of autocast, which nobody uses here; else megatron's own forward. Parameters are megatron's in either case.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.autograd.function import once_differentiable


class ColumnLinear(ColumnParallelLinear):
    """Rows of the weight are dealt to tensor-parallel ranks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_whole = self.tp_group.size() == 1

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Any:
        """(output, bias that is still to be added or None)."""
        return _linear(self, input_) if self.is_whole else super().forward(input_, *args, **kwargs)


class RowLinear(RowParallelLinear):
    """Columns of the weight are dealt to tensor-parallel ranks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_whole = self.tp_group.size() == 1

    def forward(self, input_: Tensor) -> Any:
        """(output, bias that is still to be added or None)."""
        return _linear(self, input_) if self.is_whole else super().forward(input_)


def _linear(layer: ColumnLinear | RowLinear, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    out = _Product.apply(rows, layer.weight)
    if layer.skip_bias_add:
        return out, layer.bias
    return (out if layer.bias is None else out + layer.bias), None


class _Product(torch.autograd.Function):
    """rows [..., D] times weight [F, D] transposed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        # the parameter itself, not a view: ZeRO 3 brings its elements back before the backward
        ctx.save_for_backward(rows, weight)
        flat = rows.reshape(-1, rows.shape[-1])
        return torch.mm(flat, weight.t()).view(*rows.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor | None]:
        rows, weight = ctx.saved_tensors
        grad = upstream.reshape(-1, upstream.shape[-1])
        d_weight = torch.mm(grad.t(), rows.reshape(-1, rows.shape[-1])) if ctx.needs_input_grad[1] else None
        return torch.mm(grad, weight).view(rows.shape), d_weight
