"""Plans of noise: weights and laws against brute force."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from bd3_megatron.data.batch import CleanBatch
from bd3_megatron.diffusion.noise_level import Interval
from bd3_megatron.diffusion.noise_schedule import MIN_T
from bd3_megatron.errors import ConfigError
from bd3_megatron.evaluate.noise_plan import (
    CountDrawn,
    Enumerated,
    LevelDrawn,
    NextTokenPlan,
    count_law,
    noise_plan,
    pattern_weights,
)
from tests import tolerances
from tests.unit.diffusion.laws import quadrature


def clean(count: int, length: int = 12) -> CleanBatch:
    generator = torch.Generator().manual_seed(3)
    return CleanBatch(tokens_BL=torch.randint(0, 9, (count, length), generator=generator), index_B=torch.arange(count))


@pytest.mark.parametrize("block_size", [1, 2, 5, 12])
def test_pattern_weights_are_the_integral_over_noise_levels(block_size: int) -> None:
    t, weight = quadrature(Interval(), num_nodes=60)
    for m, found in enumerate(pattern_weights(block_size, MIN_T), start=1):
        expected = float((weight * t ** (m - 1) * (1 - t) ** (block_size - m)).sum())
        assert found == pytest.approx(expected, abs=tolerances.EXACT_FP64)


@pytest.mark.parametrize("block_size", [1, 3, 16, 1024])
def test_counts_follow_the_law_that_noise_levels_imply(block_size: int) -> None:
    cumulative = count_law(block_size, MIN_T)
    assert len(cumulative) == block_size and cumulative[-1].item() == pytest.approx(1.0, abs=1e-9)
    if block_size > 16:
        return
    chance = torch.diff(cumulative, prepend=torch.zeros(1, dtype=torch.float64))
    for m, weight in enumerate(pattern_weights(block_size, MIN_T), start=1):
        expected = math.comb(block_size, m) * m * weight / block_size
        assert chance[m - 1].item() == pytest.approx(expected, abs=tolerances.EXACT_FP64)


def test_a_count_draw_masks_what_its_weight_says() -> None:
    plan = CountDrawn(block_size=4, mask_id=9, num_draws=4)
    noisy = plan.noisy(clean(50), torch.zeros(50, dtype=torch.int64))
    masked_BK = noisy.is_masked_BL.unflatten(1, (-1, 4)).sum(dim=2)
    assert torch.equal(masked_BK, noisy.drawn_BK) and masked_BK.min() == 1 and masked_BK.max() == 4
    total_BK = noisy.weight_BL.unflatten(1, (-1, 4)).sum(dim=2)
    assert torch.equal(total_BK, torch.full_like(total_BK, 4.0))
    assert torch.equal(noisy.noisy_BL == 9, noisy.is_masked_BL)
    assert torch.equal(noisy.t_BK * 4, masked_BK.double())


@pytest.mark.parametrize("exact", [False, True])
def test_padding_is_hidden_as_text_is_and_weighs_nothing(exact: bool) -> None:
    plan = noise_plan(objective="block", block_size=4, mask_id=9, draws=4, exact=exact)
    rows, draw_B = clean(50), torch.arange(50) % 4
    is_padding_BL = torch.arange(12).expand(50, -1) >= 6
    padded = CleanBatch(tokens_BL=rows.tokens_BL, index_B=rows.index_B, is_padding_BL=is_padding_BL)
    noisy, whole = plan.noisy(padded, draw_B), plan.noisy(rows, draw_B)
    assert noisy is not None and whole is not None
    assert torch.equal(noisy.noisy_BL, whole.noisy_BL)
    assert torch.equal(noisy.weight_BL, whole.weight_BL * ~is_padding_BL)
    assert torch.equal(noisy.is_masked_BL, whole.is_masked_BL & ~is_padding_BL)


@pytest.mark.parametrize("kind", ["counts", "levels", "patterns", "next token"])
def test_only_answers_are_scored_and_counted(kind: str) -> None:
    rows, draw_B = clean(50), torch.arange(50) % 4
    supervised_BL = torch.arange(12).expand(50, -1) % 5 >= 2
    asked = CleanBatch(
        tokens_BL=rows.tokens_BL,
        index_B=rows.index_B,
        is_supervised_BL=supervised_BL,
        is_padding_BL=torch.arange(12).expand(50, -1) >= 10,
        is_fill_BL=torch.arange(12).expand(50, -1) == 9,
    )
    plan = noise_plan(
        objective="ar" if kind == "next token" else "block",
        block_size=4, mask_id=9, draws=4, exact=kind == "patterns", by_level=kind == "levels",
    )  # fmt: skip
    # positions 2, 3, 4, 7, 8, and 9 that fills a block: predicted, but no token of the text
    assert plan.counted(asked).tolist() == [6 if kind == "next token" else 5] * 50
    noisy, whole = plan.noisy(asked, draw_B), plan.noisy(rows, draw_B)
    if noisy is None or whole is None:
        assert kind == "next token"
        return
    shown_BL = ~supervised_BL & (torch.arange(12) < 10)
    assert torch.equal(noisy.noisy_BL[shown_BL], rows.tokens_BL[shown_BL])
    assert torch.equal(noisy.is_masked_BL, whole.is_masked_BL & supervised_BL & (torch.arange(12) < 10))
    assert torch.equal(noisy.weight_BL, whole.weight_BL * noisy.is_masked_BL)


def test_a_replicate_uses_every_stratum_once() -> None:
    plan = LevelDrawn(block_size=4, mask_id=9, num_draws=6)
    rows = clean(1)
    one = CleanBatch(tokens_BL=rows.tokens_BL.expand(6, -1), index_B=torch.zeros(6, dtype=torch.int64))
    t_BK = plan.noisy(one, torch.arange(6)).t_BK
    for replicate in (t_BK[:3], t_BK[3:]):
        stratum = ((replicate - 1e-3) / (1 - 1e-3) * 9).long().flatten()
        assert sorted(stratum.tolist()) == list(range(9))


def test_enumeration_visits_every_pattern_once() -> None:
    plan = Enumerated(block_size=3, mask_id=9)
    one = CleanBatch(tokens_BL=clean(1).tokens_BL.expand(7, -1), index_B=torch.zeros(7, dtype=torch.int64))
    noisy = plan.noisy(one, torch.arange(7))
    patterns = {tuple(row[:3].nonzero()[:, 0].tolist()) for row in noisy.is_masked_BL}
    assert patterns == {c for n in (1, 2, 3) for c in combinations(range(3), n)}
    assert torch.equal(noisy.is_masked_BL[:, :3].repeat(1, 4), noisy.is_masked_BL)


def test_blocks_of_one_token_are_scored_exactly_by_one_pass() -> None:
    plan = noise_plan(objective="block", block_size=1, mask_id=9, draws=8)
    assert isinstance(plan, Enumerated) and plan.draws == 1
    noisy = plan.noisy(clean(2), torch.zeros(2, dtype=torch.int64))
    assert noisy is not None and bool(noisy.is_masked_BL.all())
    assert torch.allclose(noisy.weight_BL, torch.ones(2, 12, dtype=torch.float64), atol=1e-14, rtol=0)


def test_next_token_predicts_all_but_the_first() -> None:
    plan = noise_plan(objective="ar", block_size=16, mask_id=None, draws=8)
    assert isinstance(plan, NextTokenPlan) and plan.counted(clean(2)).tolist() == [11, 11]


@pytest.mark.parametrize("exact", [False, True])
def test_a_sequence_shorter_than_its_blocks_is_refused(exact: bool) -> None:
    plan = noise_plan(objective="block", block_size=8, mask_id=9, exact=exact)
    with pytest.raises(ConfigError, match="seq_len=12 is not a multiple of block_size=8; use 8 or 16"):
        plan.noisy(clean(1), torch.zeros(1, dtype=torch.int64))
