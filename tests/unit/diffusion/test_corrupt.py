"""Masks are a function of (seed, index, block, position), have the right rates, and exempt what is exempt.

Statistical tests draw with fixed seeds; each states n and the chance that a correct generator would fail it.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bd3_megatron.diffusion.corrupt import NoisyBatch, corrupt, per_token
from bd3_megatron.diffusion.noise_level import Interval, noise_levels
from bd3_megatron.diffusion.noise_schedule import SCHEDULES, NoiseSchedule, noise_schedule
from bd3_megatron.errors import RangeError, ShapeError
from tests.unit.diffusion.laws import all_masks, mask_law

V, L, G = 50, 32, 8
LINEAR = noise_schedule("loglinear")


def clean(num_samples: int, length: int = L) -> Tensor:
    return (torch.arange(num_samples)[:, None] * 7 + torch.arange(length)) % (V - 1)


def corrupted(index_B: Tensor, block_size: int = 4, interval: Interval | None = None, **options: Any) -> NoisyBatch:
    t_BK = noise_levels(3, index_B, num_blocks=L // block_size, interval=interval or Interval(), group_size=G)
    options = {"schedule": LINEAR, "seed": 3, **options}
    return corrupt(clean(len(index_B)), t_BK, index_B=index_B, mask_id=V - 1, **options)


@pytest.mark.parametrize("block_size", [1, 2, 4, 16, L])
def test_masked_tokens_become_the_mask_id_and_carry_their_blocks_weight(block_size: int) -> None:
    batch = corrupted(torch.arange(G), block_size)
    assert batch.block_size == block_size
    assert torch.equal(batch.noisy_BL, torch.where(batch.is_masked_BL, V - 1, clean(G)))
    assert torch.equal(batch.clean_BL, clean(G))
    weight_BL = per_token(LINEAR.loss_weight(batch.t_BK).float(), L)
    assert batch.weight_BL.dtype == torch.float32
    assert torch.equal(batch.weight_BL, weight_BL * batch.is_masked_BL)
    assert batch.countable_BL.all() and batch.is_padding_BL is None
    assert torch.equal(batch.drawn_BK, batch.is_masked_BL.unflatten(1, (-1, block_size)).sum(2))


@pytest.mark.parametrize("resample_to", [None, Interval(0.3, 0.8)])
@pytest.mark.parametrize("dp, micro_batch", [(1, 1), (1, 8), (2, 2), (4, 1)])
def test_masks_do_not_depend_on_the_grid(dp: int, micro_batch: int, resample_to: Interval | None) -> None:
    first = 2**34
    options: dict[str, Any] = {"resample_to": resample_to}
    whole = corrupted(torch.arange(first, first + G), **options)
    for rank in range(dp):
        for m in range(G // (dp * micro_batch)):
            rows = slice((m * dp + rank) * micro_batch, (m * dp + rank + 1) * micro_batch)
            part = corrupted(torch.arange(first, first + G)[rows], **options)
            assert torch.equal(part.is_masked_BL, whole.is_masked_BL[rows])
            assert torch.equal(part.weight_BL > 0, whole.is_masked_BL[rows])


def test_noise_follows_the_place_in_the_order_of_consumption_not_the_row() -> None:
    t_BK = torch.full((2, 8), 0.5, dtype=torch.float64)
    rows = clean(1).expand(2, L)
    batch = corrupt(rows, t_BK, index_B=torch.tensor([5, 5 + 10**6]), seed=0, mask_id=V - 1, schedule=LINEAR)
    assert not torch.equal(batch.is_masked_BL[0], batch.is_masked_BL[1])
    other_row = corrupt(rows[:1] + 1, t_BK[:1], index_B=torch.tensor([5]), seed=0, mask_id=V - 1, schedule=LINEAR)
    assert torch.equal(other_row.is_masked_BL[0], batch.is_masked_BL[0])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
@pytest.mark.parametrize("level", [0.05, 0.5, 0.9])
def test_the_mask_rate_is_the_schedules_probability(schedule: NoiseSchedule, level: float) -> None:
    """n = 2,000 x 32 tokens; five standard errors, chance of a false alarm 6e-7 each."""
    t_BK = torch.full((2000, 8), level, dtype=torch.float64)
    batch = corrupt(clean(2000), t_BK, index_B=torch.arange(2000), seed=1, mask_id=V - 1, schedule=schedule)
    p = schedule.mask_probability(torch.tensor(level)).item()
    error = math.sqrt(p * (1 - p) / batch.is_masked_BL.numel())
    assert abs(batch.is_masked_BL.double().mean().item() - p) < 5 * error


@pytest.mark.parametrize("resample_to", [None, Interval(0.3, 0.8)])
def test_every_mask_of_a_block_has_its_probability(resample_to: Interval | None) -> None:
    """All 16 masks of a block of 4 at t = .6, n = 32,000 blocks: each within five standard errors (chance 1e-5)."""
    t_BK = torch.full((4000, 8), 0.6, dtype=torch.float64)
    batch = corrupt(
        clean(4000),
        t_BK,
        index_B=torch.arange(4000),
        seed=1,
        mask_id=V - 1,
        schedule=LINEAR,
        resample_to=resample_to,
    )
    masks = all_masks(4)
    law = mask_law(torch.tensor([0.6], dtype=torch.float64), masks, resample_to)[0]
    code = (batch.is_masked_BL.unflatten(1, (8, 4)) * torch.tensor([8, 4, 2, 1])).sum(2).flatten()
    rate = torch.bincount(code, minlength=16).double() / code.numel()
    assert ((rate - law).abs() <= 5 * (law * (1 - law) / code.numel()).sqrt()).all()


def test_resampled_fractions_lie_inside_except_for_exempt_tokens() -> None:
    interval = Interval(0.45, 0.95)
    batch = corrupted(torch.arange(4 * G), interval=interval, resample_to=interval, never_mask_first=True)
    assert int(batch.drawn_BK.min()) >= 2 and int(batch.drawn_BK.max()) <= 3
    counted = batch.is_masked_BL.unflatten(1, (8, 4)).sum(2)
    assert torch.equal(counted[:, 1:], batch.drawn_BK[:, 1:])


def test_the_first_token_is_never_masked_when_so_configured_and_nothing_else_moves() -> None:
    index = torch.arange(64)
    free, kept = corrupted(index), corrupted(index, never_mask_first=True)
    assert free.is_masked_BL[:, 0].any() and not kept.is_masked_BL[:, 0].any()
    assert torch.equal(free.is_masked_BL[:, 1:], kept.is_masked_BL[:, 1:])
    assert torch.equal(free.drawn_BK, kept.drawn_BK)
    assert kept.countable_BL.sum() == 64 * (L - 1) and not kept.countable_BL[:, 0].any()


@pytest.mark.parametrize("resample_to", [None, Interval(0.3, 0.8)])
def test_padding_is_noised_as_text_and_changes_nothing_else(resample_to: Interval | None) -> None:
    is_padding_BL = torch.arange(L).expand(G, L) >= torch.arange(18, 18 + G)[:, None]
    options: dict[str, Any] = {"resample_to": resample_to, "interval": Interval(0.3, 0.8)}
    whole = corrupted(torch.arange(G), **options)
    batch = corrupted(torch.arange(G), is_padding_BL=is_padding_BL, **options)
    # the model reads what it would read if padding were text
    assert torch.equal(batch.noisy_BL, whole.noisy_BL) and torch.equal(batch.drawn_BK, whole.drawn_BK)
    assert (batch.noisy_BL == V - 1)[is_padding_BL].any()
    assert torch.equal(batch.is_masked_BL, whole.is_masked_BL & ~is_padding_BL)
    assert torch.equal(batch.weight_BL, whole.weight_BL * ~is_padding_BL)
    assert torch.equal(batch.countable_BL, ~is_padding_BL)


@pytest.mark.parametrize("resample_to", [None, Interval(0.3, 0.8)])
def test_what_is_given_is_never_masked_and_changes_nothing_else(resample_to: Interval | None) -> None:
    given_BL = torch.arange(L).expand(G, L) % 7 < torch.arange(G)[:, None]
    is_padding_BL = torch.arange(L).expand(G, L) >= 28
    options: dict[str, Any] = {"resample_to": resample_to, "interval": Interval(0.3, 0.8)}
    options["is_padding_BL"] = is_padding_BL
    whole = corrupted(torch.arange(G), **options)
    batch = corrupted(torch.arange(G), is_supervised_BL=~given_BL, **options)
    given_BL = given_BL & ~is_padding_BL
    assert (whole.is_masked_BL & given_BL).any()
    assert torch.equal(batch.noisy_BL[given_BL], clean(G)[given_BL])
    assert torch.equal(batch.is_masked_BL, whole.is_masked_BL & ~given_BL)
    assert torch.equal(batch.weight_BL, whole.weight_BL * ~given_BL)
    assert torch.equal(batch.countable_BL, ~given_BL & ~is_padding_BL) and torch.equal(
        batch.text_BL, batch.countable_BL
    )
    assert torch.equal(batch.noisy_BL[is_padding_BL], whole.noisy_BL[is_padding_BL])


def test_the_pattern_of_masks_does_not_tell_where_a_document_ends() -> None:
    """n = 16,000 padded and as many text places at t = .6: equal rates within five standard errors (chance 6e-7 each)."""
    is_padding_BL = torch.arange(L).expand(1000, L) >= L // 2
    t_BK = torch.full((1000, 8), 0.6, dtype=torch.float64)
    batch = corrupt(
        clean(1000),
        t_BK,
        index_B=torch.arange(1000),
        seed=1,
        mask_id=V - 1,
        schedule=LINEAR,
        is_padding_BL=is_padding_BL,
    )
    for part in (is_padding_BL, ~is_padding_BL):
        rate = (batch.noisy_BL == V - 1)[part].double().mean().item()
        assert abs(rate - 0.6) < 5 * math.sqrt(0.24 / 16000)


def test_an_exempt_first_token_stays_visible_beside_padding() -> None:
    is_padding_BL = torch.arange(L).expand(G, L) >= 20
    batch = corrupted(torch.arange(G), 1, Interval(1.0, 1.0), never_mask_first=True, is_padding_BL=is_padding_BL)
    assert torch.equal(batch.noisy_BL[:, 0], clean(G)[:, 0]) and (batch.noisy_BL[:, 1:] == V - 1).all()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_full_masking_masks_everything_at_weight_one(schedule: NoiseSchedule) -> None:
    batch = corrupted(torch.arange(G), 1, Interval(1.0, 1.0), schedule=schedule)
    assert batch.is_masked_BL.all() and (batch.weight_BL == 1.0).all()


def test_the_weight_may_be_float64() -> None:
    batch = corrupted(torch.arange(G), weight_dtype=torch.float64)
    weight_BL = per_token(1.0 / batch.t_BK, L)
    assert torch.equal(batch.weight_BL, weight_BL * batch.is_masked_BL)


def test_bad_requests_are_refused() -> None:
    good: dict[str, Any] = {"index_B": torch.arange(2), "seed": 0, "mask_id": V - 1, "schedule": LINEAR}
    t_BK = torch.full((2, 8), 0.5)
    with pytest.raises(ShapeError, match=r"clean_BL is torch.float32 \[2, 32\]; expected torch.int64 \[any, any\]\."):
        corrupt(clean(2).float(), t_BK, **good)
    with pytest.raises(ShapeError, match=r"index_B has shape \[3\]; expected \[2\]\."):
        corrupt(clean(2), t_BK, **{**good, "index_B": torch.arange(3)})
    with pytest.raises(ShapeError, match=r"t_BK has shape \[3, 8\]; expected \[2, any\]\."):
        corrupt(clean(2), torch.full((3, 8), 0.5), **good)
    with pytest.raises(ShapeError, match=r"num_blocks=5 does not divide length=32; use 1, 2, 4, 8, 16 or 32\."):
        corrupt(clean(2), torch.full((2, 5), 0.5), **good)
    with pytest.raises(ShapeError, match=r"is_padding_BL has shape \[2, 3\]; expected \[2, 32\]\."):
        corrupt(clean(2), t_BK, **good, is_padding_BL=torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ShapeError, match=r"is_supervised_BL has shape \[2, 3\]; expected \[2, 32\]\."):
        corrupt(clean(2), t_BK, **good, is_supervised_BL=torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(RangeError, match=r"mask_id=-1 is negative; use the id of the tokenizer's mask token\."):
        corrupt(clean(2), t_BK, **{**good, "mask_id": -1})
    with pytest.raises(RangeError, match=r"t reaches from 0 to 0, outside"):
        corrupt(clean(2), torch.zeros(2, 8), **good)
    with pytest.raises(RangeError, match=r"seed=-1 is outside"):
        corrupt(clean(2), t_BK, **{**good, "seed": -1})
    with pytest.raises(RangeError, match=r"holds no multiple of 1/4"):
        corrupt(clean(2), t_BK, **good, resample_to=Interval(0.3, 0.4))


@pytest.mark.gpu
@pytest.mark.parametrize("resample_to", [None, Interval(0.3, 0.8)])
def test_a_gpu_draws_the_same_noise(resample_to: Interval | None) -> None:
    index = torch.arange(2**34, 2**34 + G)
    t_BK = noise_levels(3, index, num_blocks=8, interval=Interval(0.3, 0.8), group_size=G)
    options: dict[str, Any] = {"seed": 3, "mask_id": V - 1, "schedule": LINEAR, "resample_to": resample_to}
    here = corrupt(clean(G), t_BK, index_B=index, **options)
    there = corrupt(clean(G).cuda(), t_BK, index_B=index, **options)
    assert torch.equal(there.is_masked_BL.cpu(), here.is_masked_BL)
    assert torch.equal(there.noisy_BL.cpu(), here.noisy_BL)
    assert torch.equal(there.weight_BL.cpu(), here.weight_BL)
    levels = noise_levels(3, index.cuda(), num_blocks=8, interval=Interval(0.3, 0.8), group_size=G)
    assert torch.equal(levels.cpu(), t_BK)
