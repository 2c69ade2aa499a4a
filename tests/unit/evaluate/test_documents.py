"""Documents of any length: the cache changes nothing, the window is the model's, the tail and the prompt are left out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bd3_megatron.errors import DataError
from bd3_megatron.evaluate.documents import document_sums, evaluate_documents
from bd3_megatron.evaluate.offline import Work, evaluate_plain
from bd3_megatron.evaluate.perplexity import ScoreSettings
from bd3_megatron.hf.plain_bd3 import PlainBD3
from tests import tolerances
from tests.unit.evaluate.tiny import LENGTH, MASK_ID, random_rows, tiny_model


def text(count: int) -> list[int]:
    return random_rows(1, length=count, seed=9).tokens_NL[0].tolist()


@pytest.mark.parametrize("block_size", [1, 4, 8])
@pytest.mark.parametrize("settings", [ScoreSettings(draws=4), ScoreSettings(draws=1), ScoreSettings(exact=True)])
def test_the_cached_chain_over_blocks_equals_one_pass_over_the_pair(block_size: int, settings: ScoreSettings) -> None:
    rows, model = random_rows(3), tiny_model(block_size, layers=2)
    cached = evaluate_documents(model, rows.tokens_NL.tolist(), settings, mask_id=MASK_ID)
    paired = evaluate_plain(model, rows, settings, Work(), mask_id=MASK_ID)
    assert cached.nll_nats_per_token == pytest.approx(paired.nll_nats_per_token, abs=tolerances.EXACT_FP64)
    assert cached.stderr_noise == pytest.approx(paired.stderr_noise, abs=tolerances.EXACT_FP64)
    assert cached.num_tokens == paired.num_tokens


def exact_sum(model: PlainBD3, ids: list[int], **options: object) -> float:
    plan = ScoreSettings(exact=True).plan(objective="block", block_size=model.model.shape.block_size, mask_id=MASK_ID)
    sums_D, _ = document_sums(model, plan, ids, torch.arange(plan.draws), mask_id=MASK_ID, **options)  # type: ignore[arg-type]
    return sums_D.mean().item()


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_beyond_the_trained_length_every_block_sees_the_newest_window(block_size: int) -> None:
    model, ids = tiny_model(block_size, layers=2), text(20)
    expected = exact_sum(model, ids[:LENGTH])
    for start in range(LENGTH, 20, block_size):
        seen = start - (LENGTH - block_size)
        # a text that begins with the window, of which only the last block is not given
        expected += exact_sum(model, ids[seen : start + block_size], given=LENGTH - block_size)
    assert exact_sum(model, ids) == pytest.approx(expected, abs=tolerances.EXACT_FP64)


def test_an_evicting_window_differs_only_beyond_the_trained_length() -> None:
    # with one layer kept keys would not depend on forgotten tokens
    model = tiny_model(2, layers=2)
    short = exact_sum(model, text(8))
    assert exact_sum(model, text(8), window="evicted") == pytest.approx(short, abs=tolerances.EXACT_FP64)
    assert exact_sum(model, text(20), window="evicted") != pytest.approx(exact_sum(model, text(20)), abs=1e-3)


def test_given_tokens_are_seen_and_the_unwritten_tail_stays_masked() -> None:
    model = tiny_model(4)
    # two given tokens, one scored, one unwritten: the only pattern that matters masks the third
    noisy = torch.tensor([[0, 1, MASK_ID, MASK_ID]])
    logits = model(noisy)[0, 2].clone()
    logits[MASK_ID] = -torch.inf
    expected = -logits.log_softmax(dim=0)[2].item()
    assert exact_sum(model, [0, 1, 2], given=2) == pytest.approx(expected, abs=tolerances.EXACT_FP64)


def test_autoregressive_windows_move_by_half() -> None:
    model, ids = tiny_model(1, objective="ar"), text(15)
    found = evaluate_documents(model, [ids], ScoreSettings(), mask_id=None)

    def log_p(start: int, stop: int) -> Tensor:
        seen = torch.tensor([ids[start:stop]])
        return model(seen)[0, :-1].log_softmax(dim=-1).gather(1, seen[0, 1:, None])[:, 0]

    with torch.no_grad():
        parts = [log_p(0, 8), log_p(4, 12)[3:], log_p(8, 15)[3:]]
    assert found.num_tokens == 14
    assert found.nll_nats_per_token == pytest.approx(-torch.cat(parts).mean().item(), abs=tolerances.EXACT_FP64)


def test_documents_of_different_lengths_weigh_by_their_tokens() -> None:
    model = tiny_model(4)
    documents = [text(3), text(11)]
    found = evaluate_documents(model, documents, ScoreSettings(exact=True), mask_id=MASK_ID)
    assert found.num_tokens == 14
    total = sum(exact_sum(model, one) for one in documents)
    assert found.nll_nats_per_token == pytest.approx(total / 14, abs=tolerances.EXACT_FP64)


def test_documents_without_a_token_to_score_are_refused() -> None:
    model = tiny_model(4)
    with pytest.raises(DataError, match="document 0 has 0 tokens, of which 0 are given; give one with 1 or more"):
        evaluate_documents(model, [[]], ScoreSettings(draws=2), mask_id=MASK_ID)
    with pytest.raises(DataError, match="document 1 has 2 tokens, of which 2 are given; give one with 3 or more"):
        evaluate_documents(model, [[0, 1], [0, 1]], ScoreSettings(draws=2), mask_id=MASK_ID, given=[0, 2])
