"""Runs the rotary kernel in Triton's interpreter against the written-out form; prints the worst errors, fp32 then bf16.

A program of its own because the interpreter is chosen by the environment before Triton is imported.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bd3_megatron.model.rotary import rotary_angles, rotary_turn, turned
from bd3_megatron.model.triton_rotary import turn_heads


def problems(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Heads and turns: shared positions and each sample's own, views of a wider tensor, odd numbers of heads and widths."""
    generator = torch.Generator().manual_seed(0)
    for position_PB in (torch.arange(5), torch.randint(0, 9, (5, 2), generator=generator)):
        for count, width in ((1, 16), (3, 12), (20, 8)):
            turn = rotary_turn(rotary_angles(position_PB, width, 10_000.0))
            wide = torch.randn(5, 2, count, width + 4, generator=generator).to(dtype)
            yield wide[..., :width], turn
            yield wide[..., :width].transpose(-1, -2).contiguous().transpose(-1, -2), turn


def main(dtype: torch.dtype) -> float:
    worst = 0.0
    for heads, turn in problems(dtype):
        for sign in (1, -1):
            expected = turned(heads.double(), torch.stack([turn[0], sign * turn[1]]).double())
            found = turn_heads(heads, turn, sign)
            assert found.dtype == dtype and found.shape == heads.shape
            worst = max(worst, float((found.double() - expected).abs().max() / expected.abs().max()))
    return worst


if __name__ == "__main__":
    print(main(torch.float32), main(torch.bfloat16))
