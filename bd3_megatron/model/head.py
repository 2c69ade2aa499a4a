"""The vocabulary-parallel head: NLL of the rows that carry loss, in chunks, never a [rows, V] table.

Loss and gradients are computed together in the forward pass, chunk by chunk, and the backward only scales what is kept: three
matrix products where recomputing the logits would take four. Products of bf16 inputs are accumulated and kept in fp32, the
table's gradient included. SUBS: the mask id and the padding rows of the table get probability zero.
Source: BD3-LM section 3 (SUBS parameterisation); the fused form is known from Liger-Kernel's linear cross entropy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bd3_megatron.cost.assumptions import head_chunk_bytes


@dataclass(frozen=True)
class VocabShard:
    """The rows of the table that this rank holds, and which of them may be predicted."""

    start: int
    """First id of this rank."""
    vocab_size: int
    """Ids the model knows; rows from here on are padding."""
    never: int | None
    """An id with probability zero (the mask id under SUBS), or None."""
    group: dist.ProcessGroup | None
    """Tensor-parallel ranks that hold the other ids; None: all ids are here."""


def weighted_nll(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_R: Tensor,
    row_weight_R: Tensor,
    *,
    shard: VocabShard,
    confidence: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sum of row_weight x (NLL + confidence x entropy where the target is the likeliest id), and the parts of each row.

    Args:
        hidden_RD: [R, D] final hidden states at the loss rows; replicated over the group.
        weight_VD: [V_local, D] this rank's rows of the table; bias_V: [V_local] or None.
        target_R: int64 [R] ids to predict.
        row_weight_R: float32 [R].
        shard: which ids these rows are.
        confidence: factor beta of the confidence term (CAP of LLaDA 2), >= 0.

    Returns:
        (scalar fp32 sum with gradient, fp32 [R] NLL in nats without, fp32 [R] entropy in nats where the target is the
        likeliest id and 0 elsewhere, without; None at confidence 0); replicated over the group. The gradient with respect
        to hidden_RD is partial: this rank's ids only.
    """
    # inside a Function, needs_input_grad says True even under no_grad: evaluation would pay for gradients
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (hidden_RD, weight_VD, bias_V)
    )
    return _WeightedNll.apply(hidden_RD, weight_VD, bias_V, target_R, row_weight_R, shard, confidence, needs_grad)


class _WeightedNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_R: Tensor,
        row_weight_R: Tensor,
        shard: VocabShard,
        confidence: float,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        wide = torch.promote_types(hidden_RD.dtype, torch.float32)
        nll_R = torch.empty(hidden_RD.shape[0], dtype=wide, device=hidden_RD.device)
        entropy_R = torch.empty_like(nll_R) if confidence else None
        # the table's gradient, in fp32, lives from here to the backward of the micro-batch
        grads = _Gradients(hidden_RD, weight_VD, bias_V, wide) if needs_grad else None
        # without kernels that multiply bf16 into fp32, the inputs are widened, once for all chunks
        hidden, table = (t if _multiplies_into_fp32(t) else t.to(wide) for t in (hidden_RD, weight_VD))
        rows = _chunk_rows(weight_VD, shard)
        for start in range(0, hidden_RD.shape[0], rows):
            part = slice(start, start + rows)
            logits = _logits(hidden[part], table, bias_V, shard, wide)
            local = target_R[part] - shard.start
            here = (local >= 0) & (local < weight_VD.shape[0])
            local = torch.where(here, local, 0)
            nll_R[part], below_R = _softmax_in_place(logits, local, here, shard)
            # logits now hold probabilities
            if entropy_R is not None:
                entropy_R[part] = _entropy(logits, below_R, confidence, shard, with_gradient=grads is not None)
            if grads is not None:
                # d nll / d logits = p - onehot, and what the confidence term has added to p
                logits.scatter_add_(1, local[:, None], -here.to(wide)[:, None])
                grads.add(part, logits.mul_(row_weight_R[part, None]), hidden[part], table)
        if grads is not None:
            ctx.save_for_backward(grads.hidden, grads.weight, grads.bias)
        if entropy_R is None:
            ctx.mark_non_differentiable(nll_R)
            return (nll_R * row_weight_R).sum(), nll_R, None
        ctx.mark_non_differentiable(nll_R, entropy_R)
        return ((nll_R + confidence * entropy_R) * row_weight_R).sum(), nll_R, entropy_R

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        # The NLL of each row, the second output, carries no gradient.
        scale = upstream[0]
        hidden, weight, bias = ctx.saved_tensors
        d_bias = None if bias is None else bias * scale
        return (hidden * scale.to(hidden.dtype)), weight.mul_(scale), d_bias, None, None, None, None, None


def _chunk_rows(weight_VD: Tensor, shard: VocabShard) -> int:
    """Rows whose logits exist at a time. On a GPU few large chunks: each costs some 30 kernels and two passes over dW."""
    chunk = head_chunk_bytes(weight_VD.device.type, is_sharded=shard.group is not None)
    return max(1, chunk // (4 * weight_VD.shape[0]))


def _multiplies_into_fp32(low: Tensor) -> bool:
    """Whether products of this tensor's dtype can be returned in fp32 without widening it first (torch: on CUDA)."""
    return low.device.type == "cuda" and low.dtype in (torch.bfloat16, torch.float16)


def _product(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    return a @ b if a.dtype == wide else torch.mm(a, b, out_dtype=wide)


class _Gradients:
    """Gradients of the weighted sum, filled chunk by chunk; the table's in fp32 whatever the table's dtype."""

    def __init__(self, hidden_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, wide: torch.dtype) -> None:
        self._narrow = weight_VD.dtype
        self.hidden = torch.empty_like(hidden_RD)
        self.weight = torch.zeros_like(weight_VD, dtype=wide)
        self.bias = None if bias_V is None else torch.zeros_like(bias_V, dtype=wide)

    def add(self, part: slice, d_logits_RV: Tensor, hidden_RD: Tensor, table_VD: Tensor) -> None:
        if self.bias is not None:
            self.bias += d_logits_RV.sum(0)
        # rounded to the table's dtype on every device, so that a CPU run says what a GPU run computes
        d_RV = d_logits_RV.to(self._narrow).to(table_VD.dtype)
        if table_VD.dtype == self._narrow:
            torch.mm(d_RV, table_VD, out=self.hidden[part])
        else:
            self.hidden[part] = d_RV @ table_VD
        if d_RV.dtype == self.weight.dtype:
            self.weight.addmm_(d_RV.t(), hidden_RD)
        else:
            torch.addmm(self.weight, d_RV.t(), hidden_RD, out_dtype=self.weight.dtype, out=self.weight)


def _logits(
    hidden_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, shard: VocabShard, wide: torch.dtype
) -> Tensor:
    logits = _product(hidden_RD, weight_VD.t(), wide)
    if bias_V is not None:
        logits += bias_V.to(wide)
    # Padding rows of the table exist to make it divisible; they have no token.
    first_padding = max(0, shard.vocab_size - shard.start)
    if first_padding < weight_VD.shape[0]:
        logits[:, first_padding:] = float("-inf")
    if shard.never is not None and 0 <= shard.never - shard.start < weight_VD.shape[0]:
        logits[:, shard.never - shard.start] = float("-inf")
    return logits


def _softmax_in_place(logits: Tensor, local: Tensor, here: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Turn logits into probabilities over all ranks' ids; returns the targets' NLL and logit less the largest, both [R]."""
    # a rank whose ids are all padding has only -inf; a finite floor keeps -inf - (-inf) out
    # The largest logit is taken out before exp, over all ranks' ids, or large logits would overflow.
    peak = logits.amax(1).clamp_min(torch.finfo(logits.dtype).min)
    if shard.group is not None:
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=shard.group)
    logits -= peak[:, None]
    target_logit = torch.where(here, logits.gather(1, local[:, None])[:, 0], 0.0)
    total = logits.exp_().sum(1)
    if shard.group is not None:
        # One collective for both sums: only the rank that holds the target has its logit, others add 0.
        both = torch.stack([total, target_logit])
        dist.all_reduce(both, group=shard.group)
        total, target_logit = both
    logits /= total[:, None]
    return total.log() - target_logit, target_logit


def _entropy(
    probability: Tensor, below_R: Tensor, confidence: float, shard: VocabShard, *, with_gradient: bool
) -> Tensor:
    """Entropy over all ranks' ids where the target is the likeliest [R]; its gradient by the logits is added in place.

    Args:
        probability: [R, V_local].
        below_R: logit of the target less the largest logit, 0 where the target is the likeliest id.
    """
    each = torch.special.xlogy(probability, probability)
    entropy_R = -each.sum(1)
    if shard.group is not None:
        dist.all_reduce(entropy_R, group=shard.group)
    factor_R = confidence * (below_R == 0).to(entropy_R.dtype)
    if with_gradient:
        # d H / d logits = -p (log p + H)
        probability.mul_((1 - factor_R * entropy_R)[:, None]).sub_(each.mul_(factor_R[:, None]))
    return entropy_R * (below_R == 0)
