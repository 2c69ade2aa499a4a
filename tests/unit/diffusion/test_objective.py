"""The loss is the official one where it should be, unbiased, exact at block size 1, and MDLM at block size L."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bd3_megatron.attention.dense import masked_softmax_attention
from bd3_megatron.attention.visibility import Visibility
from bd3_megatron.diffusion.axes import Denominator, ObjectiveAxes
from bd3_megatron.diffusion.corrupt import NoisyBatch, corrupt
from bd3_megatron.diffusion.noise_level import Interval, noise_levels
from bd3_megatron.diffusion.noise_schedule import SCHEDULES, NoiseSchedule, noise_schedule
from bd3_megatron.diffusion.objective import BlockDiffusion, NextToken, Objective, objective_named
from bd3_megatron.diffusion.token_nll import block_losses, masked_token_nll, next_token_nll
from bd3_megatron.errors import ConfigError, RangeError, ShapeError
from tests.tolerances import CHAIN_RULE, EXACT_FP64, GOLDEN_FP64
from tests.unit.diffusion.laws import all_masks, estimator_moment

GOLDEN = Path(__file__).parents[2] / "golden"
LINEAR = noise_schedule("loglinear")
ALL = ObjectiveAxes(denominator="all")
MASK = 5


def golden_batch(golden: dict[str, Tensor], block_size: int) -> NoisyBatch:
    """The official draw as a NoisyBatch: token 0 never masked, weight 1 / t."""
    is_masked_BL = golden["xt"] != golden["x0"]
    t_BL = golden["t"].double()
    return NoisyBatch(
        noisy_BL=golden["xt"],
        clean_BL=golden["x0"],
        is_masked_BL=is_masked_BL,
        weight_BL=is_masked_BL / t_BL,
        t_BK=t_BL[:, ::block_size],
        drawn_BK=is_masked_BL.unflatten(1, (-1, block_size)).sum(2),
        countable_BL=(torch.arange(t_BL.shape[1]) > 0).expand_as(t_BL),
    )


def losses_and_count(objective: Objective, nll_BL: Tensor, batch: NoisyBatch) -> tuple[Tensor, int]:
    """(weight x NLL where the objective has loss: [B, L], tokens in its denominator) of one noisy copy."""
    rows = objective.loss_rows(batch.clean_BL, [batch])
    assert torch.equal(rows[0].target_BL, batch.clean_BL)
    losses_BL = torch.where(rows[0].has_loss_BL, nll_BL * rows[0].weight_BL, 0.0)
    return losses_BL, objective.token_count(rows, [batch])


@pytest.mark.parametrize("block_size", [4, 16])
def test_log_probabilities_and_both_official_losses(block_size: int) -> None:
    golden = load_file(GOLDEN / f"bd3lm_tiny_bs{block_size}.safetensors")
    batch, logits = golden_batch(golden, block_size), golden["logits_f64"]
    for token in range(49):
        nll = masked_token_nll(logits, torch.full_like(batch.clean_BL, token), mask_id=49)
        wanted = golden["logp_f64"][..., token][batch.is_masked_BL]
        assert torch.allclose(-nll[batch.is_masked_BL], wanted, rtol=0, atol=GOLDEN_FP64)
    nll = masked_token_nll(logits, batch.clean_BL, mask_id=49)
    forms: list[tuple[str, Denominator]] = [("train", "all"), ("eval", "maskable")]
    for form, denominator in forms:
        objective = BlockDiffusion(block_size=block_size, axes=ObjectiveAxes(denominator=denominator))
        losses, count = losses_and_count(objective, nll, batch)
        assert torch.allclose(losses, golden[f"{form}_nlls_f64"], rtol=0, atol=GOLDEN_FP64)
        assert count == golden[f"{form}_token_mask_f64"].sum()
        assert (losses.sum() / count).item() == pytest.approx(golden[f"{form}_loss_f64"].item(), abs=GOLDEN_FP64)


def test_bf16_logits_are_scored_in_fp32() -> None:
    logits = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    nll = masked_token_nll(logits, tokens, mask_id=MASK)
    assert nll.dtype == torch.float32
    assert torch.equal(nll, masked_token_nll(logits.float(), tokens, mask_id=MASK))
    assert next_token_nll(logits, tokens).dtype == torch.float32


def test_the_mask_token_is_never_predicted_and_gets_no_gradient() -> None:
    logits = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tokens = torch.tensor([0, 1, 2, 3])
    nll = masked_token_nll(logits, tokens, mask_id=MASK)
    wanted = torch.nn.functional.cross_entropy(logits[:, :MASK], tokens, reduction="none")
    assert torch.allclose(nll, wanted, rtol=0, atol=EXACT_FP64)
    (gradient,) = torch.autograd.grad(nll.sum(), logits)
    assert (gradient[:, MASK] == 0).all() and (gradient[:, :MASK] != 0).all()


class TinyModel(torch.nn.Module):
    """One attention layer over [noisy; clean] rows and a head: enough to see whatever the visibility shows."""

    def __init__(self, vocab: int, length: int, width: int = 12) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def draw(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(*shape, dtype=torch.float64, generator=generator))

        self.embedding, self.place = draw(vocab, width), draw(length, width)
        self.qkv, self.head = draw(3, width, width), draw(width, vocab)

    def forward(self, rows_BR: Tensor, visible_BRR: Tensor, length: int) -> Tensor:
        place = self.place[torch.arange(rows_BR.shape[1]) % length]
        x = self.embedding[rows_BR] + place
        q, k, v = ((x @ matrix)[:, :, None] for matrix in self.qkv)
        mixed = masked_softmax_attention(q, k, v, visible_BRR, scale=0.2).squeeze(2)
        return (x + mixed).tanh() @ self.head


def pair_logits(model: TinyModel, batch: NoisyBatch) -> Tensor:
    length = batch.clean_BL.shape[1]
    visible = Visibility.pair(length, batch.block_size).pair_mask()
    return model(torch.cat([batch.noisy_BL, batch.clean_BL], dim=1), visible, length)[:, :length]


def test_block_size_one_is_the_exact_chain_rule_of_the_same_model() -> None:
    length, batch_size = 10, 3
    model = TinyModel(MASK + 1, length)
    clean = torch.randint(0, MASK, (batch_size, length), generator=torch.Generator().manual_seed(1))
    index = torch.arange(batch_size)
    t = noise_levels(0, index, num_blocks=length, interval=Interval(1.0, 1.0), group_size=batch_size)
    batch = corrupt(clean, t, index_B=index, seed=0, mask_id=MASK, schedule=noise_schedule("cosine"))
    nll = masked_token_nll(pair_logits(model, batch), clean, mask_id=MASK)
    losses, count = losses_and_count(BlockDiffusion(block_size=1), nll, batch)

    chain = torch.zeros((), dtype=torch.float64)
    for i in range(length):
        rows = torch.cat([clean[:, :i], torch.full((batch_size, 1), MASK)], dim=1)
        logits = model(rows, torch.ones(i + 1, i + 1).tril().bool()[None], length)[:, i, :MASK]
        chain = chain + torch.nn.functional.cross_entropy(logits, clean[:, i], reduction="sum")
    assert count == batch_size * length
    assert losses.sum().item() == pytest.approx(chain.item(), rel=CHAIN_RULE)


def test_block_size_of_the_whole_length_needs_no_clean_half() -> None:
    length = 8
    model = TinyModel(MASK + 1, length)
    clean = torch.randint(0, MASK, (4, length), generator=torch.Generator().manual_seed(1))
    index = torch.arange(4)
    t = noise_levels(0, index, num_blocks=1, interval=Interval(), group_size=4)
    batch = corrupt(clean, t, index_B=index, seed=0, mask_id=MASK, schedule=LINEAR)
    alone = model(batch.noisy_BL, Visibility.noisy_only(length).pair_mask(), length)
    assert torch.allclose(pair_logits(model, batch), alone, rtol=0, atol=EXACT_FP64)


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_the_estimate_is_unbiased_for_a_model_with_context(block_size: int) -> None:
    """Against all masks of all blocks and quadrature over t; n = 256 groups of 32 samples, five standard errors.

    Group means are independent; the chance of a false alarm is 6e-7 each.
    """
    length, groups, size = 4, 256, 32
    model = TinyModel(MASK + 1, length)
    row = torch.tensor([3, 0, 4, 1])
    with torch.no_grad():
        exact = sum(exact_block_nelbo(model, row, start, block_size) for start in range(0, length, block_size))
        index = torch.arange(groups * size)
        clean = row.expand(len(index), length)
        t = noise_levels(0, index, num_blocks=length // block_size, interval=Interval(), group_size=size)
        batch = corrupt(clean, t, index_B=index, seed=0, mask_id=MASK, schedule=LINEAR)
        nll = masked_token_nll(pair_logits(model, batch), clean, mask_id=MASK)
        per_group = (
            losses_and_count(BlockDiffusion(block_size=block_size), nll, batch)[0].sum(1).reshape(groups, size).mean(1)
        )
    error = per_group.std().item() / math.sqrt(groups)
    assert abs(per_group.mean().item() - exact) < 5 * error


def exact_block_nelbo(model: TinyModel, row: Tensor, start: int, block_size: int) -> float:
    """E over t in [MIN_T, 1] and all 2^S masks of one block of the weighted NLL, nats per sequence."""
    length, masks = len(row), all_masks(block_size)
    noisy = row.repeat(len(masks), 1)
    noisy[:, start : start + block_size] = noisy[:, start : start + block_size].masked_fill(masks, MASK)
    clean = row.expand_as(noisy)
    visible = Visibility.pair(length, block_size).pair_mask()
    logits = model(torch.cat([noisy, clean], dim=1), visible, length)[:, :length]
    nll = masked_token_nll(logits, clean, mask_id=MASK)[:, start : start + block_size]
    return estimator_moment((nll * masks).sum(1), LINEAR, Interval())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_every_schedule_is_unbiased_and_its_variance_is_the_exact_one(schedule: NoiseSchedule) -> None:
    """One block of 4 with a random NLL for each mask and token; n = 40,000 independent draws.

    Mean and variance within five standard errors, which enumeration gives exactly; false alarm about 1e-6 each.
    """
    masks = all_masks(4)
    table = 1.0 + torch.rand(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mean, second, third, fourth = (
        estimator_moment((table * masks).sum(1), schedule, Interval(), power=p) for p in (1, 2, 3, 4)
    )
    variance = second - mean**2
    central_fourth = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
    index = torch.arange(40_000)
    clean = torch.zeros(len(index), 4, dtype=torch.int64)
    t = noise_levels(0, index, num_blocks=1, interval=Interval(), group_size=1)
    batch = corrupt(clean, t, index_B=index, seed=0, mask_id=MASK, schedule=schedule, weight_dtype=torch.float64)
    nll = table[(batch.is_masked_BL * torch.tensor([8, 4, 2, 1])).sum(1)]
    sums = losses_and_count(BlockDiffusion(block_size=4), nll, batch)[0].sum(1)
    assert abs(sums.mean().item() - mean) < 5 * math.sqrt(variance / len(index))
    assert abs(sums.var().item() - variance) < 5 * math.sqrt((central_fourth - variance**2) / len(index))


def simple_batch(padding: Tensor | None = None, **more: Any) -> NoisyBatch:
    clean = torch.zeros(2, 6, dtype=torch.int64)
    t = torch.full((2, 3), 0.5, dtype=torch.float64)
    return corrupt(
        clean, t, index_B=torch.arange(2), seed=1, mask_id=MASK, schedule=LINEAR, never_mask_first=True,
        is_padding_BL=padding, **more,
    )  # fmt: skip


def test_the_sum_is_over_masked_tokens_and_the_count_over_maskable_ones() -> None:
    batch = simple_batch()
    nll = torch.arange(12.0).reshape(2, 6)
    by_hand = sum(2.0 * nll[b, i].item() for b in range(2) for i in range(6) if batch.is_masked_BL[b, i])
    losses, count = losses_and_count(BlockDiffusion(block_size=2), nll, batch)
    assert losses.sum().item() == by_hand and count == 10
    assert losses_and_count(BlockDiffusion(block_size=2, axes=ALL), nll, batch)[1] == 12
    blocks = block_losses(nll, batch)
    assert blocks.shape == (2, 3) and blocks.sum().item() * 2 == pytest.approx(by_hand)


def test_answers_are_means_over_their_own_tokens_and_are_counted_themselves() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2]])
    supervised = torch.tensor([[0, 1, 1, 0, 0, 1], [1, 1, 0, 0, 0, 1]]).bool()
    padding = torch.tensor([[0] * 6, [0, 0, 0, 0, 0, 1]]).bool()
    drawn = simple_batch(padding, is_supervised_BL=supervised, document_id_BL=documents)
    batch = replace(drawn, weight_BL=torch.ones(2, 6))
    objective = BlockDiffusion(block_size=2, axes=ObjectiveAxes(denominator="answer_length", row_weight="flat"))
    (row,) = objective.loss_rows(batch.clean_BL, [batch])
    # the first token of a row is never masked here; the answer of the last document is padding
    lengths = torch.tensor([[2, 2, 2, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    assert torch.equal(row.weight_BL, batch.weight_BL / lengths.clamp_min(1))
    assert objective.token_count([row], [batch]) == 3
    maskable = BlockDiffusion(block_size=2, axes=ALL)
    assert maskable.token_count([row], [batch]) == maskable.text_count([row], [batch]) == 5
    # without documents a row is one answer
    alone = simple_batch(is_supervised_BL=supervised)
    assert objective.token_count(objective.loss_rows(alone.clean_BL, [alone]), [alone]) == 2


def test_every_view_is_counted() -> None:
    batch, other = simple_batch(), simple_batch(torch.arange(6).expand(2, 6) >= 4)
    objective = BlockDiffusion(block_size=2, views=2)
    copies = objective.copies(lambda view: (batch, other)[view])
    rows = objective.loss_rows(batch.clean_BL, copies)
    assert [torch.equal(one.has_loss_BL, copy.is_masked_BL) for one, copy in zip(rows, copies, strict=True)] == [
        True
    ] * 2
    assert objective.token_count(rows, copies) == 10 + 6


def test_padding_is_counted_in_neither_form() -> None:
    batch = simple_batch(torch.arange(6).expand(2, 6) >= 4)
    nll = torch.ones(2, 6)
    assert losses_and_count(BlockDiffusion(block_size=2), nll, batch)[1] == 6
    assert losses_and_count(BlockDiffusion(block_size=2, axes=ALL), nll, batch)[1] == 8


def test_what_stands_at_visible_positions_does_not_matter() -> None:
    batch = simple_batch()
    assert block_losses(torch.where(batch.is_masked_BL, 1.0, torch.nan), batch).isfinite().all()


def test_the_next_token_objective_is_the_causal_chain_rule_without_a_mask_token() -> None:
    length = 7
    model = TinyModel(MASK + 1, length)
    clean = torch.randint(0, MASK, (2, length), generator=torch.Generator().manual_seed(1))
    logits = model(clean, Visibility.clean_only(length, 1).pair_mask(), length)
    (rows,) = NextToken().loss_rows(clean, [])
    nll = next_token_nll(logits, rows.target_BL)
    chain = 0.0
    for i in range(1, length):
        prefix = model(clean[:, :i], torch.ones(i, i).tril().bool()[None], length)[:, -1]
        chain += torch.nn.functional.cross_entropy(prefix, clean[:, i], reduction="sum").item()
    assert NextToken().token_count([rows], []) == 2 * (length - 1)
    assert (nll * rows.weight_BL)[rows.has_loss_BL].sum().item() == pytest.approx(chain, rel=EXACT_FP64)


def test_next_tokens_stop_at_documents_and_padding() -> None:
    clean = torch.tensor([[1, 2, 3, 4, 0, 0]])
    documents = torch.tensor([[7, 7, 8, 8, 8, 8]])
    (rows,) = NextToken().loss_rows(clean, [], document_id_BL=documents, is_scored_BL=clean != 0)
    assert rows.target_BL.tolist() == [[2, 3, 4, 0, 0, 1]]
    assert rows.has_loss_BL.tolist() == [[True, False, True, False, False, False]]
    assert rows.level_BL.tolist() == rows.weight_BL.tolist() == [[1.0] * 6]


@pytest.mark.parametrize(
    ("objective", "noisy", "clean", "stream"),
    [
        (BlockDiffusion(block_size=4), 16, 16, 16),
        (BlockDiffusion(block_size=4, views=3), 48, 16, 48),
        (BlockDiffusion(block_size=16), 16, 0, 16),
        (NextToken(), 0, 16, 16),
    ],
)
def test_rows_of_a_sample_of_sixteen_tokens(objective: Objective, noisy: int, clean: int, stream: int) -> None:
    assert (objective.noisy_rows(16), objective.clean_rows(16), objective.loss_stream_rows(16)) == (
        noisy,
        clean,
        stream,
    )
    scored = objective.scored_rows(16, 0.25, dead_rows=3)
    assert scored == (0.25 * noisy if objective.has_noise else 13)


def test_an_objective_is_found_by_its_name_and_moves_between_phases() -> None:
    made = objective_named("block", block_size=8, views=2, axes=ALL)
    assert made == BlockDiffusion(block_size=8, views=2, axes=ALL)
    assert made.at(4) == BlockDiffusion(block_size=4, views=2, axes=ALL)
    assert made.at(4, axes=ObjectiveAxes()) == BlockDiffusion(block_size=4, views=2)
    assert made.at(4, views=1).views == 1
    assert objective_named("ar", block_size=16).block_size == 1 and NextToken().at(8) == NextToken()
    with pytest.raises(ConfigError, match=r"objective='gan' is unknown; use block or ar\."):
        objective_named("gan")
    with pytest.raises(
        ConfigError,
        match=r"objective=ar has no noise; remove diffusion.phases, diffusion.views, diffusion.axes and search",
    ):
        objective_named("ar", views=2).refuse(num_phases=0, searches=False)


def test_bad_requests_are_refused() -> None:
    logits, tokens = torch.zeros(2, 6, 6), torch.zeros(2, 6, dtype=torch.int64)
    batch = simple_batch()
    with pytest.raises(RangeError, match=r"mask_id=6 is outside the vocabulary of 6; use the id of the tokenizer's"):
        masked_token_nll(logits, tokens, mask_id=6)
    with pytest.raises(ShapeError, match=r"logits_BLV has shape \[2, 6, 6\]; expected \[2, 5, any\]\."):
        masked_token_nll(logits, tokens[:, :5], mask_id=5)
    with pytest.raises(ShapeError, match=r"tokens are torch.int32; expected torch.int64\."):
        masked_token_nll(logits, tokens.int(), mask_id=5)
    with pytest.raises(ShapeError, match=r"logits_BLV has shape"):
        next_token_nll(logits, tokens[:, :5])
    with pytest.raises(ShapeError, match=r"nll_BL has shape \[2, 5\]; expected \[2, 6\]\."):
        block_losses(torch.zeros(2, 5), batch)
    with pytest.raises(ShapeError, match=r"document_id_BL has shape"):
        NextToken().loss_rows(tokens, [], document_id_BL=tokens[:1])
    with pytest.raises(ShapeError, match=r"is_scored_BL has shape"):
        NextToken().loss_rows(tokens, [], is_scored_BL=tokens[:1] == 0)
