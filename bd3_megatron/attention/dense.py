"""The reference: attention by the textbook, with the whole mask written out. Every other backend is held to it.

Decides: what is right. Scores, softmax and the sum over values run in fp32 (fp64 for fp64 input), whatever the input's
dtype; key and value heads are repeated for their query heads.
Costs: queries x keys memory per head, several times over; meant for tests, small models and sampling short texts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bd3_megatron.attention.streams import Stream, check_streams
from bd3_megatron.attention.visibility import Visibility


def attend(
    noisy: Stream | None, clean: Stream | None, visibility: Visibility, *, scale: float
) -> tuple[Tensor | None, Tensor | None]:
    """softmax(scale q k^T) v for both streams, under the visibility.

    Args:
        noisy: queries, keys and values of the noisy rows, or None where the visibility has none.
        clean: queries of the clean rows, keys and values of the clean key rows, or None.
        visibility: who sees whom, and which rows these are.
        scale: factor on the scores, usually H ** -0.5.

    Returns:
        (out_noisy_BLNH, out_clean_BLNH) in the dtype of the queries; None for an absent stream.

    Raises:
        ShapeError: the streams do not fit the visibility.
    """
    check_streams(noisy, clean, visibility)
    # keys stand as [noisy; clean], the column order of the masks
    streams = [stream for stream in (noisy, clean) if stream is not None]
    k_BLGH = torch.cat([stream.k_BLGH for stream in streams], dim=1)
    v_BLGH = torch.cat([stream.v_BLGH for stream in streams], dim=1)

    def out(stream: Stream | None, *, q_is_noisy: bool) -> Tensor | None:
        if stream is None:
            return None
        visible_BQK = visibility.queries_mask(q_is_noisy=q_is_noisy, device=stream.q_BLNH.device)
        return masked_softmax_attention(stream.q_BLNH, k_BLGH, v_BLGH, visible_BQK, scale=scale)

    return out(noisy, q_is_noisy=True), out(clean, q_is_noisy=False)


def masked_softmax_attention(
    q_BLNH: Tensor, k_BLGH: Tensor, v_BLGH: Tensor, visible_BQK: Tensor, *, scale: float
) -> Tensor:
    """Attention under an explicit mask (bool [B or 1, Q, K], True = sees): out [B, Q, N, H] in the dtype of q."""
    # fp32 at least: a reference that rounds scores to bf16 could not tell a wrong backend from its own rounding
    dtype = torch.promote_types(q_BLNH.dtype, torch.float32)
    share = q_BLNH.shape[2] // k_BLGH.shape[2]
    k_BLNH = k_BLGH.to(dtype).repeat_interleave(share, dim=2)
    v_BLNH = v_BLGH.to(dtype).repeat_interleave(share, dim=2)
    scores_BNQK = torch.einsum("bqnh,bknh->bnqk", q_BLNH.to(dtype), k_BLNH) * scale
    # every row sees at least itself, so softmax never meets a row of -inf alone
    scores_BNQK = scores_BNQK.masked_fill(~visible_BQK[:, None], float("-inf"))
    return torch.einsum("bnqk,bknh->bqnh", scores_BNQK.softmax(dim=-1), v_BLNH).to(q_BLNH.dtype)
