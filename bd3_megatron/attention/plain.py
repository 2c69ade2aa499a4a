"""Attention of one whole stream by torch's own kernels: masked diffusion (S = L) sees everything, S = 1 sees what is before.

These layouts need no rule of ours, so torch picks cuDNN, flash or memory-efficient kernels itself. Serves one stream of whole
sequences without documents; refuses everything else.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bd3_megatron.attention.request import AttentionRequest
from bd3_megatron.attention.streams import Stream, check_streams
from bd3_megatron.attention.visibility import Visibility
from bd3_megatron.errors import BackendError


def attend(
    noisy: Stream | None, clean: Stream | None, visibility: Visibility, *, scale: float
) -> tuple[Tensor | None, Tensor | None]:
    """Attention of the only stream there is.

    Args:
        noisy: of S = L, or None.
        clean: of S = 1, or None.
        visibility: whole sequences without documents.
        scale: factor on the scores, > 0.

    Returns:
        Outputs [B, L, N, H], None for the absent stream.

    Raises:
        BackendError: any other layout.
    """
    check_streams(noisy, clean, visibility)
    if (reason := _refusal(visibility)) is not None:
        raise BackendError(reason)
    stream = noisy if noisy is not None else clean
    assert stream is not None
    q, k, v = (t.transpose(1, 2) for t in (stream.q_BLNH, stream.k_BLGH, stream.v_BLGH))
    # a noisy stream alone is one block of the whole length and bidirectional; a clean one has S = 1 and is causal
    out = scaled_dot_product_attention(
        q, k, v, is_causal=noisy is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    ).transpose(1, 2)
    return (out, None) if noisy is not None else (None, out)


def refuse(request: AttentionRequest) -> str | None:
    """Why torch's own attention cannot serve the request, or None."""
    # one packing stands for all: any documents are refused
    return _refusal(request.visibility(0))


def _refusal(visibility: Visibility) -> str | None:
    # rows count too: is_causal would be wrong for the slices of a context-parallel rank
    whole = ((0, visibility.length),)
    rows = (visibility.noisy_rows, visibility.clean_rows, visibility.clean_key_rows)
    full = rows == (whole, (), ()) and visibility.block_size == visibility.length
    causal = rows == ((), whole, whole) and visibility.block_size == 1
    if visibility.document_id_BL is None and (full or causal):
        return None
    return (
        f"plain attention serves one whole stream without documents, of block_size = length or 1, not block_size="
        f"{visibility.block_size} of length={visibility.length}; use structured, flex or triton."
    )
