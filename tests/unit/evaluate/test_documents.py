"""Texts of any length: kept keys change nothing, the window is the model's, the tail and the given part are left out."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bd3_megatron.errors import DataError
from bd3_megatron.evaluate.documents import ChainScore, ScoredText, score_texts
from bd3_megatron.evaluate.offline import Work, score_plain
from bd3_megatron.evaluate.perplexity import ScoreSettings
from bd3_megatron.hf.plain_bd3 import PlainBD3
from tests import tolerances
from tests.unit.evaluate.tiny import LENGTH, MASK_ID, every_row, random_rows, tiny_model


def text(count: int) -> list[int]:
    return random_rows(1, length=count, seed=9).tokens_NL[0].tolist()


def scores(
    model: PlainBD3, texts: list[ScoredText], settings: ScoreSettings | None = None, *, batch_size: int = 8
) -> list[ChainScore]:
    return score_texts(model, settings or ScoreSettings(exact=True), texts, mask_id=MASK_ID, batch_size=batch_size)


def exact(model: PlainBD3, ids: list[int], given: int = 0) -> float:
    return scores(model, [ScoredText(ids, given)])[0].nll_nats


@pytest.mark.parametrize("block_size", [1, 4, 8])
@pytest.mark.parametrize("settings", [ScoreSettings(draws=4), ScoreSettings(exact=True)])
def test_the_chain_over_blocks_equals_one_pass_over_the_pair(block_size: int, settings: ScoreSettings) -> None:
    rows, model = random_rows(3), tiny_model(block_size, layers=2)
    texts = [ScoredText(ids, noise_number=number) for number, ids in enumerate(rows.tokens_NL.tolist())]
    found = scores(model, texts, settings, batch_size=2)
    plan, sums = score_plain(model, rows, settings, Work(batch_size=256), mask_id=MASK_ID)
    paired_ND = sums.both_2R[0, : 3 * plan.draws].view(3, plan.draws)
    # without noise there is one number
    expected_ND = paired_ND.mean(dim=1, keepdim=True) if plan.is_exact else paired_ND
    torch.testing.assert_close(
        torch.stack([one.sum_D for one in found]), expected_ND, atol=tolerances.EXACT_FP64, rtol=0
    )
    assert all(one.is_exact == plan.is_exact for one in found)
    assert [one.num_tokens for one in found] == [LENGTH] * 3


def test_a_text_shorter_than_a_row_takes_the_noise_of_its_row() -> None:
    rows, model, settings = random_rows(1), tiny_model(2, layers=2), ScoreSettings(draws=6)
    begun = scores(model, [ScoredText(rows.tokens_NL[0, :4].tolist())], settings)[0]
    plan = settings.plan(objective="block", block_size=2, mask_id=MASK_ID)
    noisy = plan.noisy(rows.batch_for(torch.zeros(6, dtype=torch.int64)), torch.arange(6))
    assert noisy is not None
    with torch.no_grad():
        log_p_DLV = model(noisy.noisy_BL, noisy.clean_BL).index_fill(2, torch.tensor([MASK_ID]), -torch.inf)
        nll_DL = -log_p_DLV.log_softmax(dim=-1).gather(2, noisy.clean_BL[:, :, None])[:, :, 0]
        first_D = (nll_DL * noisy.weight_BL)[:, :4].masked_fill(~noisy.is_masked_BL[:, :4], 0).sum(dim=1)
    torch.testing.assert_close(begun.sum_D, first_D, atol=tolerances.EXACT_FP64, rtol=0)


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_beyond_the_trained_length_every_block_sees_the_newest_window(block_size: int) -> None:
    model, ids = tiny_model(block_size, layers=2), text(20)
    expected = exact(model, ids[:LENGTH])
    for start in range(LENGTH, 20, block_size):
        seen = start - (LENGTH - block_size)
        # a text that begins with the window, of which only the last block is not given
        expected += exact(model, ids[seen : start + block_size], given=LENGTH - block_size)
    assert exact(model, ids) == pytest.approx(expected, abs=tolerances.EXACT_FP64)


def test_given_tokens_are_seen_and_the_unwritten_tail_stays_masked() -> None:
    model = tiny_model(4)
    # two given tokens, one scored, one unwritten: the only pattern that matters masks the third
    noisy = torch.tensor([[0, 1, MASK_ID, MASK_ID]])
    logits = model(noisy)[0, 2].clone()
    logits[MASK_ID] = -torch.inf
    expected = -logits.log_softmax(dim=0)[2].item()
    assert exact(model, [0, 1, 2], given=2) == pytest.approx(expected, abs=tolerances.EXACT_FP64)


def test_blocks_with_few_scored_tokens_have_no_noise_however_large_they_are() -> None:
    model, ids = tiny_model(8, layers=2), text(8)
    settings = ScoreSettings(draws=2)
    few = [ScoredText(ids[:5], 2), ScoredText(ids, 5)]
    found = score_texts(model, settings, few, mask_id=MASK_ID, num_enumerated=3)
    for one, asked in zip(found, few, strict=True):
        assert one.is_exact
        assert one.nll_nats == pytest.approx(exact(model, list(asked.ids), asked.given), abs=tolerances.EXACT_FP64)
    (drawn,) = score_texts(model, settings, [ScoredText(ids, 4)], mask_id=MASK_ID, num_enumerated=3)
    assert not drawn.is_exact and len(drawn.sum_D) == 2
    (many,) = score_texts(model, ScoreSettings(draws=4000), [ScoredText(ids, 4)], mask_id=MASK_ID)
    error = float(many.sum_D.std()) / 4000**0.5
    assert abs(many.nll_nats - exact(model, ids, 4)) < 4 * error


def test_end_tokens_that_fill_a_block_are_scored_and_not_counted() -> None:
    model = tiny_model(4)
    filled = scores(model, [ScoredText([0, 1, 2, 2], num_fill=1)])[0]
    assert filled.num_tokens == 3
    assert filled.nll_nats == pytest.approx(exact(model, [0, 1, 2, 2]), abs=tolerances.EXACT_FP64)


def test_blocks_of_one_token_are_a_distribution_over_continuations() -> None:
    model, given = tiny_model(1, layers=2), [2, 0, 1]
    texts = [ScoredText([*given, *one], len(given)) for one in every_row(3).tolist()]
    found = scores(model, texts, batch_size=5)
    assert sum((-one.sum_D).exp().item() for one in found) == pytest.approx(1.0, abs=tolerances.EXACT_FP64)


@pytest.mark.parametrize("block_size", [1, 4])
def test_exactly_one_continuation_is_the_greedy_one(block_size: int) -> None:
    model, given = tiny_model(block_size, layers=2), [2, 0, 1]
    texts = [ScoredText([*given, *one], len(given)) for one in itertools.product(range(MASK_ID), repeat=3)]
    greedy = [one.ids for one, score in zip(texts, scores(model, texts), strict=True) if score.is_greedy]
    ids = list(given)
    while len(ids) < 6:
        # left to right: all that is not written yet is masked
        length = -(-(len(ids) + 1) // block_size) * block_size
        logits = model(torch.tensor([ids + [MASK_ID] * (length - len(ids))]))[0, len(ids), :MASK_ID]
        ids.append(int(logits.argmax()))
    assert greedy == [ids]


def test_autoregressive_windows_move_by_half() -> None:
    model, ids = tiny_model(1, objective="ar"), text(15)
    found = scores(model, [ScoredText(ids), ScoredText(ids[:5], 2)])

    def log_p(start: int, stop: int) -> Tensor:
        seen = torch.tensor([ids[start:stop]])
        return model(seen)[0, :-1].log_softmax(dim=-1).gather(1, seen[0, 1:, None])[:, 0]

    with torch.no_grad():
        parts = [log_p(0, 8), log_p(4, 12)[3:], log_p(8, 15)[3:]]
        short = -log_p(0, 5)[1:].sum().item()
    assert [one.num_tokens for one in found] == [14, 3]
    assert found[0].nll_nats == pytest.approx(-torch.cat(parts).sum().item(), abs=tolerances.EXACT_FP64)
    assert found[1].nll_nats == pytest.approx(short, abs=tolerances.EXACT_FP64)


@pytest.mark.parametrize("objective", ["block", "ar"])
def test_scores_depend_neither_on_the_batch_nor_on_the_other_texts(objective: str) -> None:
    model = tiny_model(1 if objective == "ar" else 4, objective=objective, layers=2)
    texts = [ScoredText(text(count), given) for count, given in ((3, 1), (20, 0), (11, 9), (8, 2), (13, 12))]
    settings = ScoreSettings(draws=4)
    alone = [scores(model, [one], settings)[0] for one in texts]
    for size in (1, 3, 8):
        together = scores(model, texts, settings, batch_size=size)
        for one, other in zip(alone, together, strict=True):
            assert (one.num_tokens, one.is_greedy) == (other.num_tokens, other.is_greedy)
            torch.testing.assert_close(one.sum_D, other.sum_D, atol=tolerances.EXACT_FP64, rtol=0)


def test_texts_without_a_token_to_score_are_refused() -> None:
    model = tiny_model(4)
    with pytest.raises(DataError, match="text 0 has 0 tokens, of which 0 are given; give one with 1 or more"):
        exact(model, [])
    with pytest.raises(DataError, match="text 1 has 2 tokens, of which 2 are given; give one with 3 or more"):
        scores(model, [ScoredText([0, 1]), ScoredText([0, 1], 2)])
