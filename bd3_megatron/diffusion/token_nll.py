"""Negative log-likelihoods of tokens from raw logits, for rows whose logits are at hand (training has its own head).

SUBS rule: the model never predicts the mask token. fp32, or fp64 for fp64 logits. Divides by nothing.
Source: MDLM (arXiv 2406.07524), SUBS parameterisation; diffusion.py of kuleshov-group/bd3lms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bd3_megatron.diffusion.corrupt import NoisyBatch
from bd3_megatron.errors import RangeError, ShapeError, check_shape

IMPOSSIBLE = -1e6
"""Added to the mask token's logit, as in the official code: finite, so that 0 * log p stays 0."""


def masked_token_nll(logits_BLV: Tensor, clean_BL: Tensor, *, mask_id: int) -> Tensor:
    """-log p of the clean token, as if its position were masked; any leading shape, e.g. masked positions only.

    Args:
        logits_BLV: float [..., V], raw.
        clean_BL: int64 [...].
        mask_id: in [0, V).

    Returns:
        fp32 (fp64 for fp64 logits) [...], nats.

    Raises:
        ShapeError: shapes differ.
        RangeError: mask_id outside [0, V).
    """
    _check_logits(logits_BLV, clean_BL, mask_id)
    # SUBS: the model never predicts the mask token, so its probability is taken out before the softmax.
    return _nll(_without_mask_token(logits_BLV, mask_id), clean_BL)


def next_token_nll(logits_BLV: Tensor, target_BL: Tensor) -> Tensor:
    """-log p of the target under the whole vocabulary: the autoregressive baseline knows no mask token.

    Args:
        logits_BLV: float [..., V], raw.
        target_BL: int64 [...].

    Returns:
        fp32 (fp64 for fp64 logits) [...], nats.

    Raises:
        ShapeError: shapes differ.
    """
    check_shape("logits_BLV", logits_BLV.shape, (*target_BL.shape, None))
    return _nll(logits_BLV.to(_decisive(logits_BLV)), target_BL)


def block_losses(nll_BL: Tensor, batch: NoisyBatch) -> Tensor:
    """The estimate that each block alone gives of the loss: its weighted NLL over its S positions.

    Args:
        nll_BL: float [B, L], nats.
        batch: of the same samples.

    Returns:
        fp32 or wider [B, K], nats per token.

    Raises:
        ShapeError: nll_BL is not [B, L].
    """
    check_shape("nll_BL", nll_BL.shape, batch.clean_BL.shape)
    weighted_BL = nll_BL.to(_decisive(nll_BL)) * batch.weight_BL
    # where nothing is masked the NLL is of no use and may be NaN
    weighted_BL = torch.where(batch.is_masked_BL, weighted_BL, 0.0)
    # Divided by S and not by the number of masked tokens: the estimate of each block must stay unbiased.
    return weighted_BL.unflatten(1, (-1, batch.block_size)).mean(dim=2)


def _decisive(tensor: Tensor) -> torch.dtype:
    """The dtype in which losses are computed: fp32, or fp64 where the input already is."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _without_mask_token(logits_BLV: Tensor, mask_id: int) -> Tensor:
    forbidden_V = torch.zeros(logits_BLV.shape[-1], dtype=_decisive(logits_BLV), device=logits_BLV.device)
    forbidden_V[mask_id] = IMPOSSIBLE
    return logits_BLV + forbidden_V


def _nll(logits_BLV: Tensor, target_BL: Tensor) -> Tensor:
    at_target_BL = logits_BLV.gather(-1, target_BL[..., None]).squeeze(-1)
    # logsumexp less one logit: no tensor of log-probabilities [B, L, V] is made.
    return logits_BLV.logsumexp(dim=-1) - at_target_BL


def _check_logits(logits_BLV: Tensor, tokens_BL: Tensor, mask_id: int) -> None:
    check_shape("logits_BLV", logits_BLV.shape, (*tokens_BL.shape, None))
    if tokens_BL.dtype != torch.int64:
        raise ShapeError(f"tokens are {tokens_BL.dtype}; expected torch.int64.")
    if not 0 <= mask_id < logits_BLV.shape[-1]:
        raise RangeError(
            f"mask_id={mask_id} is outside the vocabulary of {logits_BLV.shape[-1]}; "
            f"use the id of the tokenizer's mask token."
        )
