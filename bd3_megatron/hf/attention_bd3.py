"""Attention of the plain model: the visibility rule of a pair, and softmax attention with shared key heads.

Decides who sees whom in a plain forward, block by block, and how grouped heads are laid out for torch's kernel. Attention
is dense: one boolean a query and key. The decoding engine brings its own visibility to the same kernel.
Source: BD3-LM (arXiv 2503.09573) section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def blocks_of(position_BL: Tensor, block_size: int) -> Tensor:
    """The diffusion block of positions: int64, of the same shape."""
    return position_BL // block_size


# The visibility rule is written here a second time, on purpose: an exported folder carries no other file of the package.
# tests/unit/hf/test_plain.py ties it to the package's own.
def block_causal_sees(block_BL: Tensor) -> Tensor:
    """bool [B, L, L]: one clean sequence, where a position sees its own block and every earlier one.

    Args:
        block_BL: int64 [B or 1, L], the block of every position.
    """
    return block_BL[:, :, None] >= block_BL[:, None, :]


def pair_sees(block_BL: Tensor) -> Tensor:
    """bool [B, 2L, 2L] over [noisy; clean]: who may see whom.

    noisy -> noisy: the same block; noisy -> clean: earlier blocks; clean -> clean: its own block and earlier ones;
    clean -> noisy: never.

    Args:
        block_BL: int64 [B or 1, L], the block of every position.
    """
    same_BLL = block_BL[:, :, None] == block_BL[:, None, :]
    earlier_BLL = block_BL[:, :, None] > block_BL[:, None, :]
    noisy_rows = torch.cat([same_BLL, earlier_BLL], dim=2)
    clean_rows = torch.cat([torch.zeros_like(same_BLL), same_BLL | earlier_BLL], dim=2)
    return torch.cat([noisy_rows, clean_rows], dim=1)


def fold_groups(queries_BQNH: Tensor, num_groups: int) -> Tensor:
    """[B, Q, N, H] -> [B, G, (N/G) Q, H]: heads that share a key head become rows, so keys are never repeated."""
    batch, rows, heads, width = queries_BQNH.shape
    shared = heads // num_groups
    split = queries_BQNH.reshape(batch, rows, num_groups, shared, width)
    return split.permute(0, 2, 3, 1, 4).reshape(batch, num_groups, shared * rows, width)


def unfold_groups(mixed_BGRH: Tensor, num_heads: int) -> Tensor:
    """[B, G, (N/G) Q, H] -> [B, Q, N, H], the inverse of `fold_groups`."""
    batch, groups, rows, width = mixed_BGRH.shape
    shared = num_heads // groups
    split = mixed_BGRH.reshape(batch, groups, shared, rows // shared, width)
    return split.permute(0, 3, 1, 2, 4).reshape(batch, rows // shared, num_heads, width)


def attention_weights(queries_BQNH: Tensor, keys_BGKH: Tensor, sees_BQK: Tensor | None) -> Tensor:
    """What each query takes of each key: [B, N, Q, K], rows summing to 1; arguments as in `grouped_attention`."""
    shared = queries_BQNH.shape[2] // keys_BGKH.shape[1]
    keys_BNKH = keys_BGKH.repeat_interleave(shared, dim=1)
    scores_BNQK = queries_BQNH.transpose(1, 2) @ keys_BNKH.transpose(2, 3) * queries_BQNH.shape[-1] ** -0.5
    if sees_BQK is not None:
        scores_BNQK = scores_BNQK.masked_fill(~sees_BQK[:, None], -torch.inf)
    # softmax statistics in fp32 or better, as in torch's kernels
    wide = torch.promote_types(scores_BNQK.dtype, torch.float32)
    return scores_BNQK.softmax(dim=-1, dtype=wide).to(queries_BQNH.dtype)


def grouped_attention(queries_BQNH: Tensor, keys_BGKH: Tensor, values_BGKH: Tensor, sees_BQK: Tensor | None) -> Tensor:
    """Softmax attention with shared key heads and a boolean visibility.

    Args:
        queries_BQNH: [B, Q, N, H].
        keys_BGKH, values_BGKH: [B, G, K, H], G divides N.
        sees_BQK: bool [B or 1, Q, K]; None = everything is seen. No row may be all False.

    Returns:
        [B, Q, N, H].
    """
    num_heads, num_groups = queries_BQNH.shape[2], keys_BGKH.shape[1]
    visible = None
    if sees_BQK is not None:
        # Folded queries are rows head by head: each head of a group has the same visibility.
        visible = sees_BQK.repeat(1, num_heads // num_groups, 1)[:, None]
    folded = fold_groups(queries_BQNH, num_groups)
    mixed = F.scaled_dot_product_attention(folded, keys_BGKH, values_BGKH, attn_mask=visible)
    return unfold_groups(mixed, num_heads)
