"""Rules decide every position once, in the forwards they promise; exact ones follow the model's distribution."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch

from bd3_megatron.hf.decoding_options_bd3 import RULES, DecodingOptions
from bd3_megatron.hf.decoding_rules_bd3 import (
    Ancestral,
    ConfidenceThreshold,
    EntropyBounded,
    FirstHitting,
    PlannedBlock,
    StaticTopK,
)
from bd3_megatron.hf.draws_bd3 import SampleDraws, block_draws, sample_key, sample_keys
from bd3_megatron.hf.philox import SAMPLE_PURPOSE, uniform
from bd3_megatron.hf.plain_bd3 import PlainBD3
from bd3_megatron.hf.token_choice_bd3 import Choice
from tests.unit.hf.models import decode, tiny_model

FALSE_ALARM_Z = 4.753  # one-sided normal quantile of 1e-6


def critical_chi_square(degrees: int) -> float:
    """The value a chi-square exceeds with probability 1e-6 (Wilson and Hilferty)."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + FALSE_ALARM_Z * math.sqrt(spread)) ** 3


def small_model() -> PlainBD3:
    """V 4 with mask 3, S 4: 27 ways to fill a block behind one token."""
    return tiny_model(4, vocab_size=4, mask_token_id=3, max_position_embeddings=8)


@torch.no_grad()
def exact_distribution(model: PlainBD3) -> dict[tuple[int, ...], float]:
    """P(block) of first-hitting behind the given token 0: the mean over orders of the product of conditionals."""
    states = [s for s in itertools.product(range(4), repeat=3)]
    logits = model(torch.tensor([[0, *state] for state in states]))[:, 1:, :3].softmax(-1)
    conditional = dict(zip(states, logits, strict=True))
    total: dict[tuple[int, ...], float] = {}
    orders = list(itertools.permutations(range(3)))
    for block in itertools.product(range(3), repeat=3):
        for order in orders:
            state, p = [3, 3, 3], 1.0
            for i in order:
                p *= conditional[tuple(state)][i, block[i]].item()
                state[i] = block[i]
            total[block] = total.get(block, 0.0) + p / len(orders)
    return total


def chi_square(texts: list[list[int]], expected: dict[tuple[int, ...], float]) -> tuple[float, int]:
    """(statistic, degrees of freedom); blocks expected less than five times are counted together."""
    seen = Counter(tuple(text[1:]) for text in texts)
    assert set(seen) <= set(expected)
    rare = {block for block, p in expected.items() if len(texts) * p < 5}
    cells = [(seen[block], len(texts) * p) for block, p in expected.items() if block not in rare]
    if rare:
        cells.append((sum(seen[block] for block in rare), len(texts) * sum(expected[block] for block in rare)))
    return sum((count - mean) ** 2 / mean for count, mean in cells), len(cells) - 1


@pytest.mark.parametrize(
    ("num_texts", "options"),
    [(4000, {"rule": "first_hitting"}), (500, {"rule": "ancestral", "steps": 256})],
)
def test_exact_rules_follow_the_enumerated_distribution(num_texts: int, options: dict[str, Any]) -> None:
    """n = 4000 and 500 texts of 27 kinds, false alarm 1e-6 (at T 256 one text in 85 has a shared step: not seen)."""
    model = small_model()
    expected = exact_distribution(model)
    assert sum(expected.values()) == pytest.approx(1)
    texts = decode(model, [[0]] * num_texts, 3, decoder_options={"mask_id": 3}, **options)[0]
    statistic, degrees = chi_square(texts, expected)
    assert degrees >= 10
    assert statistic < critical_chi_square(degrees)


def test_the_chi_square_has_the_power_to_see_another_rule() -> None:
    model = small_model()
    texts = decode(model, [[0]] * 1000, 3, decoder_options={"mask_id": 3}, rule="top_k_static", steps=1)[0]
    statistic, degrees = chi_square(texts, exact_distribution(model))
    assert statistic > critical_chi_square(degrees)


def test_first_hitting_decides_one_position_a_forward_in_uniformly_random_order() -> None:
    """n = 6000 blocks, 5 degrees of freedom, false alarm 1e-6."""
    order = uniform(1, SAMPLE_PURPOSE, torch.arange(6000)[:, None], torch.arange(3))
    block = FirstHitting().begin(torch.ones(6000, 3, dtype=torch.bool), order)
    assert block.num_forwards == 3
    steps = torch.cat([block.wanted(forward).rows_BR for forward in range(3)], dim=1)
    counts = Counter(map(tuple, steps.tolist()))
    assert len(counts) == 6
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < critical_chi_square(5)


def test_ancestral_reveals_everything_by_its_last_step() -> None:
    order = torch.tensor([[0.0, 0.49, 0.5, 1 - 2**-53], [0.1, 0.2, 0.3, 0.4]])
    known = torch.tensor([[True] * 4, [False, True, True, False]])
    block = Ancestral(2).begin(known, order)
    assert block.num_forwards == 2
    first, last = block.wanted(0), block.wanted(1)
    assert first.rows_BR[first.decides_BR].tolist() == [0, 1, 1, 2]
    assert last.rows_BR[last.decides_BR].tolist() == [2, 3]
    assert last.is_active_B is not None and last.is_active_B.tolist() == [True, False]


def test_a_planned_block_reveals_nothing_afterwards() -> None:
    block = PlannedBlock(torch.tensor([[0, 1]]))
    with pytest.raises(RuntimeError, match="decides before its forwards"):
        block.reveal(0, choice([[0.5, 0.5]], [[1.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool))


def choice(confidence: list[list[float]], entropy: list[list[float]]) -> Choice:
    return Choice(
        torch.zeros(len(confidence), len(confidence[0]), dtype=torch.int64), *map(torch.tensor, (confidence, entropy))
    )


def test_static_top_k_shares_positions_over_its_forwards() -> None:
    masked = torch.tensor([[True] * 5, [False, True, True, False, False]])
    block = StaticTopK(3).begin(masked, torch.zeros(2, 5))
    scores = choice([[0.1, 0.9, 0.5, 0.6, 0.2]] * 2, [[0.0] * 5] * 2)
    undecided, decided = masked.clone(), []
    for forward in range(block.num_forwards or 0):
        revealed = block.reveal(forward, scores, undecided)
        decided.append(revealed.sum(1).tolist())
        undecided &= ~revealed
    assert decided == [[2, 1], [2, 1], [1, 0]] and not undecided.any()


def test_a_threshold_reveals_what_exceeds_it_and_at_least_the_best() -> None:
    block = ConfidenceThreshold(0.7).begin(torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3))
    undecided = torch.tensor([[True, True, True], [False, True, True]])
    revealed = block.reveal(0, choice([[0.8, 0.9, 0.1], [0.9, 0.2, 0.3]], [[0.0] * 3] * 2), undecided)
    assert revealed.tolist() == [[True, True, False], [False, False, True]]
    hurried = DecodingOptions(rule="confidence_threshold", steps=2).new_rule(3)
    block = hurried.begin(torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3))
    revealed = block.reveal(0, choice([[0.3, 0.1, 0.2]], [[0.0] * 3]), undecided[:1])
    assert revealed.tolist() == [[True, False, True]]


def test_entropy_bound_reveals_the_most_certain_within_its_budget_and_at_least_one() -> None:
    block = EntropyBounded(0.5).begin(torch.ones(2, 4, dtype=torch.bool), torch.zeros(2, 4))
    undecided = torch.tensor([[True] * 4, [True, False, True, True]])
    revealed = block.reveal(0, choice([[0.0] * 4] * 2, [[0.4, 0.1, 0.3, 0.9], [2.0, 0.0, 3.0, 1.0]]), undecided)
    # Row 0: 0.1, then 0.3 (0.1 before it), then 0.4 (0.4 before it); 0.9 has 0.8 before it.
    assert revealed.tolist() == [[True, True, True, False], [False, False, False, True]]


def test_every_rule_says_whether_it_is_exact() -> None:
    sentences = {name: DecodingOptions(rule=name).new_rule(4).exactness for name in RULES}
    assert sentences["first_hitting"].startswith("exact:")
    assert all(sentences[name].startswith(("exact", "approximate")) for name in RULES)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rule": "magic"}, "rule='magic' is unknown; use one of first_hitting"),
        ({"window": "broken"}, "window='broken' is unknown; use one of recomputed, evicted"),
        ({"seed": -1}, "seed=-1 is out of range"),
        ({"steps": 0}, "steps=0 is out of range; use 1 to 100000"),
        ({"threshold": 1.5}, "threshold=1.5 is out of range; use 0 to 1"),
        ({"entropy_bound": -1}, "entropy_bound=-1 is out of range"),
        ({"temperature": -0.1}, "temperature=-0.1 is out of range; use 0"),
        ({"temperature": float("nan")}, "temperature=nan is out of range"),
        ({"top_p": 0}, "top_p=0 is out of range; use more than 0 and at most 1"),
        ({"top_k": -1}, "top_k=-1 is out of range"),
        ({"min_p": 1}, "min_p=1 is out of range"),
        ({"top_k": 10**30}, "top_k=1000.*0 is out of range"),
        ({"steps": 10**9}, "steps=1000000000 is out of range"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 is out of range; use 0.01 to 100"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty=inf is out of range"),
    ],
)
def test_options_outside_their_range_are_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        DecodingOptions(**options)


def test_draws_belong_to_sample_and_position_alone() -> None:
    def drawn(key: int, start: int, size: int, *, seed: int = 7, block_size: int = 6, beside: int = 0) -> torch.Tensor:
        samples = [SampleDraws(key + 1 + other, block_size, 2000) for other in range(beside)]
        samples.append(SampleDraws(key, block_size, start + 600))
        return block_draws(seed, samples, [start] * len(samples), size)[:, -1]

    late = drawn(12345, 6 * 200, 6)
    assert torch.equal(drawn(12345, 6 * 200, 3, block_size=3), late[:, :3])
    assert torch.equal(drawn(12345, 6 * 200, 6, beside=3), late)
    early = drawn(12345, 0, 6)
    assert not torch.equal(early, late)
    assert not torch.equal(early, drawn(12346, 0, 6))
    assert not torch.equal(early, drawn(12345, 0, 6, seed=8))
    assert not torch.equal(early[0], early[1])


def test_keys_tell_repeated_prompts_apart_and_nothing_else_about_the_request() -> None:
    assert sample_keys([[1], [2], [1], [1, 2]]) == [
        sample_key([1], 0),
        sample_key([2], 0),
        sample_key([1], 1),
        sample_key([1, 2], 0),
    ]
    assert len({sample_key([1, 2], 0), sample_key([12], 0), sample_key([1, 2], 1)}) == 3
