"""Each axis of the objective does what it says, and moves the noise of no other one.

Statistical tests draw with fixed seeds; each states n and the chance that a correct generator would fail it.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bd3_megatron.diffusion.axes import ObjectiveAxes
from bd3_megatron.diffusion.corrupt import NoisyBatch, corrupt
from bd3_megatron.diffusion.noise_level import Interval, noise_levels
from bd3_megatron.diffusion.noise_schedule import SCHEDULES, NoiseSchedule, noise_schedule
from bd3_megatron.diffusion.objective import BlockDiffusion
from bd3_megatron.diffusion.row_weight import CART_P, cart_weights
from bd3_megatron.errors import ConfigError
from tests import tolerances

L, MASK = 32, 40
LINEAR = noise_schedule("loglinear")


def drawn(
    num: int,
    axes: dict[str, Any],
    *,
    block: int = 8,
    schedule: NoiseSchedule = LINEAR,
    t: Tensor | None = None,
    **more: Any,
) -> NoisyBatch:
    """`num` samples of L tokens under some axes."""
    index, made = torch.arange(num), ObjectiveAxes(**axes)
    if t is None:
        t = noise_levels(
            5, index, num_blocks=L // block, interval=Interval(), group_size=8,
            blocks_per_level=made.blocks_per_level(L // block),
        )  # fmt: skip
    clean = (index[:, None] * 7 + torch.arange(L)) % MASK
    return corrupt(clean, t, index_B=index, seed=5, mask_id=MASK, schedule=schedule, axes=made, **more)


@pytest.mark.parametrize("schedule", ["loglinear", "cosine"])
@pytest.mark.parametrize("least", [0, 1])
@pytest.mark.parametrize("half_life", [None, 0.25])
def test_exactly_round_p_n_tokens_of_a_block_are_masked(schedule: str, least: int, half_life: float | None) -> None:
    law = noise_schedule(schedule)
    padding = torch.arange(L).expand(64, L) >= 27
    batch = drawn(
        64,
        {"positions": "exact", "least_masked": least, "position_half_life": half_life},
        schedule=law,
        never_mask_first=True,
        is_padding_BL=padding,
    )
    p_BK = law.mask_probability(batch.t_BK).tolist()
    masked_BK = batch.is_masked_BL.unflatten(1, (4, 8)).sum(2).tolist()
    for row, probabilities in enumerate(p_BK):
        for block, (p, n) in enumerate(zip(probabilities, (7, 8, 8, 3), strict=True)):
            assert masked_BK[row][block] == max(least, math.floor(p * n + 0.5)), (row, block)
    assert torch.equal(batch.noisy_BL == MASK, batch.is_masked_BL | ((batch.noisy_BL == MASK) & padding))
    assert not batch.is_masked_BL[:, 0].any() and not (batch.is_masked_BL & padding).any()
    # padding is masked by itself, as text is without the axis
    assert 0.3 < (batch.noisy_BL[:, 27:] == MASK).double().mean() < 0.7


def test_exactly_k_is_of_the_answer_in_a_block() -> None:
    supervised = torch.arange(L).expand(64, L) % 8 >= 3
    batch = drawn(64, {"positions": "exact"}, is_supervised_BL=supervised)
    wanted_BK = torch.floor(batch.t_BK * 5 + 0.5).long()
    assert torch.equal(batch.is_masked_BL.unflatten(1, (4, 8)).sum(2), wanted_BK) and wanted_BK.max() == 5
    assert torch.equal(batch.noisy_BL == MASK, batch.is_masked_BL & supervised)


@pytest.mark.parametrize("half_life", [None, 0.5])
def test_tokens_are_included_with_the_stated_probabilities(half_life: float | None) -> None:
    """Draws without replacement in proportion to the weights, enumerated; n = 20,000 blocks of 4 with k = 2.

    Five standard errors, chance of a false alarm 6e-7 for each of eight positions.
    """
    p, size, k = 0.375, 4, 2
    t = torch.full((2500, 8), p, dtype=torch.float64)
    batch = drawn(2500, {"positions": "exact", "position_half_life": half_life}, block=size, t=t)
    weights = [1.0 if half_life is None else 2 ** ((1 - p) * i / (half_life * size)) for i in range(size)]
    chance = [0.0] * size
    for order in itertools.permutations(range(size), k):
        first = weights[order[0]] / sum(weights)
        second = weights[order[1]] / (sum(weights) - weights[order[0]])
        for i in order:
            chance[i] += first * second
    found = batch.is_masked_BL.view(-1, size).double().mean(0).tolist()
    for i in range(size):
        assert abs(found[i] - chance[i]) < 5 * math.sqrt(chance[i] * (1 - chance[i]) / 20_000), i
    if half_life is None:
        assert chance == [pytest.approx(k / size)] * size


@pytest.mark.parametrize("positions", ["bernoulli", "exact"])
def test_complementary_views_mask_every_token_once(positions: str) -> None:
    padding = torch.arange(L).expand(8, L) >= 29
    axes = {"positions": positions, "pairing": "complementary"}
    first, second = (
        drawn(8, axes, is_padding_BL=padding, never_mask_first=True, is_complement=c) for c in (False, True)
    )
    once = (torch.arange(L) > 0) & ~padding
    assert torch.equal(first.is_masked_BL ^ second.is_masked_BL, once)
    assert not (first.is_masked_BL & second.is_masked_BL).any()
    assert torch.equal(
        first.is_masked_BL,
        drawn(8, {"positions": positions}, is_padding_BL=padding, never_mask_first=True).is_masked_BL,
    )
    assert torch.allclose(second.t_BK, 1 - first.t_BK)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_the_second_view_of_a_pair_is_as_unbiased_as_the_first(schedule: NoiseSchedule) -> None:
    """The bound is the integral over the mask probability q of 1 / q E[loss], here of 1 + (masked neighbours) a masked token.

    n = 20,000 samples of four blocks of 2; five standard errors from integrals in closed form, false alarm 6e-7 each.
    """
    num = 5000
    index = torch.arange(num)
    t = noise_levels(3, index, num_blocks=16, interval=Interval(), group_size=1)
    clean = torch.zeros(num, L, dtype=torch.int64)
    shared: dict[str, Any] = {"index_B": index, "seed": 3, "mask_id": MASK, "schedule": schedule}
    low, high = (float(schedule.mask_probability(torch.tensor(end, dtype=torch.float64))) for end in (1e-3, 1.0))
    for is_complement in (False, True):
        batch = corrupt(clean, t, is_complement=is_complement, weight_dtype=torch.float64, **shared)
        masked = batch.is_masked_BL.view(num, 16, 2).double()
        loss = (batch.weight_BL.view(num, 16, 2) * masked * masked.sum(2, keepdim=True)).flatten(1)
        a, b = (1 - high, 1 - low) if is_complement else (low, high)
        # E[mask_i (1 + mask_j)] / q = 1 + q, over q in [a, b], and t covers [1e-3, 1]
        wanted = ((b - a) + (b * b - a * a) / 2) / (1 - 1e-3)
        mean = loss.mean(1)
        assert abs(mean.mean().item() - wanted) < 5 * mean.std().item() / math.sqrt(num), is_complement


def test_levels_are_shared_by_what_the_axis_says_and_strata_by_the_batch() -> None:
    def levels(blocks_per_level: int) -> Tensor:
        return noise_levels(
            3, torch.arange(8), num_blocks=6, interval=Interval(), group_size=8, blocks_per_level=blocks_per_level
        )

    assert ObjectiveAxes().blocks_per_level(6) == 1 and ObjectiveAxes(level_per="sample").blocks_per_level(6) == 6
    sample, group = levels(6), levels(4)
    assert (sample == sample[:, :1]).all() and len(sample[:, 0].unique()) == 8
    # eight samples share eight strata of [1e-3, 1], each used once
    assert sorted(((sample[:, 0] - 1e-3) / (1 - 1e-3) * 8).long().tolist()) == list(range(8))
    assert (group[:, :4] == group[:, :1]).all() and (group[:, 4:] == group[:, 4:5]).all()
    assert (group[:, 0] != group[:, 4]).all()
    # two levels a sample, whatever the blocks: those of a sample of two blocks
    pair = noise_levels(3, torch.arange(8), num_blocks=2, interval=Interval(), group_size=8)
    assert torch.equal(group[:, [0, 4]], pair)
    assert ObjectiveAxes(level_per="group", group_blocks=4).blocks_per_level(6) == 4


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("block", [1, 4, 16, L])
def test_nearness_weights_are_the_written_out_double_loop(block: int, documents: bool) -> None:
    generator = torch.Generator().manual_seed(block)
    masked = torch.rand(3, L, generator=generator) < 0.6
    text = torch.arange(L).expand(3, L) < 30
    document = torch.randint(0, 3, (3, L), generator=generator).sort(1).values if documents else None
    found = cart_weights(masked, L // block, document_id_BL=document, is_text_BL=text)
    for b, i in itertools.product(range(3), range(L)):
        wanted = 0.0
        for j in range(L):
            sees = j // block < i // block or (j // block == i // block and not masked[b, j])
            same = document is None or document[b, i] == document[b, j]
            if j != i and sees and same and text[b, j]:
                wanted += 0.5 * CART_P * (1 - CART_P) ** (abs(i - j) - 1)
        assert found[b, i].item() == pytest.approx(wanted, abs=tolerances.EXACT_FP64), (b, i)


def test_rows_weigh_what_the_axis_says() -> None:
    elbo, flat, cart = (drawn(8, {"row_weight": kind}, weight_dtype=torch.float64) for kind in ("elbo", "flat", "cart"))
    masked = elbo.is_masked_BL
    assert torch.equal(elbo.weight_BL[masked], (1 / elbo.t_BK).repeat_interleave(8, 1)[masked])
    assert torch.equal(flat.weight_BL, masked.double())
    assert torch.equal(cart.weight_BL, cart_weights(masked, 4) * masked)


def test_the_denominator_is_what_the_axis_says() -> None:
    padding = torch.arange(L).expand(4, L) >= torch.tensor([[L], [20], [9], [1]])
    batch = drawn(4, {}, is_padding_BL=padding, never_mask_first=True)

    def count(kind: Any) -> tuple[int, Tensor]:
        objective = BlockDiffusion(block_size=8, axes=ObjectiveAxes(denominator=kind))
        rows = objective.loss_rows(batch.clean_BL, [batch, batch])
        assert objective.text_count(rows, [batch, batch]) == 2 * (32 + 20 + 9 + 1)
        assert objective.count_varies == (kind == "loss_rows")
        return objective.token_count(rows, [batch, batch]), rows[1].weight_BL

    assert [count(kind)[0] for kind in ("maskable", "all")] == [2 * (31 + 19 + 8), 2 * (32 + 20 + 9 + 1)]
    assert count("loss_rows")[0] == 2 * batch.is_masked_BL.sum() > 0
    # the last sample has nothing that could be masked, and is no sample of the mean
    samples, weight = count("answer_length")
    assert samples == 2 * 3
    assert torch.allclose(weight * torch.tensor([[31], [19], [8], [1]]), batch.weight_BL)


def test_no_axis_moves_the_noise_of_another() -> None:
    plain = drawn(8, {})
    for axes in ({"row_weight": "flat"}, {"row_weight": "cart"}, {"denominator": "all"}, {"pairing": "complementary"}):
        assert torch.equal(drawn(8, axes).noisy_BL, plain.noisy_BL), axes
    for axes in ({"positions": "exact"}, {"positions": "exact", "position_half_life": 0.25}):
        assert torch.equal(drawn(8, axes).t_BK, plain.t_BK), axes
    # at one level the masks are those of the tokens' own numbers, whatever shares the level
    t = torch.full((8, 4), 0.4, dtype=torch.float64)
    assert torch.equal(drawn(8, {"level_per": "sample"}, t=t).noisy_BL, drawn(8, {}, t=t).noisy_BL)
    # exact draws take the smallest of the numbers that independent draws compare with p
    exact = drawn(8, {"positions": "exact"}, t=t).is_masked_BL.view(8, 4, 8)
    alone = drawn(8, {}, t=t).is_masked_BL.view(8, 4, 8)
    assert ((exact & ~alone).any(2) & (alone & ~exact).any(2)).sum() == 0


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"level_per": "group"}, r"axes.level_per=group with group_blocks=None: only groups .*; give both"),
    ({"group_blocks": 2}, r"axes.level_per=block with group_blocks=2: only groups"),
    ({"least_masked": 1}, r"axes.least_masked=1 with positions=bernoulli, .*; use positions=exact"),
    ({"position_half_life": 0.25}, r"axes.position_half_life=0.25 with positions=bernoulli"),
]
AGAINST_THE_RUN: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"positions": "exact"}, {"resample": True}, r"axes.positions=exact with diffusion.resample=true: both decide"),
    ({"level_per": "group", "group_blocks": 5}, {}, r"axes.group_blocks=5 exceeds the 4 blocks .*; use at most 4"),
    ({"pairing": "complementary"}, {"views": 3}, r"axes.pairing=complementary with diffusion.views=3: .*even number"),
    ({"pairing": "complementary"}, {"views": 2, "resample": True}, r"complementary with diffusion.resample=true"),
    ({"pairing": "complementary"}, {"views": 2, "interval": (1.0, 1.0)}, r"complementary with interval \[1, 1\]"),
    ({"pairing": "complementary"}, {"views": 2, "searches": True}, r"pairing=complementary with search_every_steps"),
    ({"row_weight": "flat"}, {"searches": True}, r"row_weight=flat with search_every_steps above 0: .*row_weight=elbo"),
    ({"positions": "exact"}, {"searches": True}, r"positions=exact with search_every_steps"),
    ({"level_per": "sample"}, {"searches": True}, r"level_per=sample with search_every_steps"),
]


@pytest.mark.parametrize(("axes", "sentence"), REFUSALS, ids=str)
def test_axes_that_contradict_each_other_are_refused(axes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        ObjectiveAxes(**axes)


@pytest.mark.parametrize(("axes", "run", "sentence"), AGAINST_THE_RUN, ids=str)
def test_axes_that_contradict_the_run_are_refused(axes: dict[str, Any], run: dict[str, Any], sentence: str) -> None:
    usual: dict[str, Any] = {"views": 1, "resample": False, "searches": False, "interval": None, "num_blocks": 4}
    with pytest.raises(ConfigError, match=sentence):
        ObjectiveAxes(**axes).refuse(**{**usual, **run})
    ObjectiveAxes().refuse(**{**usual, **run})
