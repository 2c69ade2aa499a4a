"""Logits with one layer of weights in memory at a time: the proof at the end of a conversion.

Decides: two forwards that share no code but torch. `plain_logits` runs the plain model's own layers on plain tensors;
`parallel_logits` works on the parallel tensors as megatron lays them out (q, k, v interleaved by group; gate over up;
padded tables) under the package's own visibility rule. If both agree on random tokens, the name table, the cuts and the
written bytes are right. Costs: one layer, plus the embedding table; fp32.
Source of the parallel layout: megatron-core 0.16.1 transformer/attention.py (get_query_key_value_tensors), mlp.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bd3_megatron.attention.visibility import sees
from bd3_megatron.config.experts import ExpertsConfig
from bd3_megatron.config.schema import ModelConfig
from bd3_megatron.convert.from_ar import EMBED_TOKENS, LM_HEAD
from bd3_megatron.convert.plain_source import PlainSource
from bd3_megatron.diffusion.objective import objective_named
from bd3_megatron.hf.attention_bd3 import block_causal_sees, blocks_of, grouped_attention, pair_sees
from bd3_megatron.hf.mlp_bd3 import choose_experts
from bd3_megatron.hf.plain_bd3 import Layer, ModelShape, new_norm, rotary_table
from bd3_megatron.model.partition import EMBEDDING, HEAD_BIAS, HEAD_WEIGHT
from bd3_megatron.model.router import routing_of
from bd3_megatron.rng import Purpose, uniform

_SEED = 1
_NUM_SEQUENCES = 2
# The least with a block before and one behind: every branch of the visibility rule is met.
NUM_BLOCKS = 3
# Keeps the proof's attention small; weights do not depend on the block size.
LONGEST_SPAN = 16

TABLE_ROWS = 8192
"""Rows of the vocabulary that are in memory at a time, beside what the source itself holds."""

Produce = Callable[[str], Tensor]
RowReader = Callable[[int, int], Tensor]


def random_tokens(vocab_size: int, length: int, *, seed: int = _SEED) -> Tensor:
    """int64 [2, length] ids, all of the vocabulary equally likely."""
    place_BL = torch.arange(_NUM_SEQUENCES * length).view(_NUM_SEQUENCES, length)
    return (uniform(seed, Purpose.EVALUATE, place_BL) * vocab_size).long()


def proof_span(objective: str, block_size: int) -> int:
    """Tokens of a block in the proof: the model's own where that is short; weights do not depend on it."""
    return min(objective_named(objective, block_size=block_size).block_size, LONGEST_SPAN)


def plain_logits(
    source: PlainSource, shape: ModelShape, noisy_BL: Tensor, clean_BL: Tensor | None, *, span: int
) -> Tensor:
    """Raw logits [B, L, V], fp32, of the plain model whose tensors `source` holds.

    Args:
        source: plain names.
        shape: a BD3Config.
        noisy_BL: int64 ids.
        clean_BL: int64 ids of the clean half; None: one sequence under the block-causal rule.
        span: tokens of a block.
    """
    return head_logits(source, shape, final_states(source, shape, noisy_BL, clean_BL, span=span))


@torch.no_grad()
def final_states(
    source: PlainSource, shape: ModelShape, noisy_BL: Tensor, clean_BL: Tensor | None, *, span: int
) -> Tensor:
    """What the head sees [B, L, D], fp32, after the last norm; arguments as `plain_logits`."""
    length = noisy_BL.shape[1]
    ids_BR = noisy_BL if clean_BL is None else torch.cat([noisy_BL, clean_BL], dim=1)
    rule = block_causal_sees if clean_BL is None else pair_sees
    sees_BRR = rule(blocks_of(torch.arange(length, device=noisy_BL.device)[None], span))
    position_BR = torch.arange(length).repeat(ids_BR.shape[1] // length)[None]
    rotary = rotary_table(position_BR, head_dim=shape.rotary_dim, theta=shape.rope_theta, dtype=torch.float32)

    def attend(q_BQNH: Tensor, k_BRGH: Tensor, v_BRGH: Tensor, layer: int) -> Tensor:
        return grouped_attention(q_BQNH, k_BRGH.transpose(1, 2), v_BRGH.transpose(1, 2), sees_BRR)

    # In parts: the whole of a large vocabulary in fp32 would be the largest tensor of the proof.
    x_BRD = _looked_up(partial(source.rows, EMBED_TOKENS), source.shape(EMBED_TOKENS)[0], ids_BR)
    for index in range(shape.num_hidden_layers):
        layer = _loaded(partial(Layer, shape, index), source, f"model.layers.{index}.")
        x_BRD = layer(x_BRD, rotary, attend)
    return _loaded(partial(new_norm, shape), source, "model.norm.")(x_BRD[:, :length])


@torch.no_grad()
def head_logits(source: PlainSource, shape: ModelShape, x_BLD: Tensor) -> Tensor:
    """Raw logits [B, L, V], fp32, of final states."""
    head = EMBED_TOKENS if shape.tie_word_embeddings else LM_HEAD
    logits = _scored(partial(source.rows, head), shape.vocab_size, x_BLD)
    return logits + source.tensor("lm_head.bias").float() if shape.style == "paper" else logits


def _looked_up(rows: RowReader, num_rows: int, ids_BR: Tensor) -> Tensor:
    """Rows of a table by id, fp32, reading a part of the table at a time."""
    parts = []
    for start in range(0, num_rows, TABLE_ROWS):
        end = min(start + TABLE_ROWS, num_rows)
        wanted = (ids_BR >= start) & (ids_BR < end)
        parts.append((wanted, rows(start, end)[ids_BR[wanted] - start].float()))
    x_BRD = torch.empty(*ids_BR.shape, parts[0][1].shape[-1])
    for wanted, found in parts:
        x_BRD[wanted] = found
    return x_BRD


def _scored(rows: RowReader, num_rows: int, x_BLD: Tensor) -> Tensor:
    """x times the transposed table, reading a part of the table at a time."""
    ends = range(TABLE_ROWS, num_rows + TABLE_ROWS, TABLE_ROWS)
    return torch.cat([x_BLD @ rows(end - TABLE_ROWS, min(end, num_rows)).float().T for end in ends], dim=-1)


def _loaded(make: Callable[[], nn.Module], source: PlainSource, prefix: str) -> nn.Module:
    # No memory and no random draw for weights that are replaced at once.
    with torch.device("meta"):
        module = make()
    state = {name: source.tensor(prefix + name).float() for name in module.state_dict()}
    module.load_state_dict(state, assign=True)
    # No dropout in a proof.
    return module.eval()


@torch.no_grad()
def parallel_logits(
    produce: Produce,
    model: ModelConfig,
    noisy_BL: Tensor,
    clean_BL: Tensor | None,
    *,
    span: int,
    vocab_size: int,
    rounded_to: torch.dtype = torch.float32,
) -> Tensor:
    """Raw logits [B, L, V], fp32, of the parallel model whose whole tensors `produce` makes.

    Args:
        produce: whole tensor of a global parameter name, fp32.
        model: shapes and style.
        noisy_BL, clean_BL: as in `plain_logits`.
        span: tokens of a block.
        vocab_size: V; padding rows are cut off.
        rounded_to: weights are rounded to this before they are used, as a written folder's were.
    """

    def weight(name: str) -> Tensor:
        return produce(name).to(rounded_to).float()

    length = noisy_BL.shape[1]
    ids_BR = noisy_BL if clean_BL is None else torch.cat([noisy_BL, clean_BL], dim=1)
    position_R = torch.arange(length).repeat(ids_BR.shape[1] // length)
    is_noisy_R = torch.arange(ids_BR.shape[1]) < (0 if clean_BL is None else length)
    block_R = position_R // span
    sees_RR = sees(
        q_is_noisy=is_noisy_R[:, None], q_block=block_R[:, None], k_is_noisy=is_noisy_R[None], k_block=block_R[None]
    )
    # Rounded as a written folder's weights are, or the comparison would measure the rounding.
    x_BRD = produce(EMBEDDING)[ids_BR].to(rounded_to).float()
    for layer in range(model.num_layers):
        prefix = f"decoder.layers.{layer}."
        u_BRD = _norm(x_BRD, weight, prefix + "input_layernorm", model)
        x_BRD = x_BRD + _attention(u_BRD, weight, prefix + "self_attention.", model, (position_R, sees_RR))
        u_BRD, inner = _norm(x_BRD, weight, prefix + "pre_mlp_layernorm", model), prefix + "mlp."
        if model.experts is not None and model.has_experts(layer):
            bias_E = produce(inner + "router.expert_bias") if model.experts.bias else None
            x_BRD = x_BRD + _mixture(u_BRD, weight, inner, model.experts, bias_E)
        else:
            x_BRD = x_BRD + _mlp(u_BRD, weight, inner, model)
    x_BLD = _norm(x_BRD[:, :length], weight, "decoder.final_layernorm", model)
    table_VD = produce(EMBEDDING if model.tie_embeddings else HEAD_WEIGHT)
    logits = _scored(lambda start, end: table_VD[start:end].to(rounded_to), vocab_size, x_BLD)
    return logits + weight(HEAD_BIAS)[:vocab_size] if model.style == "paper" else logits


def _norm(x: Tensor, produce: Produce, name: str, model: ModelConfig) -> Tensor:
    weight = produce(f"{name}.weight")
    if model.style == "modern":
        return x * (x.square().mean(-1, keepdim=True) + model.layer_norm_eps).rsqrt() * weight
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + model.layer_norm_eps).rsqrt()
    return centred * scale * weight + produce(f"{name}.bias")


def _attention(u_BRD: Tensor, produce: Produce, prefix: str, model: ModelConfig, rows: tuple[Tensor, Tensor]) -> Tensor:
    position_R, sees_RR = rows
    share, width = model.num_heads // model.kv_heads, model.head_width
    fused = (u_BRD @ produce(prefix + "linear_qkv.weight").T).unflatten(-1, (model.kv_heads, share + 2, width))
    # megatron's order of rows: group after group, queries, then the key, then the value.
    q, k, v = fused[..., :share, :], fused[..., share : share + 1, :], fused[..., share + 1 :, :]
    if model.qk_norm:
        q = _norm(q, produce, prefix + "q_layernorm", model)
        k = _norm(k, produce, prefix + "k_layernorm", model)
    turns = (position_R, model.rope_base, model.rotary_width)
    q, k = _rotate(q, *turns), _rotate(k, *turns)
    scores = torch.einsum("bqgsh,bkgoh->bgsqk", q, k) / width**0.5
    # Written out, without a fused kernel: the proof must not share one with what it proves.
    weights = scores.masked_fill(~sees_RR, float("-inf")).softmax(-1)
    mixed = torch.einsum("bgsqk,bkgoh->bqgsh", weights, v).flatten(-3)
    return mixed @ produce(prefix + "linear_proj.weight").T


def _rotate(x: Tensor, position_R: Tensor, base: float, rotary_width: int) -> Tensor:
    """Rotate-half positions on the first channels of [B, R, groups, heads, H]."""
    half = rotary_width // 2
    frequency = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = (position_R.double()[:, None] * frequency)[:, None, None, :]
    cosine, sine = angle.cos().float(), angle.sin().float()
    first, second, rest = x[..., :half], x[..., half:rotary_width], x[..., rotary_width:]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine, rest], dim=-1)


def _mixture(u_BRD: Tensor, produce: Produce, prefix: str, experts: ExpertsConfig, bias_E: Tensor | None) -> Tensor:
    u_RD = u_BRD.flatten(0, 1)
    choice = choose_experts(u_RD @ produce(prefix + "router.weight").T, routing_of(experts), bias_E)
    first, second = produce(prefix + "experts.linear_fc1.weight"), produce(prefix + "experts.linear_fc2.weight")
    out_RD = torch.zeros_like(u_RD)
    for expert in range(experts.number):
        # the weight of an expert that a row has not chosen is 0
        weight_R = (choice.weight_RK * (choice.expert_RK == expert)).sum(1)
        gate, value = (u_RD @ first[expert].T).chunk(2, dim=-1)
        out_RD += weight_R[:, None] * ((F.silu(gate) * value) @ second[expert].T)
    if experts.shared_width is not None:
        gate, value = (u_RD @ produce(prefix + "shared_experts.linear_fc1.weight").T).chunk(2, dim=-1)
        out_RD += (F.silu(gate) * value) @ produce(prefix + "shared_experts.linear_fc2.weight").T
    return out_RD.view_as(u_BRD)


def _mlp(u_BRD: Tensor, produce: Produce, prefix: str, model: ModelConfig) -> Tensor:
    up = u_BRD @ produce(prefix + "linear_fc1.weight").T
    if model.style == "modern":
        # Gate over up, as megatron stacks them.
        gate, value = up.chunk(2, dim=-1)
        return (F.silu(gate) * value) @ produce(prefix + "linear_fc2.weight").T
    inner = F.gelu(up + produce(prefix + "linear_fc1.bias"), approximate="tanh")
    return inner @ produce(prefix + "linear_fc2.weight").T + produce(prefix + "linear_fc2.bias")
