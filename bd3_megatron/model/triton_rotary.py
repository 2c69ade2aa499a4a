"""One kernel that turns positions into queries or keys: each head is read once and written once, in any strides.

Imported only where Triton is installed (see `rotary`). Checked by Triton's interpreter on the CPU against the written-out form;
NOT MEASURED on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST_HEADS = 16


def turn_heads(heads: Tensor, turn: Tensor, sign: int) -> Tensor:
    """Turn each head by the position of its row.

    Args:
        heads: [P, B, heads, H], H even; bf16, fp16 or fp32.
        turn: of `rotary_turn`, fp32 [2, P, 1 or B, 1, H].
        sign: 1 forwards, -1 back.

    Returns:
        Dense, in the shape and dtype of `heads`.
    """
    # the kernel takes any strides but that of the last dimension
    heads = heads if heads.stride(-1) == 1 else heads.contiguous()
    rows, batch, count, width = heads.shape
    out = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    # the second half of a row's sines has no sign turned, and its cosines are those of the first half
    cosine, sine = turn[..., width // 2 :].unbind(0)
    # Heads of one program: they share a row's cosines and sines, which are read once.
    tile = min(triton.next_power_of_2(count), _MOST_HEADS)
    _turn_rows[rows * batch, triton.cdiv(count, tile)](
        heads,
        out,
        cosine,
        sine,
        batch,
        count,
        width // 2,
        *heads.stride()[:3],
        cosine.stride(0),
        # all samples of a row may share one position
        cosine.stride(1) if cosine.shape[1] > 1 else 0,
        sign,
        HEADS=tile,
        HALF=triton.next_power_of_2(width // 2),
    )
    return out


@triton.jit
def _turn_rows(
    heads,
    out,
    cosine,
    sine,
    batch,
    count,
    half,
    stride_row,
    stride_sample,
    stride_head,
    table_row,
    table_sample,
    sign,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    # 64 bits: rows x samples x heads x H may pass 2^31 elements
    place = tl.program_id(0).to(tl.int64)
    row, sample = place // batch, place % batch
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, HALF)
    inside = (head[:, None] < count) & (column[None, :] < half)
    angle = row * table_row + sample * table_sample + column
    c = tl.load(cosine + angle, mask=column < half, other=0.0)[None, :]
    s = tl.load(sine + angle, mask=column < half, other=0.0)[None, :] * sign
    source = heads + row * stride_row + sample * stride_sample + head[:, None] * stride_head + column[None, :]
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    target = out + (place * count + head[:, None]) * (2 * half) + column[None, :]
    tl.store(target, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(target + half, (second * c + first * s).to(out.dtype.element_ty), mask=inside)
