"""Parameters in closed form are the plain model's, tensor by tensor; ranks hold what they add up to."""

from __future__ import annotations

from typing import Any

import pytest

from bd3_megatron.convert.plain_config import plain_config
from bd3_megatron.cost.parameters import (
    active_parameter_count,
    copied_per_rank,
    experts_per_rank,
    parameter_count,
    parameter_table,
    parameters_per_rank,
)
from bd3_megatron.cost.shape import shape_of
from bd3_megatron.hf.modeling_bd3 import BD3ForMaskedLM
from tests.unit.cost.cases import MIXTURES, STYLES, case, gpt2_small


@pytest.mark.parametrize("style", [*STYLES, *MIXTURES])
def test_names_and_shapes_are_those_of_the_plain_model(style: str) -> None:
    config = case(style=style)
    shape = shape_of(config)
    described = plain_config(config.model, vocab_size=shape.vocab, seq_len=32, block_size=4, mask_id=59)
    model = BD3ForMaskedLM(described)
    plain = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {p.name: p.shape for p in parameter_table(config)} == plain
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())


def test_the_papers_small_model_has_its_published_size() -> None:
    # 169.63 M in the official code, of which its adaLN and sigma_map (7.1 M) are folded away here and biases added
    official = 169.63e6
    conditioning = 12 * (6 * 768 * 128 + 6 * 768) + 2 * 768 * 128 + 2 * 768 + 256 * 128 + 128 + 128 * 128 + 128
    biases = 25 * 768
    assert parameter_count(gpt2_small()) == pytest.approx(official - conditioning + biases, rel=1e-4)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("tp", [1, 2])
def test_tensor_parallel_ranks_add_up(style: str, tp: int) -> None:
    config = case(style=style, parallel={"tp": tp})
    copied = sum(p.count for p in parameter_table(config, padded=True) if p.cut is None)
    assert tp * parameters_per_rank(config, 0) - (tp - 1) * copied == parameter_count(config, padded=True)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("vpp", [None, 2])
def test_stages_add_up_and_a_tied_table_is_held_twice(style: str, vpp: int | None) -> None:
    model = {"num_layers": 4, "hidden_size": 32, "num_heads": 4, "vocab_size": 60, "vocab_multiple": 64}
    config = case(model=model | STYLES[style], parallel={"pp": 2, "vpp": vpp})
    held = sum(parameters_per_rank(config, stage) for stage in range(2))
    copy = 64 * 32 if config.model.tie_embeddings else 0
    assert held == parameter_count(config, padded=True) + copy


def test_matrices_are_decayed_and_vectors_are_not() -> None:
    decayed = {p.name for p in parameter_table(case(style="paper")) if p.decayed}
    assert "model.layers.0.mlp.up_proj.weight" in decayed
    assert not any(name.endswith("bias") or "norm" in name for name in decayed)


@pytest.mark.parametrize("style", STYLES)
def test_what_every_tensor_parallel_rank_holds_whole_is_what_is_not_cut(style: str) -> None:
    config = case(style=style, parallel={"pp": 2, "tp": 2})
    copied = sum(p.count for p in parameter_table(config, padded=True) if p.cut is None)
    assert sum(copied_per_rank(config, stage) for stage in range(2)) == copied > 0


@pytest.mark.parametrize(
    "parallel", [{"ep": 2, "dp": 2}, {"pp": 2}, {"tp": 2, "sequence_parallel": True, "ep": 2}], ids=str
)
def test_ranks_with_experts_add_up(parallel: dict[str, Any]) -> None:
    # 4 layers, the first one dense; the table is not tied
    config = case(style="experts", model={"num_layers": 4}, parallel=parallel)
    axes = config.parallel
    table = parameter_table(config, padded=True)
    routed = sum(p.count for p in table if p.is_expert)
    copied = sum(p.count for p in table if p.cut is None and not p.is_expert)
    held = sum(parameters_per_rank(config, stage) for stage in range(axes.pp))
    dense = parameter_count(config, padded=True) - routed
    assert held == (dense + (axes.tp - 1) * copied) // axes.tp + routed // axes.ep
    assert sum(experts_per_rank(config, stage) for stage in range(axes.pp)) == routed // axes.ep


def test_llada2_mini_has_its_published_size() -> None:
    experts = {"number": 256, "top_k": 8, "width": 512, "shared_width": 512, "leading_dense_layers": 1, "bias": True}
    sizes = {"num_layers": 20, "hidden_size": 2048, "num_heads": 16, "num_kv_heads": 4, "ffn_hidden_size": 5120}
    model = sizes | {"qk_norm": True, "vocab_size": 157184, "experts": experts}
    config = case(model=model)
    # "16B total, 1.4B activated"; the published tensors of inclusionAI/LLaDA2.0-mini hold 16.26 B
    assert parameter_count(config) == pytest.approx(16.26e9, rel=0.01)
    assert active_parameter_count(config) == pytest.approx(1.43e9, rel=0.01)
