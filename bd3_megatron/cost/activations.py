"""Bytes that one layer keeps for its backward, part by part, and what recomputation leaves of them.

For one micro-batch on one rank. Source: megatron-core 0.16 as read and as counted by hooks.
"""

from __future__ import annotations

from bd3_megatron.config.schema import Config
from bd3_megatron.cost.assumptions import FP32, EngineAssumptions
from bd3_megatron.cost.shape import (
    Shape,
    expected_masked_fraction,
    last_layer_is_recomputed,
    last_layer_is_trimmed,
    pipeline_rows,
    scored_rows,
)


def row_cut(config: Config) -> int:
    """Ranks that share the rows of norms and of the residual stream."""
    return config.parallel.tp if config.parallel.sequence_parallel else 1


def layer_activation_bytes(config: Config, shape: Shape, engine: EngineAssumptions) -> dict[str, float]:
    """Bytes one layer keeps for its backward, for one micro-batch, by part ("input" is the layer's input alone)."""
    b, tp = engine.element_bytes, config.parallel.tp
    rows = pipeline_rows(config, shape) * config.train.micro_batch_size
    # tp cuts q, k, v and the MLP, but rows of norms only under sequence parallelism
    cut = rows / row_cut(config)
    q, kv = shape.q_width / tp, shape.kv_width / tp
    return {
        # qkv: stacked q, k, v (its v is a view), then rotated q and k. Attention: the kernel's output, the same again
        # in row order, one fp32 statistic a head. MLP: gated, gate and up 2F and their product F; plain, input and
        # output of gelu, 2F.
        "input": cut * shape.hidden * b,
        "norms": cut * 2 * shape.hidden * b,
        "normed": cut * 2 * shape.hidden * b,
        "qk_norms": rows * _qk_norm_bytes(shape, b) / tp if shape.qk_norm else 0.0,
        "qkv": rows * (q + kv + q + kv / 2) * b,
        "attention_kernel": rows * (q * b + FP32 * shape.heads / tp),
        "attention_output": rows * q * b,
        **_mlp_rows(config, shape, engine, rows, cut),
        "dropout": 2 * cut * shape.hidden * (1 if engine.fused else b) if shape.dropout else 0.0,
    }


def last_layer_activation_bytes(config: Config, shape: Shape, engine: EngineAssumptions) -> dict[str, float]:
    """The same of the model's last layer where it computes keys and values of all rows, the rest of scored rows only."""
    if not last_layer_is_trimmed(config):
        return layer_activation_bytes(config, shape, engine)
    b, tp, mbs = engine.element_bytes, config.parallel.tp, config.train.micro_batch_size
    rows = pipeline_rows(config, shape) * mbs
    stream = (shape.noisy_rows or shape.length) // config.parallel.cp * mbs
    scored = scored_rows(config, shape, expected_masked_fraction(config))
    q, kv = shape.q_width / tp, shape.kv_width / tp
    # the cut of the stacked weight into queries and the rest is a copy
    weights = shape.hidden * (q + kv) * b
    return {
        "input": rows / row_cut(config) * shape.hidden * b,
        "norms": (rows / row_cut(config) + scored) * shape.hidden * b,
        # normed rows are whole on every rank, under sequence parallelism too
        "normed": (rows + scored) * shape.hidden * b,
        "qk_norms": scored * q * b + rows * FP32 * shape.heads / tp if shape.qk_norm else 0.0,
        "qkv": (scored * shape.hidden + stream * q + rows * 1.5 * kv) * b + weights,
        "rotary": 2.0 * scored * shape.head_width * b,
        "attention_kernel": stream * (q * b + FP32 * shape.heads / tp),
        "attention_output": scored * q * b,
        **_mlp_rows(config, shape, engine, scored, scored),
        "dropout": 2 * scored * shape.hidden * (1 if engine.fused else b) if shape.dropout else 0.0,
    }


def rotary_bytes(config: Config, shape: Shape, b: int) -> float:
    """Cosines and sines, in one copy for all sequences, heads and layers of a chunk."""
    return 2.0 * pipeline_rows(config, shape) * shape.head_width * b


def _qk_norm_bytes(shape: Shape, b: int) -> float:
    """A statistic a head, and grouped queries as rows of heads; the rest is in the stacked q, k, v that is kept anyway."""
    grouped = 2 * shape.q_width > shape.kv_width
    return FP32 * (shape.q_width + shape.kv_width / 2) / shape.head_width + (shape.q_width * b if grouped else 0)


def _mlp_rows(config: Config, shape: Shape, engine: EngineAssumptions, rows: float, cut: float) -> dict[str, float]:
    """Inner rows of the MLP; of a mixture, at even load, what its experts, their exchange and the router keep.

    Args:
        rows: of the micro-batch on a tensor-parallel group.
        cut: of them on this rank.
    """
    b, tp, experts = engine.element_bytes, config.parallel.tp, shape.experts
    if experts is None:
        return {"mlp": rows * _mlp_width(shape) / tp * b, "mlp_active": rows * shape.ffn / tp * b}
    copies, shared = cut * experts.top_k, rows * (experts.shared_width or 0) / tp
    # rows as experts take and give them; logits, scores and weights in fp32, and the rows widened for the router
    router = FP32 * cut * (3 * experts.number + (shape.hidden if b < FP32 else 0))
    return {
        "mlp": (copies * (2 * experts.width + 2 * shape.hidden) + 2 * shared) * b + router,
        "mlp_active": (copies * experts.width + shared) * b,
    }


def _mlp_width(shape: Shape) -> int:
    """Channels of the MLP's inner rows as its first matrix gives them."""
    return (1 if shape.paper else 2) * shape.ffn


def whole_layer(layer: dict[str, float]) -> float:
    """What a layer keeps that nothing covers."""
    # the layer's input is inside "norms", which is what the norms keep of theirs
    return sum(value for part, value in layer.items() if part != "input")


def last_layer_kept(layer: dict[str, float], config: Config) -> float:
    """What the model's last layer keeps."""
    return layer_kept(layer, config) if last_layer_is_recomputed(config) else whole_layer(layer)


def layer_kept(layer: dict[str, float], config: Config) -> float:
    """What a layer keeps that recomputation covers."""
    if config.train.recompute == "full":
        return layer["input"]
    if config.train.recompute == "selective":
        return whole_layer(layer) - layer["attention_kernel"] - layer["normed"] - layer["mlp_active"]
    return whole_layer(layer)


def layer_rebuilt(layer: dict[str, float], config: Config) -> float:
    """What recomputation brings back of one layer before its backward."""
    return whole_layer(layer) - layer_kept(layer, config)
