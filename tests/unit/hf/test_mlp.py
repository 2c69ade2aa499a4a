"""The choice of experts is that of the models people run, and the mixture is its definition written out."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bd3_megatron.hf.configuration_bd3 import BD3Config
from bd3_megatron.hf.mlp_bd3 import ExpertMlp, choose_experts
from tests import tolerances


@dataclass(frozen=True)
class Rule:
    num_experts_per_tok: int = 8
    score_function: str = "sigmoid"
    norm_topk_prob: bool = True
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5


def llada2_by_hand(logits_E: list[float], bias_E: list[float], rule: Rule) -> dict[int, float]:
    """Expert -> weight of one row, in Python floats, as LLaDA2's modelling file has it."""
    score = [1 / (1 + torch.tensor(-x, dtype=torch.float64).exp().item()) for x in logits_E]
    wanted = [s + b for s, b in zip(score, bias_E, strict=True)]
    size = len(score) // rule.n_group
    groups = sorted(
        range(rule.n_group), key=lambda g: -sum(sorted(wanted[g * size : (g + 1) * size], reverse=True)[:2])
    )
    admitted = [e for g in groups[: rule.topk_group] for e in range(g * size, (g + 1) * size)]
    chosen = sorted(admitted, key=lambda e: -wanted[e])[: rule.num_experts_per_tok]
    total = sum(score[e] for e in chosen)
    return {e: rule.routed_scaling_factor * score[e] / total for e in chosen}


def test_sigmoid_groups_and_bias_are_those_of_llada2() -> None:
    generator = torch.Generator().manual_seed(3)
    logits_RE = torch.randn(5, 64, generator=generator, dtype=torch.float64)
    bias_E = 0.2 * torch.randn(64, generator=generator, dtype=torch.float64)
    rule = Rule()
    choice = choose_experts(logits_RE, rule, bias_E)
    moved = choose_experts(logits_RE, rule)
    # a bias that changed no choice would test nothing
    assert not torch.equal(choice.expert_RK, moved.expert_RK)
    for row in range(5):
        expected = llada2_by_hand(logits_RE[row].tolist(), bias_E.tolist(), rule)
        found = dict(zip(choice.expert_RK[row].tolist(), choice.weight_RK[row].tolist(), strict=True))
        assert found == pytest.approx(expected, rel=tolerances.EXACT_FP64)


@pytest.mark.parametrize("normed", [True, False])
def test_softmax_over_all_experts_is_that_of_qwen3(*, normed: bool) -> None:
    logits_RE = torch.randn(7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rule = Rule(2, "softmax", normed, 1, 1, 1.0)
    choice = choose_experts(logits_RE, rule)
    best_RK, index_RK = logits_RE.topk(2, dim=-1)
    assert torch.equal(choice.expert_RK, index_RK)
    shares_RE = logits_RE.softmax(-1)
    expected = best_RK.softmax(-1) if normed else shares_RE.gather(1, index_RK)
    assert torch.allclose(choice.weight_RK, expected, rtol=tolerances.EXACT_FP64)


def mixture(**fields: object) -> BD3Config:
    return BD3Config(
        vocab_size=16, hidden_size=8, num_attention_heads=2, num_hidden_layers=1, max_position_embeddings=16,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=6, shared_expert_intermediate_size=5, **fields,
    )  # fmt: skip


def test_the_mixture_is_the_weighted_sum_of_its_experts() -> None:
    torch.manual_seed(0)
    mlp = ExpertMlp(mixture()).double()
    u_BRD = torch.randn(2, 3, 8, dtype=torch.float64)

    def row(u_D: Tensor) -> Tensor:
        score_E = (mlp.gate.weight @ u_D).softmax(0)
        best_K, index_K = score_E.topk(2)
        assert mlp.shared_experts is not None
        parts = [w / best_K.sum() * mlp.experts[e](u_D) for w, e in zip(best_K, index_K.tolist(), strict=True)]
        return torch.stack(parts).sum(0) + mlp.shared_experts(u_D)

    expected = torch.stack([row(u_D) for u_D in u_BRD.flatten(0, 1)]).view_as(u_BRD)
    assert torch.allclose(mlp(u_BRD), expected, rtol=tolerances.EXACT_FP64, atol=0)


@pytest.mark.parametrize(
    ("fields", "law"),
    [
        ({"score_function": "top"}, r"^score_function='top' is unknown; use one of softmax, sigmoid\.$"),
        ({"n_group": 3}, r"^n_group=3, topk_group=1 do not divide 4 experts;"),
        (
            {"partial_rotary_factor": 0.7},
            r"^partial_rotary_factor=0\.7 turns 3 of 4 channels; rotary pairs need an even",
        ),
        ({"style": "paper"}, r"^num_experts=4 with style='paper', whose MLP is dense; use 'modern'\.$"),
    ],
)
def test_shapes_that_no_mixture_has_are_refused(fields: dict[str, object], law: str) -> None:
    with pytest.raises(ValueError, match=law):
        mixture(**fields)


def test_more_chosen_experts_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^num_experts_per_tok=5 of num_experts=4 experts of width 6 is no mixture;"):
        BD3Config(num_experts=4, num_experts_per_tok=5, moe_intermediate_size=6)
