"""One table, both directions: nothing is lost, nothing is invented, padding is cut and comes back as zeros."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from bd3_megatron.config.experts import ExpertsConfig
from bd3_megatron.config.schema import ModelConfig
from bd3_megatron.convert.name_table import NameTable
from bd3_megatron.convert.plain_config import plain_config
from bd3_megatron.convert.to_hf import expected_shapes
from bd3_megatron.errors import ConversionError
from bd3_megatron.hf.configuration_bd3 import BD3Config

VOCAB = 61
MODERN = ModelConfig(
    num_layers=2, hidden_size=16, num_heads=4, num_kv_heads=2, ffn_hidden_size=24, qk_norm=True, vocab_multiple=8
)
PAPER = ModelConfig(style="paper", num_layers=2, hidden_size=16, num_heads=2, vocab_multiple=8)
EXPERTS = ExpertsConfig(number=3, top_k=2, width=6, shared_width=4, leading_dense_layers=1, bias=True)
MODELS = {
    "experts": replace(MODERN, experts=EXPERTS, rotary_fraction=0.5),
    "modern": MODERN,
    "tied": replace(MODERN, tie_embeddings=True),
    "no qk norm, wide heads": replace(MODERN, qk_norm=False, head_dim=6),
    "one group": replace(MODERN, num_kv_heads=1),
    "paper": PAPER,
}


def described(model: ModelConfig) -> BD3Config:
    return plain_config(model, vocab_size=VOCAB, seq_len=16, block_size=4, mask_id=VOCAB - 1)


def random_plain(model: ModelConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in expected_shapes(described(model)).items()}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_plain_to_parallel_and_back_is_bit_equal(model: ModelConfig) -> None:
    table, plain = NameTable(model, VOCAB), random_plain(model)
    back: dict[str, torch.Tensor] = {}
    total = 0
    for name in table.parallel_names():
        whole = table.to_parallel(name, plain)
        total += whole.numel()
        back |= table.to_plain(name, whole)
    assert set(back) == set(plain)
    assert all(torch.equal(back[name], plain[name]) for name in plain)
    tables = sum(
        math.prod(plain[n].shape[1:])
        for n in ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")
        if n in plain
    )
    assert total == sum(t.numel() for t in plain.values()) + 3 * tables


def test_padding_rows_are_zero_on_the_way_in() -> None:
    whole = NameTable(MODERN, VOCAB).to_parallel("output_layer.weight", random_plain(MODERN))
    assert whole.shape == (64, 16) and not whole[VOCAB:].count_nonzero()


def test_queries_keys_and_values_lie_by_group() -> None:
    """megatron: for each key/value group its queries, then its key, then its value."""
    table, width = NameTable(MODERN, VOCAB), MODERN.head_width
    plain = {
        f"model.layers.1.self_attn.{x}_proj.weight": torch.full((n * width, 16), v)
        for x, n, v in (("q", 4, 1.0), ("k", 2, 2.0), ("v", 2, 3.0))
    }
    plain["model.layers.1.self_attn.q_proj.weight"][2 * width :] = 4.0
    fused = table.to_parallel("decoder.layers.1.self_attention.linear_qkv.weight", plain)
    assert fused[::width, 0].tolist() == [1.0, 1.0, 2.0, 3.0, 4.0, 4.0, 2.0, 3.0]


@pytest.mark.parametrize(
    "name", ["decoder.layers.0.mlp.router.weight", "decoder.layers.x.mlp.latent", "encoder.x", "decoder.layers.0"]
)
def test_an_unknown_name_is_refused(name: str) -> None:
    table: Any = NameTable(MODERN, VOCAB)
    with pytest.raises(ConversionError, match="has no place in the plain model"):
        table.to_plain(name, torch.zeros(1))
    with pytest.raises(ConversionError, match="has no place in the plain model"):
        table.plain_names(name)


def test_a_missing_plain_tensor_is_refused() -> None:
    with pytest.raises(ConversionError, match="'model.layers.0.mlp.gate_proj.weight' is missing in the source"):
        NameTable(MODERN, VOCAB).to_parallel("decoder.layers.0.mlp.linear_fc1.weight", {})
