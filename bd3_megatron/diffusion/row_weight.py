"""Weights of masked tokens by how near the visible ones are (CART): w_i = 1/2 sum over visible j of p (1 - p)^(|i - j| - 1).

Contract: visible are the tokens that the row of i sees as tokens: those of its block that are not masked, and all of the blocks
before it, within its document. A token with a visible neighbour on both sides, and on without end, weighs 1.
Source: Dream (arXiv 2508.15487), context-adaptive token-level noise rescheduling; p = 0.3 is theirs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bd3_megatron.errors import check_divides

CART_P = 0.3
# farther tokens change a float64 sum by less than its last bit
_REACH = math.ceil(math.log(2.0**-56) / math.log(1 - CART_P))


def cart_weights(
    is_masked_BL: Tensor,
    num_blocks: int,
    *,
    document_id_BL: Tensor | None = None,
    is_text_BL: Tensor | None = None,
) -> Tensor:
    """The weight of every token, were it masked.

    Args:
        is_masked_BL: bool [B, L].
        num_blocks: K, dividing L.
        document_id_BL: int [B, L], where documents do not see each other.
        is_text_BL: bool [B, L]: False at padding, which shows nothing; None: all is text.

    Returns:
        float64 [B, L] in [0, 1].

    Raises:
        ConfigError: K does not divide L.
    """
    length = is_masked_BL.shape[1]
    check_divides("num_blocks", num_blocks, "length", length)
    block_L = torch.arange(length, device=is_masked_BL.device) // (length // num_blocks)
    is_text_BL = torch.ones_like(is_masked_BL) if is_text_BL is None else is_text_BL
    shown_BL = ~is_masked_BL & is_text_BL
    weight_BL = torch.zeros_like(is_masked_BL, dtype=torch.float64)
    for distance in range(1, min(length - 1, _REACH) + 1):
        early, late = slice(0, length - distance), slice(distance, length)
        share = 0.5 * CART_P * (1 - CART_P) ** (distance - 1)
        same_L = block_L[early] == block_L[late]
        # a later row sees clean text before its block, an earlier one nothing after its own
        to_late_BL = torch.where(same_L, shown_BL[:, early], is_text_BL[:, early])
        to_early_BL = same_L & shown_BL[:, late]
        if document_id_BL is not None:
            together_BL = document_id_BL[:, early] == document_id_BL[:, late]
            to_late_BL, to_early_BL = to_late_BL & together_BL, to_early_BL & together_BL
        weight_BL[:, late] += share * to_late_BL.double()
        weight_BL[:, early] += share * to_early_BL.double()
    return weight_BL
