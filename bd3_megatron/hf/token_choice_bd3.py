"""From logits to one token a row: penalties, temperature, filters, and one uniform number.

Exact for the model when temperature is 1 and no filter or penalty is set. The order is that of transformers: repetition
penalty, temperature, top-k, nucleus, min-p. Softmax runs in fp32 or better.
Source: nucleus sampling, Holtzman et al. 2020 (the smallest set whose mass reaches p); min-p, Nguyen et al. 2024;
repetition penalty, Keskar et al. 2019.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# In fp32 the logits over a smaller one would be 0 / 0 = NaN; at this one only equals of the best token are drawn.
LEAST_TEMPERATURE = 1e-30


@dataclass(frozen=True)
class Choice:
    """One candidate token for each of R rows."""

    token_BR: Tensor
    """int64: the candidate, never the mask token"""
    confidence_BR: Tensor
    """the model's own probability of it (temperature 1, no filters)"""
    entropy_BR: Tensor
    """entropy in nats of the model's own distribution"""


@dataclass(frozen=True, kw_only=True)
class TokenFilters:
    """How candidates are drawn from logits.

    Args:
        mask_id: never drawn; None for models without a mask token.
        temperature: > 0 divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens; 0 = all.
        top_p: keep the smallest set of mass >= p; 1 = all.
        min_p: keep tokens at least this fraction as likely as the best; 0 = all.
        repetition_penalty: > 1 makes visible tokens less likely; 1 = off.
    """

    mask_id: int | None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def choose(
        self, logits_BRV: Tensor, uniform_BR: Tensor | None, seen_BV: Tensor | None, *, with_scores: bool
    ) -> Choice:
        """Draw one candidate a row.

        Args:
            logits_BRV: raw logits of the rows, any float dtype.
            uniform_BR: float64 in [0, 1), one a row; None only at temperature 0.
            seen_BV: bool, visible tokens of each sequence; None without a repetition penalty.
            with_scores: fill confidence and entropy; else both are empty tensors.
        """
        wide = torch.float64 if logits_BRV.dtype == torch.float64 else torch.float32
        logits_BRV = logits_BRV.to(wide, copy=True)
        # The SUBS rule: the mask token has probability 0 whatever the logits say.
        if self.mask_id is not None:
            logits_BRV[..., self.mask_id] = -torch.inf
        drawn_from_BRV = logits_BRV if seen_BV is None else self.penalised(logits_BRV, seen_BV)
        if self.temperature == 0:
            token_BR = drawn_from_BRV.argmax(dim=-1)
        else:
            # The best logit is taken off first: a tiny temperature must not overflow to inf - inf.
            centred_BRV = drawn_from_BRV - drawn_from_BRV.amax(dim=-1, keepdim=True)
            token_BR = draw(
                self.filtered((centred_BRV / max(self.temperature, LEAST_TEMPERATURE)).softmax(dim=-1)), uniform_BR
            )
        if not with_scores:
            return Choice(token_BR, logits_BRV.new_empty(0), logits_BRV.new_empty(0))
        return Choice(token_BR, *scores(logits_BRV, token_BR))

    def penalised(self, logits_BRV: Tensor, seen_BV: Tensor) -> Tensor:
        """Logits of seen tokens, divided by the penalty where positive and multiplied where negative."""
        penalty = self.repetition_penalty
        lowered_BRV = torch.where(logits_BRV > 0, logits_BRV / penalty, logits_BRV * penalty)
        return torch.where(seen_BV[:, None], lowered_BRV, logits_BRV)

    def filtered(self, probability_BRV: Tensor) -> Tensor:
        """Probabilities with everything filtered out set to 0; not renormalised."""
        if self.top_k > 0 or self.top_p < 1:
            probability_BRV = self._ranked(probability_BRV)
        if self.min_p > 0:
            best_BR1 = probability_BRV.amax(dim=-1, keepdim=True)
            probability_BRV = probability_BRV.where(probability_BRV >= self.min_p * best_BR1, 0)
        return probability_BRV

    def _ranked(self, probability_BRV: Tensor) -> Tensor:
        sorted_BRV, order_BRV = probability_BRV.sort(dim=-1, descending=True)
        if self.top_k > 0:
            sorted_BRV[..., self.top_k :] = 0
        if self.top_p < 1:
            mass_BRV = sorted_BRV.double().cumsum(dim=-1)
            mass_before_BRV = mass_BRV - sorted_BRV
            # The first token whose predecessors already hold p is out: the one that crosses p stays.
            sorted_BRV = sorted_BRV.where(mass_before_BRV < self.top_p * mass_BRV[..., -1:], 0)
        return torch.zeros_like(probability_BRV).scatter(-1, order_BRV, sorted_BRV)


def draw(weight_BRV: Tensor, uniform_BR: Tensor | None) -> Tensor:
    """Tokens whose cumulative weight first exceeds the uniform number: int64 [B, R].

    A token of weight 0 is never drawn, whatever the rounding.
    """
    if uniform_BR is None:
        raise ValueError("no uniform numbers were given; only temperature=0 does without them.")
    # One uniform number inverts the cumulative distribution; a number a vocabulary entry would cost V draws a token.
    mass_BRV = weight_BRV.double().cumsum(dim=-1)
    total_BR1 = mass_BRV[..., -1:]
    # u < 1, but u * total may round up to total: step back, so that some token always lies beyond.
    target_BR1 = torch.minimum(
        uniform_BR[..., None] * total_BR1, torch.nextafter(total_BR1, torch.zeros_like(total_BR1))
    )
    return torch.searchsorted(mass_BRV, target_BR1, right=True)[..., 0]


def scores(logits_BRV: Tensor, token_BR: Tensor) -> tuple[Tensor, Tensor]:
    """(probability of the token, entropy in nats) under the model's own distribution, each [B, R]."""
    log_probability_BRV = logits_BRV.log_softmax(dim=-1)
    confidence_BR = log_probability_BRV.gather(-1, token_BR[..., None])[..., 0].exp()
    # exp(-inf) * -inf is NaN, exp(-inf) * finite is 0
    finite_BRV = log_probability_BRV.clamp(min=torch.finfo(logits_BRV.dtype).min)
    return confidence_BR, -(log_probability_BRV.exp() * finite_BRV).sum(dim=-1)
