"""Attention of the pair as one call of torch's SDPA under the written-out mask: for short sequences on the CPU.

Executes all pairs of rows, some four times the allowed ones, in one call where `structured` makes a dozen small ones: faster
up to `LONGEST` positions whatever the batch, heads and block size (tools/bench/results/LOG.md). Serves every visibility,
documents in any order included. Refuses other devices, where the mask would be read from memory by every call, and longer
sequences. The choice goes by the length of a whole sequence, so that every grid makes the same one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bd3_megatron.attention.request import AttentionRequest
from bd3_megatron.attention.streams import Stream, attend_joined, check_joined
from bd3_megatron.attention.visibility import Visibility

LONGEST = 128
"""Positions L up to which one masked call is faster than rectangles."""


def attend(
    noisy: Stream | None, clean: Stream | None, visibility: Visibility, *, scale: float
) -> tuple[Tensor | None, Tensor | None]:
    """Attention of both streams under the visibility rule.

    Args:
        noisy: of `visibility.noisy_rows`; None if the stream is absent.
        clean: q of `visibility.clean_rows`, k and v of `visibility.clean_key_rows`; None if absent.
        visibility: who is here and which documents they belong to.
        scale: factor on the scores.

    Returns:
        Outputs [B, rows, N, H] in the input's dtype, None for an absent stream.

    Raises:
        ShapeError: if the streams do not fit the visibility.
    """
    return attend_joined(masked_rows, noisy, clean, visibility, scale=scale)


def masked_rows(q_BQNH: Tensor, k_BRGH: Tensor, v_BRGH: Tensor, visibility: Visibility, *, scale: float) -> Tensor:
    """The same of rows that nobody has cut, [noisy; clean]."""
    check_joined(q_BQNH, k_BRGH, visibility)
    # made for the first layer, kept for the others
    mask = visibility.table(("sdpa", q_BQNH.dtype), lambda: _mask(visibility, q_BQNH.dtype))
    q, k, v = (rows.transpose(1, 2) for rows in (q_BQNH, k_BRGH, v_BRGH))
    return scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)


def refuse(request: AttentionRequest) -> str | None:
    """Why one masked call is no good for the request, or None."""
    if request.device_type != "cpu":
        return f"one masked call is for the CPU, not for {request.device_type!r}; use another backend."
    if request.rows.length > LONGEST:
        return f"one masked call of length={request.rows.length} is slower than rectangles; use structured."
    return None


def _mask(visibility: Visibility, dtype: torch.dtype) -> Tensor:
    """What is added to the scores: 0 where a query sees a key, [B or 1, 1, Q, K]; torch would turn a bool one into it anew
    at every call."""
    sees = visibility.pair_mask()[:, None]
    return torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, float("-inf"))
