"""The estimator: right on average, and honest about its two errors.

Statistical laws: 200 repetitions each; a 95 % interval that is right covers between 90 and 98 % of them but for 1 case in
300 (binomial, n = 200, p = 0.95), and seeds are fixed, so a case that passes stays passed.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from bd3_megatron.data.convention import EvaluationConvention
from bd3_megatron.errors import RangeError
from bd3_megatron.evaluate.noise_plan import CountDrawn, noise_plan
from bd3_megatron.evaluate.offline import Work, evaluate_plain, score_plain
from bd3_megatron.evaluate.perplexity import (
    PROBE_SEQUENCES,
    Estimate,
    ScoreSettings,
    ScoreSums,
    deal,
    estimate,
    paired_difference,
    score_table,
    sequence_scores,
)
from bd3_megatron.evaluate.tables import NORMAL_95
from tests import tolerances
from tests.unit.evaluate.tiny import (
    LENGTH,
    MASK_ID,
    Rows,
    all_nll,
    estimate_from_table,
    every_row,
    random_rows,
    tiny_model,
    true_bound,
)

REPETITIONS = 200
WORK = Work(batch_size=512)
GIVEN = EvaluationConvention(first_token_given=True)


def evaluated(rows: Rows, settings: ScoreSettings, block_size: int = 4, *, work: Work = WORK) -> Estimate:
    model = tiny_model(block_size, length=rows.tokens_NL.shape[1])
    return evaluate_plain(model, rows, settings, work, mask_id=MASK_ID)


def truth_of(rows: Rows, block_size: int) -> float:
    """The bound in nats per token."""
    nll_NML = all_nll(tiny_model(block_size), rows.tokens_NL, block_size)
    return float(true_bound(nll_NML, block_size).sum()) / rows.tokens_NL.numel()


def covered(truth: float, found: Estimate, stderr: float | None) -> bool:
    return stderr is not None and abs(found.nll_nats_per_token - truth) < NORMAL_95 * stderr


@pytest.mark.parametrize("draws", [1, 2, 3, 4])
def test_noise_error_covers_other_noise_on_the_same_text(draws: int) -> None:
    rows = random_rows(40)
    nll_NML = all_nll(tiny_model(), rows.tokens_NL, 4)
    truth = float(true_bound(nll_NML, 4).sum()) / rows.tokens_NL.numel()
    inside, errors = 0, []
    for seed in range(REPETITIONS):
        found = estimate_from_table(nll_NML, rows, ScoreSettings(draws=draws, seed=seed), 4)
        errors.append(found.nll_nats_per_token - truth)
        inside += covered(truth, found, found.stderr_noise)
    assert 0.90 <= inside / REPETITIONS <= 0.98
    mean, spread = torch.tensor(errors).mean().item(), torch.tensor(errors).std().item()
    assert abs(mean) < 3 * spread / math.sqrt(REPETITIONS)


@pytest.mark.parametrize("draws", [1, 2])
def test_text_error_covers_other_text(draws: int) -> None:
    # the population is small enough to be known: all sequences of four tokens, some more likely than others
    population = every_row(4)
    nll_NML = all_nll(tiny_model(2, length=4), population, 2)
    generator = torch.Generator().manual_seed(1)
    chance = torch.rand(len(population), generator=generator, dtype=torch.float64) ** 3
    truth = float((true_bound(nll_NML, 2) * chance).sum() / chance.sum()) / 4
    inside = 0
    for seed in range(REPETITIONS):
        chosen = torch.multinomial(chance, 40, replacement=True, generator=generator)
        settings = ScoreSettings(draws=draws, seed=seed)
        found = estimate_from_table(nll_NML[chosen], Rows(population[chosen]), settings, 2)
        inside += covered(truth, found, found.stderr_text)
    assert 0.90 <= inside / REPETITIONS <= 0.98


def test_the_looked_up_estimate_is_the_models() -> None:
    rows, settings = random_rows(6), ScoreSettings(draws=2)
    looked_up = estimate_from_table(all_nll(tiny_model(), rows.tokens_NL, 4), rows, settings, 4)
    found = evaluated(rows, settings)
    assert found.nll_nats_per_token == pytest.approx(looked_up.nll_nats_per_token, abs=tolerances.EXACT_FP64)
    assert found.stderr_noise == pytest.approx(looked_up.stderr_noise, abs=tolerances.EXACT_FP64)


@pytest.mark.parametrize("by_level", [False, True])
@pytest.mark.parametrize("block_size", [2, 4, 8])
def test_drawn_bound_is_within_three_errors_of_quadrature(block_size: int, by_level: bool) -> None:
    # 8 is the whole length: masked diffusion
    rows = random_rows(50)
    nll_NML = all_nll(tiny_model(block_size), rows.tokens_NL, block_size)
    truth = float(true_bound(nll_NML, block_size).sum()) / rows.tokens_NL.numel()
    found = estimate_from_table(nll_NML, rows, ScoreSettings(draws=200, by_level=by_level), block_size)
    assert abs(found.nll_nats_per_token - truth) < 3 * found.stderr_noise


def test_counts_are_less_noisy_than_levels_and_strata_less_than_none() -> None:
    rows = random_rows(200)
    nll_NML = all_nll(tiny_model(), rows.tokens_NL, 4)

    def noise(**settings: Any) -> float:
        return estimate_from_table(nll_NML, rows, ScoreSettings(**settings), 4).stderr_noise

    assert noise(draws=16) < 0.98 * noise(draws=15)
    assert noise(draws=16) < 0.5 * noise(draws=16, by_level=True)


def test_enumeration_equals_quadrature() -> None:
    rows = random_rows(20)
    for block_size in (1, 2, 4, 8):
        found = evaluated(rows, ScoreSettings(exact=True), block_size)
        assert found.nll_nats_per_token == pytest.approx(truth_of(rows, block_size), abs=tolerances.EXACT_FP64)
        assert found.stderr_noise == 0.0 and found.is_exact and found.draws == 2**block_size - 1


def test_the_result_does_not_depend_on_the_batch_size() -> None:
    rows, settings = random_rows(11), ScoreSettings(draws=2)
    results = [evaluated(rows, settings, work=Work(batch_size=size)) for size in (1, 3, 64)]
    for other in results[1:]:
        assert other.nll_nats_per_token == pytest.approx(results[0].nll_nats_per_token, abs=tolerances.EXACT_FP64)
        assert other.stderr_noise == pytest.approx(results[0].stderr_noise, abs=tolerances.EXACT_FP64)


def test_a_sequence_keeps_its_noise_whichever_others_are_scored() -> None:
    plan = noise_plan(objective="block", block_size=4, mask_id=MASK_ID, draws=4)
    rows = random_rows(9)
    draw_B = torch.tensor([2])
    alone = plan.noisy(rows.batch_for(torch.tensor([7])), draw_B)
    together = plan.noisy(rows.batch_for(torch.arange(9)), draw_B.expand(9))
    assert alone is not None and together is not None
    assert torch.equal(alone.noisy_BL[0], together.noisy_BL[7])
    assert torch.equal(alone.weight_BL[0], together.weight_BL[7])


def test_probes_of_a_single_draw_do_not_enter_the_result() -> None:
    plan = noise_plan(objective="block", block_size=4, mask_id=MASK_ID)
    table = score_table(plan, num_rows=100, num_sequences=100)
    assert len(table.sequence_R) == 100 + PROBE_SEQUENCES and table.draw_R[100:].unique().tolist() == [1]
    sums = ScoreSums(table, torch.device("cpu"))
    sums.both_2R[0, :100], sums.both_2R[0, 100:], sums.both_2R[1] = 8.0, 1e9, 8.0
    found = estimate(plan, sums)
    assert found.nll_nats_per_token == 1.0 and found.stderr_noise > 1e6 and found.stderr_text == 0.0


def test_sequences_are_spread_evenly_over_the_split() -> None:
    plan = noise_plan(objective="ar", block_size=1, mask_id=None)
    assert score_table(plan, num_rows=10, num_sequences=4).row_id_N.tolist() == [0, 2, 5, 7]
    assert score_table(plan, num_rows=3, num_sequences=99).row_id_N.tolist() == [0, 1, 2]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("multiple", [1, 4])
def test_every_row_is_scored_once_and_every_rank_has_as_many_batches(ranks: int, multiple: int) -> None:
    plan = CountDrawn(block_size=4, mask_id=MASK_ID, num_draws=3)
    table = score_table(plan, num_rows=7, num_sequences=None)
    shares = [deal(table, batch_size=4, rank=rank, ranks=ranks, multiple=multiple) for rank in range(ranks)]
    assert len({len(one) for one in shares}) == 1 and len(shares[0]) % multiple == 0
    assert all(len(share.row_B) == 4 for one in shares for share in one)
    real = torch.cat([share.row_B[: share.num_real] for one in shares for share in one])
    assert sorted(real.tolist()) == list(range(21))


def test_padding_and_the_first_token_are_left_out_of_the_mean() -> None:
    padding = torch.zeros(3, LENGTH, dtype=torch.bool)
    padding[1, 5:] = True
    rows = Rows(random_rows(3).tokens_NL, padding)
    assert evaluated(rows, ScoreSettings(draws=2)).num_tokens == 3 * LENGTH - 3
    assert evaluated(rows, ScoreSettings(draws=2, convention=GIVEN)).num_tokens == 3 * LENGTH - 6
    assert evaluated(rows, ScoreSettings(exact=True, convention=GIVEN)).num_tokens == 3 * LENGTH - 6


def test_long_sequences_weigh_by_their_tokens() -> None:
    plan = noise_plan(objective="ar", block_size=1, mask_id=None)
    sums = ScoreSums(score_table(plan, num_rows=2, num_sequences=None), torch.device("cpu"))
    [share] = deal(sums.table, batch_size=2)
    sums.put_sums(share, torch.tensor([3.0, 30.0]))
    sums.put_counts(share, torch.tensor([1, 32]))
    # the mean of the two sequences' means would be 1.97
    assert estimate(plan, sums).nll_nats_per_token == 1.0


def test_enumeration_with_exempt_tokens_equals_many_draws() -> None:
    padding = torch.zeros(3, LENGTH, dtype=torch.bool)
    padding[1, 5:] = True
    rows = Rows(random_rows(3).tokens_NL, padding)
    exact = evaluated(rows, ScoreSettings(exact=True, convention=GIVEN))
    drawn = evaluated(rows, ScoreSettings(draws=2000, convention=GIVEN))
    assert abs(exact.nll_nats_per_token - drawn.nll_nats_per_token) < 3 * drawn.stderr_noise


def test_the_official_convention_is_one_draw_without_the_first_token() -> None:
    found = evaluated(random_rows(6), ScoreSettings(convention=GIVEN, by_level=True))
    assert (found.draws, found.num_tokens, found.is_exact) == (1, 6 * (LENGTH - 1), False)
    assert found.stderr_noise > 0


def test_both_errors_are_always_said() -> None:
    words = evaluated(random_rows(5), ScoreSettings()).sentence()
    assert "noise 0." in words and "text 0." in words and "perplexity" in words
    one = evaluated(random_rows(1), ScoreSettings(exact=True))
    assert one.stderr_text is None and "noise 0 (exact), text unknown (one sequence)" in one.sentence()
    assert set(one.metrics()) >= {"eval/nll_nats_per_token", "eval/perplexity", "eval/stderr_noise_nats_per_token"}


def test_a_loss_beyond_floats_gives_infinite_perplexity() -> None:
    plan = noise_plan(objective="ar", block_size=1, mask_id=None)
    sums = ScoreSums(score_table(plan, num_rows=2, num_sequences=None), torch.device("cpu"))
    sums.both_2R[0], sums.both_2R[1] = 1e6, 1.0
    assert estimate(plan, sums).perplexity == math.inf


def test_requests_that_make_no_sense_are_refused() -> None:
    with pytest.raises(RangeError, match="0 of 5 sequences leave nothing to score"):
        score_table(noise_plan(objective="ar", block_size=1, mask_id=None), num_rows=5, num_sequences=0)
    with pytest.raises(RangeError, match="no token was counted"):
        evaluated(Rows(random_rows(2).tokens_NL, torch.ones(2, LENGTH, dtype=torch.bool)), ScoreSettings(draws=2))
    with pytest.raises(RangeError, match=r"draws=0 is outside \[1, "):
        noise_plan(objective="block", block_size=4, mask_id=MASK_ID, draws=0)
    with pytest.raises(RangeError, match="block_size=16 has 2\\^16 mask patterns"):
        noise_plan(objective="block", block_size=16, mask_id=MASK_ID, exact=True)
    with pytest.raises(RangeError, match="without mask_id cannot be scored"):
        noise_plan(objective="block", block_size=4, mask_id=None)


def test_a_paired_difference_is_sharper_than_two_errors() -> None:
    rows, settings = random_rows(60), ScoreSettings(exact=True, convention=GIVEN)
    scored = [score_plain(tiny_model(size), rows, settings, WORK, mask_id=MASK_ID) for size in (2, 4)]
    first, second = (sequence_scores(*one) for one in scored)
    mean, error = paired_difference(first, second)
    apart = [estimate(*one) for one in scored]
    assert mean == pytest.approx(apart[0].nll_nats_per_token - apart[1].nll_nats_per_token)
    assert error is not None and error < math.hypot(*(one.stderr_text or 0.0 for one in apart))
    assert paired_difference(first, first) == (0.0, 0.0)
    other = sequence_scores(*score_plain(tiny_model(2), rows, ScoreSettings(exact=True), WORK, mask_id=MASK_ID))
    with pytest.raises(RangeError, match="do not count the same tokens, so they cannot be paired"):
        paired_difference(first, other)
