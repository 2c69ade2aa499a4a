"""From logits to tokens: the mask never, the nucleus enough, the draw exact."""

from __future__ import annotations

import math

import pytest
import torch

from bd3_megatron.hf.token_choice_bd3 import TokenFilters, draw
from tests.tolerances import EXACT_FP64


def probabilities(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[None, None]


def kept(filters: TokenFilters, *values: float) -> list[int]:
    return filters.filtered(probabilities(*values))[0, 0].nonzero()[:, 0].tolist()


def test_the_nucleus_keeps_the_token_that_crosses_p() -> None:
    assert kept(TokenFilters(mask_id=None, top_p=0.9), 0.05, 0.5, 0.15, 0.3) == [1, 2, 3]
    assert kept(TokenFilters(mask_id=None, top_p=0.8), 0.05, 0.5, 0.15, 0.3) == [1, 3]
    assert kept(TokenFilters(mask_id=None, top_p=0.01), 0.05, 0.5, 0.15, 0.3) == [1]


def test_the_nucleus_has_at_least_mass_p_and_no_token_too_many() -> None:
    generator = torch.Generator().manual_seed(0)
    probability = torch.randn(50, 1, 200, dtype=torch.float64, generator=generator).softmax(-1)
    for p in (0.1, 0.5, 0.9, 0.99):
        nucleus = TokenFilters(mask_id=None, top_p=p).filtered(probability)
        mass = nucleus.sum(-1)
        least = nucleus.masked_fill(nucleus == 0, torch.inf).amin(-1)
        assert (mass >= p - EXACT_FP64).all()
        assert (mass - least < p + EXACT_FP64).all()


def test_top_k_and_min_p_keep_what_they_say() -> None:
    assert kept(TokenFilters(mask_id=None, top_k=2), 0.05, 0.5, 0.15, 0.3) == [1, 3]
    assert kept(TokenFilters(mask_id=None, min_p=0.4), 0.05, 0.5, 0.15, 0.3) == [1, 3]
    # The nucleus is taken of what top-k left: 0.8 / 1.0 crosses at the first.
    assert kept(TokenFilters(mask_id=None, top_k=2, top_p=0.6), 0.1, 0.5, 0.1, 0.3) == [1]


def test_the_mask_token_is_never_drawn_whatever_its_logit() -> None:
    logits = torch.zeros(1, 1, 4)
    logits[..., 3] = 1e9
    filters = TokenFilters(mask_id=3)
    for u in (0.0, 0.5, 1 - 2**-53):
        uniform = torch.full((1, 1), u, dtype=torch.float64)
        assert filters.choose(logits, uniform, None, with_scores=False).token_BR.item() < 3
    assert TokenFilters(mask_id=3, temperature=0).choose(logits, None, None, with_scores=False).token_BR.item() < 3


def test_a_draw_inverts_the_cumulative_weight_and_skips_weight_zero() -> None:
    weight = probabilities(0.0, 0.25, 0.0, 0.75, 0.0)
    for u, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (1 - 2**-53, 3)):
        assert draw(weight, torch.full((1, 1), u, dtype=torch.float64)).item() == token
    with pytest.raises(ValueError, match="no uniform numbers were given"):
        draw(weight, None)


def test_temperature_divides_logits_and_a_tiny_one_is_greedy() -> None:
    logits = torch.tensor([[[1.0, 3.0, 2.0]]])
    uniform = torch.full((1, 1), 0.999, dtype=torch.float64)
    for temperature, token in ((1e-30, 1), (1e-100, 1), (0.0, 1), (100.0, 2)):
        filters = TokenFilters(mask_id=None, temperature=temperature)
        assert filters.choose(logits, uniform, None, with_scores=False).token_BR.item() == token


def test_repetition_makes_seen_tokens_less_likely_on_both_sides_of_zero() -> None:
    logits = torch.tensor([[[2.0, -2.0, 2.0, -2.0]]])
    seen = torch.tensor([[True, True, False, False]])
    lowered = TokenFilters(mask_id=None, repetition_penalty=2.0).penalised(logits, seen)
    assert lowered[0, 0].tolist() == [1.0, -4.0, 2.0, -2.0]


def test_scores_are_the_models_own_at_every_temperature() -> None:
    logits = probabilities(0.7, 0.2, 0.1).log()
    uniform = torch.zeros(1, 1, dtype=torch.float64)
    for temperature in (0.0, 0.5, 2.0):
        choice = TokenFilters(mask_id=None, temperature=temperature).choose(logits, uniform, None, with_scores=True)
        entropy = -sum(p * math.log(p) for p in (0.7, 0.2, 0.1))
        assert choice.confidence_BR.item() == pytest.approx(0.7)
        assert choice.entropy_BR.item() == pytest.approx(entropy)
