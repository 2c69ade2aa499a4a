"""Parameters in closed form are the plain model's, tensor by tensor; ranks hold what they add up to."""

from __future__ import annotations

import pytest

from bd3_megatron.cost.parameters import (
    copied_per_rank,
    parameter_count,
    parameter_table,
    parameters_per_rank,
)
from bd3_megatron.cost.shape import shape_of
from bd3_megatron.hf.configuration_bd3 import BD3Config
from bd3_megatron.hf.modeling_bd3 import BD3ForMaskedLM
from tests.unit.cost.cases import STYLES, case, gpt2_small


@pytest.mark.parametrize("style", STYLES)
def test_names_and_shapes_are_those_of_the_plain_model(style: str) -> None:
    config = case(style=style)
    shape = shape_of(config)
    model = BD3ForMaskedLM(
        BD3Config(
            vocab_size=shape.vocab,
            style=config.model.style,
            num_hidden_layers=shape.layers,
            hidden_size=shape.hidden,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_width,
            intermediate_size=shape.ffn,
            qk_norm=shape.qk_norm,
            tie_word_embeddings=shape.tied,
            max_position_embeddings=32,
            block_size=4,
            mask_token_id=59,
        )
    )
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
