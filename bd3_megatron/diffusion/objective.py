"""The objective: what a model's logits cost, as sums. The mean is taken once, by whoever holds the global count.

Block diffusion: sum of weight * NLL over masked tokens, over the number of tokens that may be masked. MDLM is the same
with one block of the whole length. Block size 1 at t = 1 has weight 1 and everything masked: the sum is then the exact
negative log-likelihood by the chain rule of that model. The autoregressive baseline predicts the next token.
SUBS rule: the model never predicts the mask token, and a token that is visible is known.
Decides: numerics (fp32, or fp64 for fp64 logits), what counts in the denominator. Divides by nothing except in
`LossSums.mean`.
Source: BD3-LM (arXiv 2503.09573), the NELBO over blocks; MDLM (arXiv 2406.07524), SUBS; diffusion.py of
kuleshov-group/bd3lms for the two official denominators.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bd3_megatron.diffusion.corrupt import NoisyBatch
from bd3_megatron.errors import RangeError, ShapeError, check_shape

IMPOSSIBLE = -1e6
"""Log-probability of what the SUBS rule forbids, as in the official code: finite, so that 0 * log p stays 0."""


@dataclass(frozen=True)
class LossSums:
    """Numerator and denominator of a loss; sums of several are sums over all their tokens."""

    weighted_nll_sum: Tensor
    """Scalar, fp32 or fp64, nats."""
    token_count: Tensor
    """Scalar int64."""

    def __add__(self, other: LossSums) -> LossSums:
        return LossSums(self.weighted_nll_sum + other.weighted_nll_sum, self.token_count + other.token_count)

    def mean(self) -> Tensor:
        """Nats per token. NaN when nothing was counted."""
        return self.weighted_nll_sum / self.token_count


def subs_log_probs(logits_BLV: Tensor, noisy_BL: Tensor, is_masked_BL: Tensor, *, mask_id: int) -> Tensor:
    """Log-probabilities of every token under the SUBS rule.

    Args:
        logits_BLV: float [B, L, V], raw.
        noisy_BL: int64 [B, L].
        is_masked_BL: bool [B, L].
        mask_id: in [0, V).

    Returns:
        fp32 (fp64 for fp64 logits) [B, L, V]: log-softmax without the mask token where masked; elsewhere 0 for the
        visible token and IMPOSSIBLE for all others.

    Raises:
        ShapeError: shapes differ.
        RangeError: mask_id outside [0, V).
    """
    _check_logits(logits_BLV, noisy_BL, mask_id)
    check_shape("is_masked_BL", is_masked_BL.shape, noisy_BL.shape)
    allowed_BLV = _without_mask_token(logits_BLV, mask_id)
    predicted_BLV = allowed_BLV - allowed_BLV.logsumexp(dim=-1, keepdim=True)
    known_BLV = torch.full_like(predicted_BLV, IMPOSSIBLE).scatter(-1, noisy_BL[..., None], 0.0)
    return torch.where(is_masked_BL[..., None], predicted_BLV, known_BLV)


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


def weighted_nll(nll_BL: Tensor, batch: NoisyBatch) -> Tensor:
    """The loss of every token: weight * NLL where masked, exactly 0 elsewhere, whatever nll_BL holds there.

    Args:
        nll_BL: float [B, L], nats.
        batch: of the same samples.

    Returns:
        fp32 or wider [B, L]. Its sum over L is the bound on a sample's NLL.

    Raises:
        ShapeError: nll_BL is not [B, L].
    """
    check_shape("nll_BL", nll_BL.shape, batch.clean_BL.shape)
    weighted_BL = nll_BL.to(_decisive(nll_BL)) * batch.weight_BL
    return torch.where(batch.is_masked_BL, weighted_BL, 0.0)


def loss_sums(nll_BL: Tensor, batch: NoisyBatch, *, count_all_tokens: bool = False) -> LossSums:
    """Numerator and denominator of the block-diffusion loss.

    Args:
        nll_BL: float [B, L], nats.
        batch: of the same samples.
        count_all_tokens: also count tokens that are never masked (the official training loss; its evaluation does not).
            Padding is never counted.

    Returns:
        LossSums.

    Raises:
        ShapeError: nll_BL is not [B, L].
    """
    counted_BL = batch.countable_BL
    if count_all_tokens:
        counted_BL = torch.ones_like(counted_BL) if batch.is_padding_BL is None else ~batch.is_padding_BL
    return LossSums(weighted_nll(nll_BL, batch).sum(), counted_BL.sum())


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
    return weighted_nll(nll_BL, batch).unflatten(1, (-1, batch.block_size)).mean(dim=2)


def next_token_targets(
    clean_BL: Tensor, document_id_BL: Tensor | None = None, is_padding_BL: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What the autoregressive baseline predicts at each position.

    Args:
        clean_BL: int64 [B, L].
        document_id_BL: int [B, L]; no prediction crosses from one document to the next. None = one document.
        is_padding_BL: bool [B, L]; padding is no target.

    Returns:
        (target_BL int64, is_predicted_BL bool): the next token, and whether there is one. A sequence has L - 1.

    Raises:
        ShapeError: shapes differ.
    """
    is_predicted_BL = torch.ones_like(clean_BL, dtype=torch.bool)
    is_predicted_BL[:, -1] = False
    if document_id_BL is not None:
        check_shape("document_id_BL", document_id_BL.shape, clean_BL.shape)
        is_predicted_BL &= document_id_BL == document_id_BL.roll(-1, dims=1)
    if is_padding_BL is not None:
        check_shape("is_padding_BL", is_padding_BL.shape, clean_BL.shape)
        is_predicted_BL &= ~is_padding_BL.roll(-1, dims=1)
    return clean_BL.roll(-1, dims=1), is_predicted_BL


def next_token_loss_sums(nll_BL: Tensor, is_predicted_BL: Tensor) -> LossSums:
    """Numerator and denominator of the autoregressive loss.

    Args:
        nll_BL: float [B, L], nats, of the targets.
        is_predicted_BL: bool [B, L], from `next_token_targets`.

    Returns:
        LossSums; the count is the number of predictions.

    Raises:
        ShapeError: shapes differ.
    """
    check_shape("nll_BL", nll_BL.shape, is_predicted_BL.shape)
    nll_BL = nll_BL.to(_decisive(nll_BL))
    return LossSums(torch.where(is_predicted_BL, nll_BL, 0.0).sum(), is_predicted_BL.sum())


def _decisive(tensor: Tensor) -> torch.dtype:
    """The dtype in which losses are computed: fp32, or fp64 where the input already is."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _without_mask_token(logits_BLV: Tensor, mask_id: int) -> Tensor:
    forbidden_V = torch.zeros(logits_BLV.shape[-1], dtype=_decisive(logits_BLV), device=logits_BLV.device)
    forbidden_V[mask_id] = IMPOSSIBLE
    return logits_BLV + forbidden_V


def _nll(logits_BLV: Tensor, target_BL: Tensor) -> Tensor:
    at_target_BL = logits_BLV.gather(-1, target_BL[..., None]).squeeze(-1)
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
