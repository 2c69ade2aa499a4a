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

from bd3_megatron.attention import machine


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
    # Frequencies are rounded to the table's dtype, as the exported model rounds them.
    exponent = torch.arange(0, head_dim, 2, dtype=dtype, device=position_PB.device) / head_dim
    frequency = (1.0 / base**exponent).to(torch.float64)
    # In fp64 and reduced to one turn before rounding: a position far out keeps the seven digits that one near 0 has.
    angle = torch.remainder(position_PB.to(torch.float64).unsqueeze(-1) * frequency, 2 * math.pi).to(dtype)
    doubled = torch.cat([angle, angle], dim=-1)
    return doubled[:, None, None, :] if position_PB.dim() == 1 else doubled[:, :, None, :]


def rotary_turn(angles: Tensor) -> Tensor:
    """Cosines, and sines with the sign that rotate-half gives them, of angles [P, 1 or B, 1, H]: [2, P, 1 or B, 1, H].

    They keep the dtype of the angles. In bf16 a turn would be off by up to 2^-9 of the head's length, in every layer.
    """
    half = angles.shape[-1] // 2
    sine = angles.sin()
    sine[..., :half].neg_()
    return torch.stack([angles.cos(), sine])


def turned(heads: Tensor, turn: Tensor) -> Tensor:
    """Queries or keys with their positions turned in, worked out in the dtype of the turn and rounded once.

    Args:
        heads: [P, B, heads, H].
        turn: of `rotary_turn`; channels beyond its width carry no position.

    Returns:
        In the shape and dtype of `heads`.
    """
    width = turn.shape[-1]
    if width < heads.shape[-1]:
        return torch.cat([_Turned.apply(heads[..., :width].contiguous(), turn), heads[..., width:]], dim=-1)
    return _Turned.apply(heads, turn)


def turning_kernel(heads: Tensor) -> str:
    """What turns such heads: `triton`, one kernel, or `torch`, an operation for each step."""
    if heads.device.type == "cuda" and heads.dtype != torch.float64 and machine.has("triton"):
        return "triton"
    return "torch"


def _turn(heads: Tensor, turn: Tensor, sign: int) -> Tensor:
    """Turn forwards (sign 1) or, for gradients, back (-1)."""
    if turning_kernel(heads) == "triton":
        from bd3_megatron.model.triton_rotary import turn_heads

        return turn_heads(heads, turn, sign)
    cosine, sine = turn
    # in fp32 both casts give the tensor itself
    wide = heads.to(turn.dtype)
    return torch.addcmul(wide * cosine, wide.roll(wide.shape[-1] // 2, -1), sine, value=sign).to(heads.dtype)


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, turn: Tensor) -> Tensor:
        ctx.save_for_backward(turn)
        return _turn(heads, turn, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (turn,) = ctx.saved_tensors
        # a turn is orthogonal: its transpose turns back
        return _turn(upstream, turn, -1), None
