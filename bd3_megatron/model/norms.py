"""RMSNorm and LayerNorm for megatron's specs.

megatron-core's own `WrappedTorchNorm` refuses sequence parallelism and its other norms need TransformerEngine or Apex
(transformer/torch_norm.py:32), so these two are written out. Statistics are taken in fp32 (fp64 for fp64 input). Under
sequence parallelism a rank sees only its rows, so weights are marked and their gradients summed over tp (engine/grads).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + layer_norm_eps) * weight over the last dim."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.layer_norm_eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(_statistics_dtype(x))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.layer_norm_eps)
        return normed.to(x.dtype) * self.weight


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
        dtype = _statistics_dtype(x)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return nn.functional.layer_norm(x.to(dtype), weight.shape, weight, bias, self.layer_norm_eps).to(x.dtype)
