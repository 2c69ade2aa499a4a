"""Rotary angles for the rows a stage holds: every stage makes its own, nothing about positions crosses the pipeline.

Decides: rotate-half over the whole head width, noisy and clean row of one position get the same angle. The product
position x frequency is taken in fp64 and reduced to one turn before it is rounded to fp32, so that a position far out
keeps the seven digits that one near 0 has, as in the exported model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
