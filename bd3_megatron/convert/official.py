"""Official BD3-LM weights <-> the plain model: folding of the constant adaLN, and its exact reverse.

Contract: with time conditioning off (every published model) the official network feeds sigma = 0 to its conditioning MLP,
so the modulation of each layer is one constant vector and folds into the neighbouring weights. `unfold` writes a plain
pre-norm model as constant adaLN; fold(unfold(plain)) is bit-equal to plain.
Decides the key table in both directions; every key is mapped or declared ignored, an unknown one is refused.
Source: kuleshov-group/bd3lms models/dit.py (DDiTBlock, DDitFinalLayer, TimestepEmbedder).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from bd3_megatron.errors import ConversionError, counted

# Buffers without meaning for the folded model: the search's interval, and frequencies that we compute anew.
IGNORED_KEYS = frozenset({"sampling_eps_min", "sampling_eps_max", "backbone.rotary_emb.inv_freq"})
COMPILE_PREFIX = "_orig_mod."

# plain name <- official name, equal bits; {i} is the layer.
SHARED_TOP = {
    "model.embed_tokens.weight": "backbone.vocab_embed.embedding",
    "lm_head.weight": "backbone.output_layer.linear.weight",
    "lm_head.bias": "backbone.output_layer.linear.bias",
}
SHARED_LAYER = {"mlp.up_proj.weight": "mlp.0.weight", "mlp.up_proj.bias": "mlp.0.bias"}
CONDITION_KEYS = tuple(f"backbone.sigma_map.mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias"))
LAYER_KEYS = (
    *("norm1.weight", "attn_qkv.weight", "attn_out.weight", "norm2.weight"),
    *("mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"),
    *("adaLN_modulation.weight", "adaLN_modulation.bias"),
)
FINAL_KEYS = (
    *("norm_final.weight", "linear.weight", "linear.bias"),
    *("adaLN_modulation.weight", "adaLN_modulation.bias"),
)

# What the official class fixes in code and a plain model must therefore have.
OFFICIAL_FREQUENCY_WIDTH = 256
OFFICIAL_ROPE_THETA = 10000.0
OFFICIAL_LAYER_NORM_EPS = 1e-5
OFFICIAL_MLP_RATIO = 4


def strip_compile_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same state without the `_orig_mod.` that torch.compile leaves in names."""
    return {name.replace(COMPILE_PREFIX, ""): tensor for name, tensor in state.items()}


def num_layers(state: Mapping[str, Tensor]) -> int:
    """Layers in an official state.

    Raises:
        ConversionError: none is found, or their numbers have gaps.
    """
    numbers = (re.match(r"backbone\.blocks\.(\d+)\.", name) for name in state)
    found = {int(number[1]) for number in numbers if number is not None}
    if not found or found != set(range(len(found))):
        raise ConversionError(
            f"official state has layers {sorted(found)}; expected backbone.blocks.0, 1, 2, ... without gaps: "
            "give a complete BD3-LM state."
        )
    return len(found)


def check_official_keys(state: Mapping[str, Tensor]) -> None:
    """Refuse a state with missing or unknown keys.

    Raises:
        ConversionError: names the first keys that are missing or unknown.
    """
    expected = {*SHARED_TOP.values(), *(f"backbone.output_layer.{key}" for key in FINAL_KEYS), *CONDITION_KEYS}
    for i in range(num_layers(state)):
        expected |= {f"backbone.blocks.{i}.{key}" for key in LAYER_KEYS}
    # Models built with adaln: false have neither modulation nor conditioning MLP.
    if not any("adaLN_modulation" in name for name in state):
        expected = {name for name in expected if "adaLN" not in name and name not in CONDITION_KEYS}
    missing, unknown = sorted(expected - set(state)), sorted(set(state) - expected - IGNORED_KEYS)
    if missing or unknown:
        raise ConversionError(
            f"official state lacks {counted(len(missing), 'key')} {missing[:3]} and has {len(unknown)} unknown {unknown[:3]}; "
            "only the DiT of BD3-LM (bd3lm, mdlm, ar) can be folded."
        )


def condition_vector(state: Mapping[str, Tensor]) -> Tensor:
    """The constant conditioning vector c [cond], silu(MLP(sinusoid(0))), differentiable.

    sinusoid(0) is exactly ones (cosines) then zeros (sines).
    """
    first = state["backbone.sigma_map.mlp.0.weight"]
    half = first.shape[1] // 2
    # The official embedding puts cosines first; cos 0 = 1 and sin 0 = 0.
    sinusoid = torch.cat([first.new_ones(half), first.new_zeros(first.shape[1] - half)])
    hidden = F.silu(F.linear(sinusoid, first, state["backbone.sigma_map.mlp.0.bias"]))
    return F.silu(F.linear(hidden, state["backbone.sigma_map.mlp.2.weight"], state["backbone.sigma_map.mlp.2.bias"]))


# Pure and differentiable, so that gradients and optimizer trajectories of the official parameters can be taken through
# it.
def fold(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official state -> plain state, exactly, as a pure differentiable function.

    Args:
        state: official keys (`backbone.*`, optionally with `_orig_mod.`), one floating dtype. A model built without
            adaLN folds too.

    Returns:
        The plain model's parameters (paper style, untied), in the dtype of `state`; gradients flow back to `state`.

    Raises:
        ConversionError: a key is missing or unknown.
    """
    state = strip_compile_prefix(state)
    check_official_keys(state)
    has_condition = CONDITION_KEYS[0] in state
    condition = condition_vector(state) if has_condition else None
    plain = {ours: state[theirs] for ours, theirs in SHARED_TOP.items()}
    for i in range(num_layers(state)):
        plain.update(_fold_layer(state, f"backbone.blocks.{i}.", f"model.layers.{i}.", condition))
    weight = state["backbone.output_layer.norm_final.weight"]
    shift, scale = _modulation(state, "backbone.output_layer.", condition, (0.0, 0.0), weight)
    # Modulated norm: (x w) (1 + scale) + shift.
    plain["model.norm.weight"] = weight * (1 + scale)
    plain["model.norm.bias"] = shift
    return plain


def _modulation(
    state: Mapping[str, Tensor],
    prefix: str,
    condition: Tensor | None,
    neutral: tuple[float, ...],
    like_D: Tensor,
) -> tuple[Tensor, ...]:
    """The modulation vectors of one place, each [D]; `neutral` values where the model has no adaLN."""
    if condition is None:
        return tuple(torch.full_like(like_D, value) for value in neutral)
    flat = F.linear(condition, state[f"{prefix}adaLN_modulation.weight"], state[f"{prefix}adaLN_modulation.bias"])
    return flat.chunk(len(neutral))


def _fold_layer(state: Mapping[str, Tensor], theirs: str, ours: str, condition: Tensor | None) -> dict[str, Tensor]:
    norm1, norm2 = state[f"{theirs}norm1.weight"], state[f"{theirs}norm2.weight"]
    # No shift, no scale, gates open; in the order in which the official layer cuts its vector.
    neutral = (0.0, 0.0, 1.0, 0.0, 0.0, 1.0)
    shift1, scale1, gate1, shift2, scale2, gate2 = _modulation(state, theirs, condition, neutral, norm1)
    query, key, value = state[f"{theirs}attn_qkv.weight"].chunk(3)
    folded = {
        "input_layernorm.weight": norm1 * (1 + scale1),
        "input_layernorm.bias": shift1,
        "self_attn.q_proj.weight": query,
        "self_attn.k_proj.weight": key,
        "self_attn.v_proj.weight": value,
        # The gate multiplies the branch's output, so it scales the rows of its last matrix, diag(gate) W.
        "self_attn.o_proj.weight": gate1[:, None] * state[f"{theirs}attn_out.weight"],
        "post_attention_layernorm.weight": norm2 * (1 + scale2),
        "post_attention_layernorm.bias": shift2,
        "mlp.down_proj.weight": gate2[:, None] * state[f"{theirs}mlp.2.weight"],
        "mlp.down_proj.bias": gate2 * state[f"{theirs}mlp.2.bias"],
    }
    folded |= {name: state[theirs + official] for name, official in SHARED_LAYER.items()}
    return {ours + name: tensor for name, tensor in folded.items()}


def unfold(plain: Mapping[str, Tensor], *, head_dim: int, condition_width: int = 128) -> dict[str, Tensor]:
    """Plain paper-style state -> official state, as constant adaLN (zero weight, constant bias).

    Args:
        plain: parameters of a paper-style model with full heads; a tied model's missing `lm_head.weight` is a copy of
            the embedding.
        head_dim: width of a head, for the stored fp32 rotary frequencies.
        condition_width: cond_dim of the official configuration; the conditioning weights are zeros.

    Returns:
        Every key of the official state dict, the two interval scalars included.

    Raises:
        ConversionError: a parameter that the official model has no place for, or one that is missing.
    """
    if "model.embed_tokens.weight" in plain:
        # The official model is never tied; an untied model's own head wins.
        plain = {"lm_head.weight": plain["model.embed_tokens.weight"], **plain}
    layers = len([name for name in plain if name.endswith("self_attn.q_proj.weight")])
    _check_plain_keys(plain, layers)
    embedding = plain["model.embed_tokens.weight"]
    zeros, width = embedding.new_zeros, embedding.shape[1]
    even = torch.arange(0, head_dim, 2, dtype=torch.float32, device=embedding.device)
    official = {
        # Buffers of the official state dict, which its loader demands.
        "sampling_eps_min": torch.tensor(1e-3),
        "sampling_eps_max": torch.tensor(0.999),
        "backbone.rotary_emb.inv_freq": 1.0 / (OFFICIAL_ROPE_THETA ** (even / head_dim)),
        "backbone.sigma_map.mlp.0.weight": zeros(condition_width, OFFICIAL_FREQUENCY_WIDTH),
        "backbone.sigma_map.mlp.0.bias": zeros(condition_width),
        "backbone.sigma_map.mlp.2.weight": zeros(condition_width, condition_width),
        "backbone.sigma_map.mlp.2.bias": zeros(condition_width),
        "backbone.output_layer.norm_final.weight": plain["model.norm.weight"],
        "backbone.output_layer.adaLN_modulation.weight": zeros(2 * width, condition_width),
        "backbone.output_layer.adaLN_modulation.bias": torch.cat([plain["model.norm.bias"], zeros(width)]),
    }
    official |= {theirs: plain[ours] for ours, theirs in SHARED_TOP.items()}
    for i in range(layers):
        layer = {name[len(f"model.layers.{i}.") :]: t for name, t in plain.items() if f"layers.{i}." in name}
        layer = {f"backbone.blocks.{i}.{name}": t for name, t in _unfold_layer(layer, condition_width).items()}
        official |= layer
    return official


def _unfold_layer(layer: Mapping[str, Tensor], condition_width: int) -> dict[str, Tensor]:
    shift1, shift2 = layer["input_layernorm.bias"], layer["post_attention_layernorm.bias"]
    zero, one = torch.zeros_like(shift1), torch.ones_like(shift1)
    attention = [layer[f"self_attn.{part}_proj.weight"] for part in "qkv"]
    official = {
        "norm1.weight": layer["input_layernorm.weight"],
        "norm2.weight": layer["post_attention_layernorm.weight"],
        "attn_qkv.weight": torch.cat(attention),
        "attn_out.weight": layer["self_attn.o_proj.weight"],
        "mlp.2.weight": layer["mlp.down_proj.weight"],
        "mlp.2.bias": layer["mlp.down_proj.bias"],
        "adaLN_modulation.weight": shift1.new_zeros(6 * shift1.shape[0], condition_width),
        # Zero weight and constant bias: the same modulation whatever the conditioning vector is.
        "adaLN_modulation.bias": torch.cat([shift1, zero, one, shift2, zero, one]),
    }
    return official | {theirs: layer[ours] for ours, theirs in SHARED_LAYER.items()}


def plain_keys(layers: int) -> set[str]:
    """Parameter names of an untied paper-style plain model."""
    biased = ("input_layernorm", "post_attention_layernorm", "mlp.up_proj", "mlp.down_proj")
    layer = {f"{name}.{kind}" for name in biased for kind in ("weight", "bias")}
    layer |= {f"self_attn.{part}_proj.weight" for part in "qkvo"}
    top = {*SHARED_TOP, "model.norm.weight", "model.norm.bias"}
    return top | {f"model.layers.{i}.{name}" for i in range(layers) for name in layer}


def _check_plain_keys(plain: Mapping[str, Tensor], layers: int) -> None:
    present = set(plain)
    missing, unknown = sorted(plain_keys(layers) - present), sorted(present - plain_keys(layers))
    if missing or unknown:
        raise ConversionError(
            f"plain state lacks {missing[:3]} and has {unknown[:3]}, for which the official model has no place; "
            "only style=paper without q/k norm can be exported to official keys."
        )
    # Grouped queries show in the rows of the key projection.
    widths = {name: plain[name].shape[0] for name in present if name.endswith(("q_proj.weight", "k_proj.weight"))}
    if len(set(widths.values())) > 1:
        raise ConversionError(
            f"query and key projections have {sorted(set(widths.values()))} rows; the official model has no grouped "
            "heads: train with num_key_value_heads = num_attention_heads to export."
        )
