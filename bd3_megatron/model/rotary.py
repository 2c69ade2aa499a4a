"""Rotary angles for the rows a stage holds: every stage makes its own, nothing about positions crosses the pipeline.

Decides: rotate-half over the whole head width, noisy and clean row of one position get the same angle. The product
position x frequency is taken in fp64 and reduced to one turn before it is rounded to fp32, so that a position far out
keeps the seven digits that one near 0 has, as in the exported model. Cosines and sines are made once a pass, not once a
layer, and turning heads is three passes over them, with nothing kept for the backward but the angles.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotary_angles(position_PB: Tensor, head_dim: int, base: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Angles as megatron's TransformerBlock wants them.

    Args:
        position_PB: positions of the rows, int [P] or [P, B] where samples differ (positions restart at documents).
        head_dim: H, even.
        base: of the frequencies base ** (-2 i / H).
        dtype: of the result.

    Returns:
        [P, 1 or B, 1, H] angles (not cosines), each frequency twice.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=dtype, device=position_PB.device) / head_dim
    frequency = (1.0 / base**exponent).to(torch.float64)
    angle = torch.remainder(position_PB.to(torch.float64).unsqueeze(-1) * frequency, 2 * math.pi).to(dtype)
    doubled = torch.cat([angle, angle], dim=-1)
    return doubled[:, None, None, :] if position_PB.dim() == 1 else doubled[:, :, None, :]


def rotary_turn(angles: Tensor, dtype: torch.dtype) -> Tensor:
    """Cosines, and sines with the sign that rotate-half gives them, of angles [P, 1 or B, 1, H]: [2, P, 1 or B, 1, H]."""
    half = angles.shape[-1] // 2
    sine = angles.sin()
    sine[..., :half].neg_()
    return torch.stack([angles.cos(), sine]).to(dtype)


def turned(heads: Tensor, turn: Tensor) -> Tensor:
    """Queries or keys with their positions turned in.

    Args:
        heads: [P, B, heads, H].
        turn: of `rotary_turn`, in the dtype of `heads`.
    """
    return _Turned.apply(heads, turn)


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, turn: Tensor) -> Tensor:
        ctx.save_for_backward(turn)
        cosine, sine = turn
        return torch.addcmul(heads * cosine, heads.roll(heads.shape[-1] // 2, -1), sine)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (turn,) = ctx.saved_tensors
        cosine, sine = turn
        return torch.addcmul(upstream * cosine, upstream.roll(upstream.shape[-1] // 2, -1), sine, value=-1), None
