"""Laws of the plain model: who sees whom, what the switches mean, and that dead work is dead."""

from __future__ import annotations

import pytest
import torch

from bd3_megatron.attention.visibility import sees
from bd3_megatron.hf.attention_bd3 import block_causal_sees, blocks_of, grouped_attention, pair_sees
from bd3_megatron.hf.plain_bd3 import PlainBD3, plain_model, rotary_table
from tests.tolerances import EXACT_FP64, ROTATED_FAR
from tests.unit.hf.models import STYLES, noised, tiny_config, tiny_model, tokens


@pytest.mark.parametrize("block_size", [1, 4, 6, 12])
def test_the_plain_visibility_rule_is_the_packages_own(block_size: int) -> None:
    length = 12
    block_P = (torch.arange(length) // block_size).repeat(2)
    noisy_P = torch.arange(2 * length) < length
    ruled = sees(q_is_noisy=noisy_P[:, None], q_block=block_P[:, None], k_is_noisy=noisy_P[None], k_block=block_P[None])
    block_1L = blocks_of(torch.arange(length)[None], block_size)
    assert torch.equal(pair_sees(block_1L)[0], ruled)
    assert torch.equal(block_causal_sees(block_1L)[0], ruled[length:, length:])


def test_the_visibility_rule_written_out_by_hand() -> None:
    length, size = 6, 2
    visible = pair_sees(blocks_of(torch.arange(length)[None], size))[0]
    for q in range(2 * length):
        for k in range(2 * length):
            q_block, k_block = q % length // size, k % length // size
            if q < length:
                expected = q_block == k_block if k < length else k_block < q_block
            else:
                expected = k >= length and k_block <= q_block
            assert visible[q, k].item() == expected


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_a_noisy_block_is_a_block_causal_forward_behind_its_clean_past(style: str, block_size: int) -> None:
    model, clean = tiny_model(block_size, style=style), tokens(2, 32)
    noisy = noised(clean)
    pair = model(noisy, clean)
    for start in range(0, 32, block_size):
        stop = start + block_size
        alone = model(torch.cat([clean[:, :start], noisy[:, start:stop]], dim=1))[:, start:]
        torch.testing.assert_close(pair[:, start:stop], alone, rtol=0, atol=EXACT_FP64)


def test_one_block_over_the_whole_length_has_no_use_for_the_clean_half() -> None:
    model, clean = tiny_model(32), tokens(2, 32)
    noisy = noised(clean)
    assert torch.equal(model(noisy, clean), model(noisy, tokens(2, 32, seed=9)))
    assert torch.equal(model(noisy, clean), model(noisy))


def test_the_autoregressive_objective_is_causal_and_takes_no_clean_half() -> None:
    model, ids = tiny_model(1, objective="ar"), tokens(1, 32)
    changed = ids.clone()
    changed[0, 20] = (ids[0, 20] + 1) % 20
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20], rtol=0, atol=EXACT_FP64)
    assert not torch.allclose(before[:, 20:], after[:, 20:])
    with pytest.raises(ValueError, match="context_ids were given to an autoregressive model"):
        model(ids, ids)


def test_a_context_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="must have the shape of the noisy one"):
        tiny_model()(tokens(1, 32), tokens(1, 16))


def test_documents_do_not_see_each_other() -> None:
    model, clean = tiny_model(4), tokens(1, 32)
    noisy, documents = noised(clean), torch.tensor([[0] * 10 + [1] * 22])
    other = clean.clone()
    other[:, :10] = tokens(1, 10, seed=5)
    pair, changed = model(noisy, clean, documents), model(noisy, other, documents)
    torch.testing.assert_close(pair[:, 10:], changed[:, 10:], rtol=0, atol=EXACT_FP64)
    assert not torch.allclose(model(noisy, clean)[:, 12:], model(noisy, other)[:, 12:])


def test_grouped_heads_are_full_heads_with_repeated_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 3, 6, 4, dtype=torch.float64, generator=generator)
    keys, values = torch.randn(2, 2, 2, 5, 4, dtype=torch.float64, generator=generator)
    seen = torch.rand(2, 3, 5, generator=generator) < 0.6
    seen[..., 0] = True
    full = grouped_attention(queries, keys.repeat_interleave(3, 1), values.repeat_interleave(3, 1), seen)
    torch.testing.assert_close(grouped_attention(queries, keys, values, seen), full, rtol=0, atol=EXACT_FP64)


def test_rotary_angles_stay_exact_far_beyond_the_trained_length() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 16, generator=generator)
    scores = []
    for start in (0, 100_000):
        table = [
            rotary_table(torch.tensor([[p]]), head_dim=16, theta=1e4, dtype=torch.float32) for p in (start + 7, start)
        ]
        scores.append((table[0].rotate(query) * table[1].rotate(key)).sum())
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=ROTATED_FAR * 10)


@pytest.mark.parametrize("style", STYLES)
def test_parameter_names_are_those_of_the_converters(style: str) -> None:
    names = {name.replace("layers.0", "layers.i") for name, _ in PlainBD3(tiny_config(style=style)).named_parameters()}
    layer = "model.layers.i."
    expected = {f"{layer}self_attn.{part}_proj.weight" for part in "qkvo"} | {"model.embed_tokens.weight"}
    norms = [f"{layer}input_layernorm", f"{layer}post_attention_layernorm", "model.norm"]
    expected |= {f"{norm}.weight" for norm in norms}
    if style == "paper":
        expected |= {f"{norm}.bias" for norm in norms} | {"lm_head.weight", "lm_head.bias"}
        expected |= {f"{layer}mlp.{part}_proj.{kind}" for part in ("up", "down") for kind in ("weight", "bias")}
    else:
        expected |= {f"{layer}mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    if style == "modern":
        expected |= {f"{layer}self_attn.{part}_norm.weight" for part in "qk"} | {"lm_head.weight"}
    assert {name for name in names if "layers.1" not in name} == expected


def test_a_tied_state_needs_no_head() -> None:
    model = tiny_model(style="tied")
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    ids = tokens(1, 32)
    assert torch.equal(plain_model(tiny_config(style="tied"), state)(ids), model(ids))


def test_dropout_acts_in_training_only() -> None:
    model, ids = tiny_model(residual_dropout=0.5), tokens(1, 32)
    assert torch.equal(model(ids), model(ids))
    assert not torch.equal(model.train()(ids), model(ids))
