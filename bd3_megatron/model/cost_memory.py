"""Bytes a device needs in training, by part, for every grid, precision, recomputation and ZeRO stage.

Decides nothing; adds up what the engine keeps. P is the numbers a rank holds, W = dp x cp the ranks that share
optimizer state, b the bytes of an activation (2 bf16, 4 fp32), t = tp, tensors per row of one sequence and layer:

    states      fp32: weights 4P, gradients 4P, master 4P/W, Adam 8P/W, EMA 4P/W (gradients 4P/W with
                ZeRO 2 and 3, weights 4P/W with 3)
                bf16: weights 2P, fp32 gradients 4P, the rest as above
    norms       RMSNorm keeps its input in fp32, the normed rows and its output; LayerNorm input in fp32 and output
    attention   stacked q, k, v (its v is a view), rotated q and k, output of the kernel, output again in row order, one
                fp32 statistic per head
    mlp         gated: gate and up 2F, product F, silu and up again 2F unless fused; plain: input and output of gelu, 2F
    recompute   full: the layer's input only, plus one whole layer while it is rebuilt; selective: without the
                kernel's own output and statistics, plus one layer's

With tensor parallelism q, k, v, MLP are cut by t; rows of norms by t too under sequence parallelism. A pipeline stage
holds as many micro-batches as its schedule keeps in flight. The peak is the larger of two moments: the last forward
before the first backward, and the optimizer's step, when activations are gone and Adam's temporaries are there.
Does not know: the allocator's fragmentation, the CUDA context, kernels' workspaces; add `plan_machines` reserves for
those. Source: megatron-core 0.16 and DeepSpeed 0.19 as read and as counted by hooks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from bd3_megatron.config.schema import Config
from bd3_megatron.model.cost_parameters import layer_parameters, parameters_per_rank
from bd3_megatron.model.cost_shape import (
    Shape,
    expected_masked_fraction,
    last_layer_is_trimmed,
    layers_per_stage,
    micro_batches,
    pipeline_rows,
    scored_rows,
    shape_of,
    zero_shards,
    zero_stage,
)

FP32 = 4
ADAM_TEMPORARIES = 1
"""fp32 copies of a shard that torch's foreach AdamW makes on top of its state while it steps."""


@dataclass(frozen=True, kw_only=True)
class Habits:
    """What arithmetic must be told about the engine; the defaults describe it on a GPU."""

    precision: str = "bf16"
    """bf16 or fp32."""
    fused: bool = True
    """Activation of the MLP fused (GPU); on CPU megatron's fusions are off."""
    head_chunk_bytes: int = 32 * 2**20
    """fp32 logits of the rows that exist at a time; under bf16 half as much again in low precision."""
    reduce_bucket_elements: int = 50_000_000
    """Elements of a ZeRO-2/3 reduction bucket."""

    @property
    def element_bytes(self) -> int:
        return 2 if self.precision == "bf16" else FP32


def habits_on(device: str, config: Config, *, reduce_bucket_elements: int = 50_000_000) -> Habits:
    """Habits on "cuda" or "cpu" at the configuration's precision."""
    auto = "bf16" if device == "cuda" else "fp32"
    precision = auto if config.train.precision == "auto" else config.train.precision
    return Habits(precision=precision, fused=device == "cuda", reduce_bucket_elements=reduce_bucket_elements)


@dataclass(frozen=True, kw_only=True)
class MemoryBytes:
    """Bytes of one device by part."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    """fp32 master weights and Adam's two moments of the own shard."""
    ema: int = 0
    activations: int = 0
    head: int = 0
    """Chunk of logits, gathered masked rows, the head's own gradient table."""
    working: int = 0
    """Gradients of one layer's activations, and under recomputation that layer rebuilt."""
    buffers: int = 0
    """ZeRO buckets, gathered layers of ZeRO-3, context-parallel keys and values."""
    step_temporaries: int = 0
    """Alive in the optimizer's step, when activations, head and working are not."""
    host: int = 0
    """In host memory (offloaded optimizer); not part of the device's total."""

    @property
    def states(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.ema

    @property
    def peak(self) -> int:
        """Most bytes alive at one time."""
        return self.states + self.buffers + max(self.activations + self.head + self.working, self.step_temporaries)

    def parts(self) -> dict[str, int]:
        """{part: bytes} in the order of the fields."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def memory_per_device(config: Config, habits: Habits | None = None, *, block_size: int | None = None) -> MemoryBytes:
    """Memory of the fullest pipeline stage.

    Args:
        config: a validated configuration whose dp is set.
        habits: of the engine; None: on a GPU.
        block_size: S in use.
    """
    stages = [memory_of_stage(config, stage, habits, block_size=block_size) for stage in _fullest_candidates(config)]
    return max(stages, key=lambda m: m.peak)


def _fullest_candidates(config: Config) -> list[int]:
    """First and last stage, and of those between the earliest of each size: later ones hold fewer micro-batches."""
    layers, last = layers_per_stage(config), config.parallel.pp - 1
    earliest = {layers[stage]: stage for stage in range(last - 1, 0, -1)}
    return sorted({0, last, *earliest.values()})


def memory_of_stage(
    config: Config, stage: int, habits: Habits | None = None, *, block_size: int | None = None
) -> MemoryBytes:
    """Memory of one rank of pipeline stage `stage`."""
    habits = habits or habits_on("cuda", config)
    shape = shape_of(config, block_size=block_size)
    states = _states(config, stage, habits)
    layer = layer_activation_bytes(config, shape, habits)
    layers = layers_per_stage(config)[stage]
    chunks = chunks_in_flight(config, stage)
    held = layers / (config.parallel.vpp or 1) * chunks
    activations = held * _kept(layer, config) + _stage_inputs(config, shape, habits, stage)
    last = stage == config.parallel.pp - 1
    if last:
        # of an interleaved stage's chunks in flight one in vpp holds the last layer
        once = chunks / (config.parallel.vpp or 1)
        activations -= once * (_kept(layer, config) - _kept(last_layer_activation_bytes(config, shape, habits), config))
    return MemoryBytes(
        parameters=states.parameters,
        gradients=states.gradients,
        optimizer=states.optimizer,
        ema=states.ema,
        host=states.host,
        activations=round(activations),
        head=_head(config, shape, habits) if last else 0,
        working=round(_working(config, shape, habits, layer)),
        buffers=_buffers(config, shape, habits, stage),
        step_temporaries=0 if config.parallel.offload_optimizer else ADAM_TEMPORARIES * states.ema_shard,
    )


@dataclass(frozen=True)
class _States:
    parameters: int
    gradients: int
    optimizer: int
    ema: int
    host: int
    ema_shard: int


def _states(config: Config, stage: int, habits: Habits) -> _States:
    count, shards, zero = parameters_per_rank(config, stage), zero_shards(config), zero_stage(config)
    shard = -(-count // shards)
    weights = habits.element_bytes * (shard if zero == 3 else count)
    gradients = FP32 * (count if zero == 1 else shard)
    adam = 3 * FP32 * shard
    ema = FP32 * shard if config.optim.ema_decay > 0 else 0
    if config.parallel.offload_optimizer:
        return _States(weights, gradients, 0, 0, adam + ema, FP32 * shard)
    return _States(weights, gradients, adam, ema, 0, FP32 * shard)


def chunks_in_flight(config: Config, stage: int) -> int:
    """Model chunks x micro-batches whose activations a stage holds at its fullest moment (1F1B, or interleaved)."""
    pp, vpp, total = config.parallel.pp, config.parallel.vpp or 1, micro_batches(config)
    if vpp == 1:
        return min(pp - stage, total)
    warm_up = (pp - stage - 1) * 2 + (vpp - 1) * pp
    return min(warm_up + 1, total * vpp)


def _row_cut(config: Config) -> int:
    return config.parallel.tp if config.parallel.sequence_parallel else 1


def layer_activation_bytes(config: Config, shape: Shape, habits: Habits) -> dict[str, float]:
    """Bytes one layer keeps for its backward, for one micro-batch, by part ("input" is the layer's input alone)."""
    b, tp = habits.element_bytes, config.parallel.tp
    rows = pipeline_rows(config, shape) * config.train.micro_batch_size
    cut = rows / _row_cut(config)
    q, kv = shape.q_width / tp, shape.kv_width / tp
    return {
        "input": cut * shape.hidden * b,
        "norms": cut * 2 * _norm_bytes(shape.hidden, b, gated=not shape.paper),
        "qk_norms": rows * (q + kv / 2) * _qk_norm_bytes(b) if shape.qk_norm else 0.0,
        "qkv": rows * (q + kv + q + kv / 2) * b,
        "rotary": _rotary(config, shape, b),
        "attention_kernel": rows * (q * b + FP32 * shape.heads / tp),
        "attention_output": rows * q * b,
        "mlp": rows * _mlp_elements(shape, habits) / tp * b,
        "dropout": 2 * cut * shape.hidden * (1 if habits.fused else b) if shape.dropout else 0.0,
    }


def last_layer_activation_bytes(config: Config, shape: Shape, habits: Habits) -> dict[str, float]:
    """The same of the model's last layer where it computes keys and values of all rows, the rest of scored rows only."""
    if not last_layer_is_trimmed(config):
        return layer_activation_bytes(config, shape, habits)
    b, tp, mbs = habits.element_bytes, config.parallel.tp, config.train.micro_batch_size
    rows = pipeline_rows(config, shape) * mbs
    stream = (shape.noisy_rows or shape.length) // config.parallel.cp * mbs
    scored = scored_rows(config, shape, expected_masked_fraction(config))
    q, kv = shape.q_width / tp, shape.kv_width / tp
    # the cut of the stacked weight into queries and the rest is a copy
    weights = shape.hidden * (q + kv) * b
    return {
        "input": rows * shape.hidden * b,
        "norms": (rows + scored) * _norm_bytes(shape.hidden, b, gated=not shape.paper),
        "qk_norms": (scored * q + rows * kv / 2) * _qk_norm_bytes(b) if shape.qk_norm else 0.0,
        "qkv": (scored * shape.hidden + stream * q + rows * 1.5 * kv) * b + weights,
        "rotary": _rotary(config, shape, b) / 2,
        "attention_kernel": stream * (q * b + FP32 * shape.heads / tp),
        "attention_output": scored * q * b,
        "mlp": scored * _mlp_elements(shape, habits) / tp * b,
        "dropout": 2 * scored * shape.hidden * (1 if habits.fused else b) if shape.dropout else 0.0,
    }


def _rotary(config: Config, shape: Shape, b: int) -> float:
    """Cosines and sines for q and for k, in one copy for all sequences."""
    return 4.0 * pipeline_rows(config, shape) * shape.head_width * b


def _norm_bytes(width: int, b: int, *, gated: bool) -> int:
    """Kept by one norm over `width` channels of a row: fp32 input, normed rows (RMSNorm), output."""
    return width * (FP32 + (2 if gated else 1) * b)


def _qk_norm_bytes(b: int) -> int:
    # in fp32 the input is the stacked q, k, v that is kept anyway
    return FP32 + b if b < FP32 else b


def _mlp_elements(shape: Shape, habits: Habits) -> int:
    return (2 if shape.paper else 3 if habits.fused else 5) * shape.ffn


def _whole(layer: dict[str, float]) -> float:
    # the layer's input is inside "norms": the first norm keeps it
    return sum(value for part, value in layer.items() if part != "input")


def _kept(layer: dict[str, float], config: Config) -> float:
    if config.train.recompute == "full":
        return layer["input"]
    if config.train.recompute == "selective":
        return _whole(layer) - layer["attention_kernel"]
    return _whole(layer)


def _stage_inputs(config: Config, shape: Shape, habits: Habits, stage: int) -> float:
    """What a stage receives and keeps to send its gradient back; the schedule drops its own output after sending."""
    if stage == 0:
        return 0.0
    rows = pipeline_rows(config, shape) * config.train.micro_batch_size / _row_cut(config)
    return rows * shape.hidden * habits.element_bytes * chunks_in_flight(config, stage)


def _working(config: Config, shape: Shape, habits: Habits, layer: dict[str, float]) -> float:
    rows = pipeline_rows(config, shape) * config.train.micro_batch_size
    # the widest moment of a backward: gradients of the MLP's inner tensors beside those of the residual stream
    inner = (3 if not shape.paper else 2) * shape.ffn / config.parallel.tp
    gradients = rows * (inner + 2 * shape.hidden / _row_cut(config)) * habits.element_bytes
    if config.train.recompute == "full":
        return gradients + _whole(layer)
    return gradients + (layer["attention_kernel"] if config.train.recompute == "selective" else 0.0)


def _head(config: Config, shape: Shape, habits: Habits) -> int:
    tp, mbs = config.parallel.tp, config.train.micro_batch_size
    scored = scored_rows(config, shape, expected_masked_fraction(config))
    vocab = shape.padded_vocab // tp
    low = habits.element_bytes if habits.element_bytes < FP32 else 0
    chunk_rows = min(max(1, habits.head_chunk_bytes // (FP32 * vocab)), scored)
    chunk = chunk_rows * vocab * (FP32 + low)
    rows = pipeline_rows(config, shape) * mbs
    normed = scored if last_layer_is_trimmed(config) else rows / _row_cut(config)
    # its output is gone once the scored rows are picked from it
    kept = _norm_bytes(shape.hidden, habits.element_bytes, gated=not shape.paper) - shape.hidden * habits.element_bytes
    final_norm = normed * kept
    # masked rows and their gradient; under sequence parallelism all rows are gathered first
    gathered = 2 * scored * shape.hidden * habits.element_bytes
    gathered += rows * shape.hidden * habits.element_bytes if config.parallel.sequence_parallel else 0
    # fp32 from forward to backward; a chunk's share of it in low precision beside it
    weight_gradient = vocab * shape.hidden * (FP32 + low)
    return round(chunk + final_norm + gathered + weight_gradient)


def _buffers(config: Config, shape: Shape, habits: Habits, stage: int) -> int:
    total = 0.0
    zero, count = zero_stage(config), parameters_per_rank(config, stage)
    if zero >= 2:
        total += 2 * FP32 * min(habits.reduce_bucket_elements, count)
    if zero == 3:
        tp = config.parallel.tp
        layer = sum(p.count_per_rank(tp) for p in layer_parameters(shape, 0))
        widest = max(layer, shape.padded_vocab * shape.hidden // tp)
        # the layer that computes and the one being gathered
        total += 2 * widest * habits.element_bytes
    if config.parallel.cp > 1:
        rows = shape.length * config.train.micro_batch_size
        total += 2 * rows * shape.kv_width / config.parallel.tp * habits.element_bytes
    return round(total)
