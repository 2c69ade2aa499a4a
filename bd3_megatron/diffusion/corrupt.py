"""Corruption: which tokens of a sample are masked, as a function of (seed, index, block, position).

Contract: a token is masked when its uniform number lies below p(t) of its block; or, where a number of tokens is drawn, when
it is among the block's m smallest (`resample.py`, `exact_count.py`). Every rank computes the same batch and none is sent.
Refuses: shapes that contradict each other, block counts that do not divide the length, negative mask ids.
Costs: one Philox draw a token.
Source: BD3-LM (arXiv 2503.09573); diffusion.py of kuleshov-group/bd3lms: q_xt, _resample_q_xt, ignore_bos.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bd3_megatron import rng
from bd3_megatron.diffusion.axes import BD3_LM, ObjectiveAxes
from bd3_megatron.diffusion.exact_count import exact_mask
from bd3_megatron.diffusion.noise_level import Interval
from bd3_megatron.diffusion.noise_schedule import NoiseSchedule
from bd3_megatron.diffusion.resample import conditional_count
from bd3_megatron.diffusion.row_weight import cart_weights
from bd3_megatron.errors import RangeError, ShapeError, check_divides, check_shape
from bd3_megatron.rng import Purpose


@dataclass(frozen=True)
class NoisyBatch:
    """Clean samples and one corrupted copy of each; all tensors on the clean tokens' device except t_BK."""

    noisy_BL: Tensor
    """int64: the clean token, or mask_id where masked, masked padding included."""
    clean_BL: Tensor
    """int64."""
    is_masked_BL: Tensor
    """bool: a masked token of the text, so it carries a loss."""
    weight_BL: Tensor
    """float32 (or as asked): the loss weight where masked, 0 elsewhere."""
    t_BK: Tensor
    """The noise level of each block, as it was given; of a complement, 1 - p(t), the share that is masked in the mean."""
    drawn_BK: Tensor
    """int64: how many tokens of each block the draw masked, exempt ones counted."""
    countable_BL: Tensor
    """bool: the token may be masked, so it belongs in the mean."""
    is_padding_BL: Tensor | None = None
    """bool: no token of the text; None = there is none."""
    is_supervised_BL: Tensor | None = None
    """bool: False at what is given, as a prompt is; None = everything is predicted."""
    document_id_BL: Tensor | None = None
    """int: the document of each token; None = a row is one."""

    @property
    def block_size(self) -> int:
        return self.clean_BL.shape[1] // self.t_BK.shape[1]

    @property
    def level_BL(self) -> Tensor:
        """float32: the noise level of each token's block."""
        return per_token(self.t_BK.to(torch.float32), self.clean_BL.shape[1])

    @property
    def text_BL(self) -> Tensor:
        """bool: every token of the text that is not given, also a first one that is never masked."""
        text_BL = torch.ones_like(self.countable_BL) if self.is_padding_BL is None else ~self.is_padding_BL
        return text_BL if self.is_supervised_BL is None else text_BL & self.is_supervised_BL


def corrupt(
    clean_BL: Tensor,
    t_BK: Tensor,
    *,
    index_B: Tensor,
    seed: int,
    mask_id: int,
    schedule: NoiseSchedule,
    resample_to: Interval | None = None,
    never_mask_first: bool = False,
    is_padding_BL: Tensor | None = None,
    is_supervised_BL: Tensor | None = None,
    document_id_BL: Tensor | None = None,
    axes: ObjectiveAxes = BD3_LM,
    is_complement: bool = False,
    weight_dtype: torch.dtype = torch.float32,
) -> NoisyBatch:
    """Mask tokens of some samples at the noise levels of their blocks.

    Args:
        clean_BL: int64 [B, L].
        t_BK: float [B, K] in [MIN_T, 1], K dividing L; best on the CPU.
        index_B: int64 [B], sample indices in the order of consumption.
        seed: of the run, in [0, 2^48).
        mask_id: id of the mask token, >= 0.
        schedule: gives mask probability and loss weight at t.
        resample_to: condition every block's masked fraction on this interval; None: do not (unbiased).
        never_mask_first: keep position 0 visible and out of the mean (the paper's ignore_bos).
        is_padding_BL: bool [B, L]; padding is masked by its own draws, without loss, and never counted.
        is_supervised_BL: bool [B, L]; what is not stays visible and out of the mean.
        document_id_BL: int [B, L], where packed documents do not see each other: asked by weights by nearness, and kept.
        axes: which positions are masked, and how a masked token weighs.
        is_complement: mask just what the same arguments without it leave.
        weight_dtype: of weight_BL.

    Returns:
        NoisyBatch.

    Raises:
        ShapeError: wrong shapes or dtypes, or K does not divide L.
        RangeError: t out of range, a negative mask_id, an interval that no mask fulfils.
    """
    _check(clean_BL, t_BK, index_B, mask_id)
    for name, given_BL in (("is_padding_BL", is_padding_BL), ("is_supervised_BL", is_supervised_BL)):
        if given_BL is not None:
            check_shape(name, given_BL.shape, clean_BL.shape)
    device, length = clean_BL.device, clean_BL.shape[1]
    # The schedule reads t to check it: with t on the CPU nothing here waits for a GPU.
    probability_BK = schedule.mask_probability(t_BK)
    text_BL = torch.ones_like(clean_BL, dtype=torch.bool) if is_padding_BL is None else ~is_padding_BL
    scored_BL = text_BL if is_supervised_BL is None else text_BL & is_supervised_BL
    countable_BL = countable(scored_BL, never_mask_first=never_mask_first)
    u_BKS = _uniform(index_B, t_BK.shape[1], length, seed=seed, device=device)
    if axes.positions == "exact":
        drawn_BKS = exact_mask(u_BKS, probability_BK.to(device), countable_BL.view_as(u_BKS), axes)
    else:
        drawn_BKS = _draw(u_BKS, probability_BK, index_B, seed=seed, resample_to=resample_to)
    # of the draw and not of what is exempt: both views of a pair keep the same tokens visible
    drawn_BKS = ~drawn_BKS if is_complement else drawn_BKS
    drawn_BL = drawn_BKS.flatten(1)
    # Exempt after the draw: the masks of all other tokens stay what they were. Padding is noised like text and carries no
    # loss; the end tokens that fill a document's last block do carry loss (see `data/packing.py`).
    is_masked_BL = drawn_BL & countable_BL
    weight_BK = _bound_weight(t_BK, probability_BK, schedule, is_complement=is_complement)
    weight_BL = per_token(weight_BK.to(device, weight_dtype), length)
    if axes.row_weight == "flat":
        weight_BL = torch.ones_like(weight_BL)
    elif axes.row_weight == "cart":
        is_text_BL = None if is_padding_BL is None else ~is_padding_BL
        nearness_BL = cart_weights(is_masked_BL, t_BK.shape[1], document_id_BL=document_id_BL, is_text_BL=is_text_BL)
        weight_BL = nearness_BL.to(weight_dtype)
    return NoisyBatch(
        noisy_BL=clean_BL.masked_fill(hidden(drawn_BL, is_masked_BL, is_padding_BL), mask_id),
        clean_BL=clean_BL,
        is_masked_BL=is_masked_BL,
        weight_BL=weight_BL * is_masked_BL,
        t_BK=1 - probability_BK if is_complement else t_BK,
        drawn_BK=drawn_BKS.sum(dim=2),
        countable_BL=countable_BL,
        is_padding_BL=is_padding_BL,
        is_supervised_BL=is_supervised_BL,
        document_id_BL=document_id_BL,
    )


def countable(scored_BL: Tensor, *, never_mask_first: bool) -> Tensor:
    """Tokens that may be masked, of those that may carry loss: bool [B, L]."""
    if not never_mask_first:
        return scored_BL
    # a row's first token has no past in the official convention: it is given
    return scored_BL & (torch.arange(scored_BL.shape[1], device=scored_BL.device) > 0)


def hidden(drawn_BL: Tensor, is_masked_BL: Tensor, is_padding_BL: Tensor | None) -> Tensor:
    """Where the model reads the mask token: masked text, and padding that the draw masked. bool [B, L]."""
    return is_masked_BL if is_padding_BL is None else is_masked_BL | (drawn_BL & is_padding_BL)


def per_token(per_block_BK: Tensor, length: int) -> Tensor:
    """One number a block -> the same number for each of its tokens: [B, K] -> [B, L]."""
    return per_block_BK.repeat_interleave(length // per_block_BK.shape[1], dim=1)


def _bound_weight(t_BK: Tensor, probability_BK: Tensor, schedule: NoiseSchedule, *, is_complement: bool) -> Tensor:
    """The weight of a masked token's NLL in the bound: p'(t) / p(t), or p'(t) / (1 - p(t)) of a complement."""
    # Only Interval(1, 1) draws t = 1: everything is masked and the weight is 1 under every schedule, so that with
    # blocks of one token the sum of losses is the exact negative log-likelihood.
    weight_BK = torch.where(t_BK == 1.0, 1.0, schedule.loss_weight(t_BK))
    if not is_complement:
        return weight_BK
    # The bound is the integral over the mask probability q of 1 / q times the loss at q, and the complement's is q = 1 - p:
    # dq = p' dt. Where p rounds to 1 nothing is masked and the weight is never read.
    left_BK = 1 - probability_BK
    return torch.where(left_BK > 0, weight_BK * probability_BK / left_BK, 1.0)


def _uniform(index_B: Tensor, num_blocks: int, length: int, *, seed: int, device: torch.device) -> Tensor:
    """The uniform number of every token: float64 [B, K, S] on `device`."""
    position_KS = torch.arange(length, device=device).reshape(num_blocks, length // num_blocks)
    index_B11 = index_B.to(device)[:, None, None]
    # Keyed by the sample's index in the order of consumption: by dataset row an epoch would repeat its noise, by rank
    # the grid would show.
    return rng.uniform(seed, Purpose.CORRUPT, index_B11, position_KS // position_KS.shape[1], position_KS)


def _draw(u_BKS: Tensor, probability_BK: Tensor, index_B: Tensor, *, seed: int, resample_to: Interval | None) -> Tensor:
    """The mask of tokens that are masked by themselves, before exemptions: bool [B, K, S]."""
    device, (_, num_blocks, block_size) = u_BKS.device, u_BKS.shape
    if resample_to is None:
        return u_BKS < probability_BK.to(device)[:, :, None]
    # On t's device, usually the CPU: the logarithms in the count's law may differ in their last bit between devices.
    near = probability_BK.device
    u_BK = rng.uniform(seed, Purpose.RESAMPLE, index_B.to(near)[:, None], torch.arange(num_blocks, device=near))
    count_BK = conditional_count(u_BK, probability_BK, block_size, resample_to)
    # Ranks of uniform numbers are a uniform permutation: the m smallest are a uniform choice of m tokens.
    rank_BKS = u_BKS.argsort(dim=2).argsort(dim=2)
    return rank_BKS < count_BK.to(device)[:, :, None]


def _check(clean_BL: Tensor, t_BK: Tensor, index_B: Tensor, mask_id: int) -> None:
    if clean_BL.dim() != 2 or clean_BL.dtype != torch.int64:
        raise ShapeError(f"clean_BL is {clean_BL.dtype} {list(clean_BL.shape)}; expected torch.int64 [any, any].")
    batch, length = clean_BL.shape
    check_shape("index_B", index_B.shape, (batch,))
    check_shape("t_BK", t_BK.shape, (batch, None))
    check_divides("num_blocks", t_BK.shape[1], "length", length, kind=ShapeError)
    if mask_id < 0:
        raise RangeError(f"mask_id={mask_id} is negative; use the id of the tokenizer's mask token.")
