"""Official weights: folding is exact and differentiable, unfolding is its exact reverse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bd3_megatron.convert.official import fold, unfold
from bd3_megatron.errors import ConversionError
from bd3_megatron.hf.plain_bd3 import PlainBD3, plain_model
from tests.tolerances import GOLDEN_FP64
from tests.unit.hf.models import tiny_config, tiny_model

GOLDEN = Path(__file__).parents[2] / "golden"
VOCAB, MASK, HEAD_DIM = 50, 49, 16


def official_state() -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in load_file(GOLDEN / "tiny_state.safetensors").items()}


def golden_model(block_size: int) -> PlainBD3:
    config = tiny_config(
        block_size, style="paper", vocab_size=VOCAB, hidden_size=64, num_hidden_layers=3, mask_token_id=MASK
    )
    return PlainBD3(config).double()


def subs_log_probability(logits_BLV: Tensor, noisy_BL: Tensor) -> Tensor:
    """Written out: the mask token is impossible, and visible tokens are copied."""
    shifted = logits_BLV.clone()
    shifted[..., MASK] += -1e6
    log_p = shifted.log_softmax(-1)
    copied = torch.full_like(log_p, -1e6).scatter(-1, noisy_BL[..., None], 0.0)
    return torch.where((noisy_BL == MASK)[..., None], log_p, copied)


@pytest.mark.parametrize("block_size", [4, 16])
def test_golden_logits_losses_and_gradients_through_the_folding(block_size: int) -> None:
    golden = load_file(GOLDEN / f"bd3lm_tiny_bs{block_size}.safetensors")
    state = {name: tensor.requires_grad_() for name, tensor in official_state().items()}
    noisy, clean, t = golden["xt"], golden["x0"], golden["t"].double()
    logits = torch.func.functional_call(golden_model(block_size), fold(state), (noisy, clean))
    torch.testing.assert_close(logits, golden["logits_f64"], rtol=0, atol=GOLDEN_FP64)
    log_p = subs_log_probability(logits, noisy)
    torch.testing.assert_close(log_p[..., :MASK], golden["logp_f64"][..., :MASK], rtol=0, atol=GOLDEN_FP64)
    # One unit in the last place of -1e6, which the rule adds to the mask token's logit, is 1.2e-10.
    torch.testing.assert_close(log_p[..., MASK], golden["logp_f64"][..., MASK], rtol=GOLDEN_FP64, atol=0)
    nll = -log_p.gather(-1, clean[..., None])[..., 0] / t
    for form in ("train", "eval"):
        torch.testing.assert_close(nll, golden[f"{form}_nlls_f64"], rtol=0, atol=GOLDEN_FP64)
    counted = golden["train_token_mask_f64"]
    loss = (nll * counted).sum() / counted.sum()
    torch.testing.assert_close(loss, golden["train_loss_f64"][0], rtol=0, atol=GOLDEN_FP64)
    loss.backward()
    gradients = {name[len("grad_f64.") :]: tensor for name, tensor in golden.items() if name.startswith("grad_f64.")}
    assert len(gradients) == 40
    for name, expected in gradients.items():
        torch.testing.assert_close(state[name].grad, expected, rtol=0, atol=GOLDEN_FP64)


def test_unfolding_then_folding_is_bit_equal() -> None:
    plain = fold(official_state())
    official = unfold(plain, head_dim=HEAD_DIM, condition_width=32)
    state = official_state()
    assert {name: tensor.shape for name, tensor in official.items()} == {n: t.shape for n, t in state.items()}
    again = fold(official)
    assert set(again) == set(plain)
    assert all(torch.equal(again[name], plain[name]) for name in plain)


def test_names_left_by_torch_compile_are_understood() -> None:
    state = official_state()
    renamed = {name.replace("backbone.", "backbone._orig_mod."): tensor for name, tensor in state.items()}
    expected, found = fold(state), fold(renamed)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_model_without_adaln_folds_to_itself() -> None:
    state = {n: t for n, t in official_state().items() if "adaLN" not in n and "sigma_map" not in n}
    plain = fold(state)
    assert torch.equal(plain["model.layers.0.mlp.down_proj.weight"], state["backbone.blocks.0.mlp.2.weight"])
    assert torch.equal(plain["model.norm.bias"], torch.zeros(64, dtype=torch.float64))


def test_a_tied_model_unfolds_with_a_copy_of_its_table() -> None:
    state = {n: t for n, t in fold(official_state()).items() if n != "lm_head.weight"}
    official = unfold(state, head_dim=HEAD_DIM)
    assert torch.equal(official["backbone.output_layer.linear.weight"], state["model.embed_tokens.weight"])


def test_missing_and_unknown_official_keys_are_refused() -> None:
    state = official_state()
    del state["backbone.blocks.1.norm2.weight"]
    with pytest.raises(ConversionError, match=r"lacks 1 key \['backbone.blocks.1.norm2.weight'\]"):
        fold(state)
    with pytest.raises(ConversionError, match=r"1 unknown \['backbone.surprise'\]"):
        fold({**official_state(), "backbone.surprise": torch.zeros(1)})
    with pytest.raises(ConversionError, match=r"has layers \[\]; expected backbone.blocks.0, 1, 2"):
        fold({"weight": torch.zeros(1)})


def test_plain_states_that_the_official_model_cannot_hold_are_refused() -> None:
    modern = tiny_model(4).state_dict()
    with pytest.raises(ConversionError, match="only style=paper without q/k norm can be exported"):
        unfold(modern, head_dim=4)
    grouped = tiny_model(4, style="paper", num_key_value_heads=2).state_dict()
    with pytest.raises(ConversionError, match="the official model has no grouped heads"):
        unfold(grouped, head_dim=4)


def test_the_hugging_face_form_gives_its_recorded_logits() -> None:
    golden = load_file(GOLDEN / "hf_tiny_bs4_golden.safetensors")
    plain = fold({n: t.double() for n, t in load_file(GOLDEN / "hf_tiny_bs4/model.safetensors").items()})
    model = plain_model(golden_model(4).model.shape, plain)
    noisy, clean = golden["input_ids"].chunk(2, dim=1)
    torch.testing.assert_close(model(noisy, clean).float(), golden["logits"], rtol=0, atol=2e-5)
