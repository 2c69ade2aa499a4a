"""Bytes a device needs in training, by part, for every grid, precision, recomputation and ZeRO stage.

Decides nothing; adds up what the engine keeps. Does not know: the allocator's fragmentation, the CUDA context, kernels'
workspaces; add planner/machines reserves for those. In comments P is the numbers a rank holds, W = dp x cp the ranks
that share optimizer state.
Source: megatron-core 0.16 and DeepSpeed 0.19 as read and as counted by hooks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from bd3_megatron.config.schema import Config
from bd3_megatron.cost.activations import (
    last_layer_activation_bytes,
    last_layer_kept,
    layer_activation_bytes,
    layer_kept,
    layer_rebuilt,
    rotary_bytes,
    row_cut,
    whole_layer,
)
from bd3_megatron.cost.assumptions import FP32, EngineAssumptions, engine_assumptions
from bd3_megatron.cost.parameters import experts_per_rank, layer_parameters, parameters_per_rank
from bd3_megatron.cost.shape import (
    Shape,
    expected_masked_fraction,
    expert_shards,
    last_layer_is_trimmed,
    layers_per_stage,
    micro_batches,
    pipeline_rows,
    recomputed_layers,
    scored_rows,
    shape_of,
    zero_shards,
    zero_stage,
)


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
    """What a backward has alive beyond activations and head: gradients of one layer's, and that layer where rebuilt."""
    buffers: int = 0
    """ZeRO buckets, gathered layers of ZeRO-3, context-parallel keys and values; alive while forwards and backwards run."""
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
        # two moments: the first backward, and the optimizer's step, when activations and buckets are gone again
        passes = self.activations + self.head + self.working + self.buffers
        return self.states + max(passes, self.step_temporaries)

    def parts(self) -> dict[str, int]:
        """{part: bytes} in the order of the fields."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def memory_per_device(
    config: Config, engine: EngineAssumptions | None = None, *, block_size: int | None = None
) -> MemoryBytes:
    """Memory of the fullest pipeline stage.

    Args:
        config: a validated configuration whose dp is set.
        engine: assumptions about it; None: on a GPU.
        block_size: S in use.
    """
    stages = [memory_of_stage(config, stage, engine, block_size=block_size) for stage in _fullest_candidates(config)]
    return max(stages, key=lambda m: m.peak)


def _fullest_candidates(config: Config) -> list[int]:
    """First and last stage, and of those between the earliest of each size: later ones hold fewer micro-batches."""
    layers, last = layers_per_stage(config), config.parallel.pp - 1
    earliest = {layers[stage]: stage for stage in range(last - 1, 0, -1)}
    return sorted({0, last, *earliest.values()})


def memory_of_stage(
    config: Config, stage: int, engine: EngineAssumptions | None = None, *, block_size: int | None = None
) -> MemoryBytes:
    """Memory of one rank of pipeline stage `stage`."""
    engine = engine or engine_assumptions("cuda", config)
    shape = shape_of(config, block_size=block_size)
    states = _states(config, stage, engine)
    layer = layer_activation_bytes(config, shape, engine)
    layers = layers_per_stage(config)[stage]
    chunks = chunks_in_flight(config, stage)
    held = layers / (config.parallel.vpp or 1) * chunks
    share = recomputed_layers(config, stage) / layers
    activations = held * (share * layer_kept(layer, config) + (1 - share) * whole_layer(layer))
    activations += _stage_inputs(config, shape, engine, stage) + chunks * rotary_bytes(
        config, shape, engine.element_bytes
    )
    last = stage == config.parallel.pp - 1
    working = _gradients(config, shape, engine, scored=False) + (layer_rebuilt(layer, config) if share else 0.0)
    head = _Head(0.0, 0.0)
    if last:
        short = last_layer_activation_bytes(config, shape, engine)
        # of an interleaved stage's chunks in flight one in vpp holds the last layer
        once = chunks / (config.parallel.vpp or 1)
        activations -= once * (last_layer_kept(layer, config) - last_layer_kept(short, config))
        head = _head(config, shape, engine)
        working = _beyond_the_head(config, shape, engine, layers=(layer, short), head=head)
    return MemoryBytes(
        parameters=states.parameters,
        gradients=states.gradients,
        optimizer=states.optimizer,
        ema=states.ema,
        host=states.host,
        activations=round(activations),
        head=round(head.chunk + head.rest),
        working=round(working),
        buffers=_buffers(config, shape, engine, stage),
        # ZeRO 2 and 3 flatten the shard's gradients for the optimizer; ZeRO 1 has them flat
        step_temporaries=0 if config.parallel.offload_optimizer or zero_stage(config) == 1 else states.shard,
    )


@dataclass(frozen=True)
class _States:
    parameters: int
    gradients: int
    optimizer: int
    ema: int
    host: int
    shard: int
    """fp32 bytes of one number each of the own shard."""


def _states(config: Config, stage: int, engine: EngineAssumptions) -> _States:
    count, shards, zero = parameters_per_rank(config, stage), zero_shards(config), zero_stage(config)
    # fp32 runs: weights 4P, gradients 4P, master 4P/W, Adam 8P/W, EMA 4P/W (gradients 4P/W with ZeRO 2 and 3 or one
    # micro-batch, weights 4P/W with 3); bf16 runs: weights 2P, fp32 gradients, the rest alike. Experts have ranks of
    # their own to share with.
    experts = experts_per_rank(config, stage)
    shard = -(-(count - experts) // shards) + -(-experts // expert_shards(config))
    weights = engine.element_bytes * (shard if zero == 3 else count)
    # ZeRO 1 adds up micro-batches' gradients of the whole model; a single one's leave as they come, a few at a time
    whole = zero == 1 and (micro_batches(config) > 1 or config.parallel.offload_optimizer)
    gradients = FP32 * (count if whole else shard)
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
    # megatron's interleaved warm-up: two micro-batches for each stage behind this one, pp for each further chunk
    warm_up = (pp - stage - 1) * 2 + (vpp - 1) * pp
    return min(warm_up + 1, total * vpp)


def _stage_inputs(config: Config, shape: Shape, engine: EngineAssumptions, stage: int) -> float:
    """What a stage receives and keeps to send its gradient back; the schedule drops its own output after sending."""
    if stage == 0:
        return 0.0
    rows = pipeline_rows(config, shape) * config.train.micro_batch_size / row_cut(config)
    return rows * shape.hidden * engine.element_bytes * chunks_in_flight(config, stage)


def _gradients(config: Config, shape: Shape, engine: EngineAssumptions, *, scored: bool) -> float:
    """The widest moment of a layer's backward: gradients of the MLP's inner tensors beside those of the residual stream."""
    if scored:
        rows = cut = scored_rows(config, shape, expected_masked_fraction(config))
    else:
        rows = pipeline_rows(config, shape) * config.train.micro_batch_size
        cut = rows / row_cut(config)
    inner = (3 if not shape.paper else 2) * (shape.active_ffn if shape.experts else shape.ffn) / config.parallel.tp
    return (rows * inner + 2 * cut * shape.hidden) * engine.element_bytes


def _beyond_the_head(
    config: Config,
    shape: Shape,
    engine: EngineAssumptions,
    *,
    layers: tuple[dict[str, float], dict[str, float]],
    head: _Head,
) -> float:
    """What the fullest backward on the last stage has alive beyond all activations and the whole head, 0 or more.

    The head's chunk is gone when a backward begins. A last layer of scored rows works on few of them, and is gone
    itself when the first layer of all rows is at work.
    """
    layer, short = layers
    again = recomputed_layers(config, config.parallel.pp - 1)
    whole = _gradients(config, shape, engine, scored=False) + (layer_rebuilt(layer, config) if again else 0.0)
    if not last_layer_is_trimmed(config):
        return max(0.0, whole - head.chunk)
    keeps = last_layer_kept(short, config)
    first = _gradients(config, shape, engine, scored=True) + whole_layer(short) - keeps
    return max(0.0, first - head.chunk, whole - head.chunk - head.rows - keeps)


@dataclass(frozen=True)
class _Head:
    chunk: float
    """Logits that exist at a time."""
    rest: float
    """Rows and the weight gradient, until the last layer's backward."""
    rows: float = 0.0
    """Of them the rows."""


def _head(config: Config, shape: Shape, engine: EngineAssumptions) -> _Head:
    tp, mbs = config.parallel.tp, config.train.micro_batch_size
    scored = scored_rows(config, shape, expected_masked_fraction(config))
    vocab = shape.padded_vocab // tp
    low = engine.element_bytes if engine.element_bytes < FP32 else 0
    chunk_rows = min(max(1, engine.head_chunk_bytes // (FP32 * vocab)), scored)
    chunk = chunk_rows * vocab * (FP32 + low)
    rows = pipeline_rows(config, shape) * mbs
    trimmed = last_layer_is_trimmed(config)
    normed = scored if trimmed else rows / row_cut(config)
    # its output is gone once the scored rows are picked from it
    final_norm = normed * shape.hidden * engine.element_bytes
    # masked rows and their gradient; under sequence parallelism an untrimmed last layer's rows are all gathered first
    gathered = 2 * scored * shape.hidden * engine.element_bytes
    gathered += rows * shape.hidden * engine.element_bytes if config.parallel.sequence_parallel and not trimmed else 0
    # fp32 from forward to backward; on CPU a low-precision table is widened beside it
    weight_gradient = vocab * shape.hidden * (FP32 + (FP32 if low and not engine.fused else 0))
    return _Head(chunk, final_norm + gathered + weight_gradient, final_norm + gathered)


def _buffers(config: Config, shape: Shape, engine: EngineAssumptions, stage: int) -> int:
    total = 0.0
    zero, count = zero_stage(config), parameters_per_rank(config, stage)
    if zero >= 2:
        # a second one fills while the first travels, which bf16 runs ask for
        buckets = 2 if zero == 3 or engine.precision == "bf16" else 1
        total += buckets * FP32 * min(engine.reduce_bucket_elements, count)
    if zero == 3:
        tp = config.parallel.tp
        layer = sum(p.count_per_rank(tp) for p in layer_parameters(shape, 0))
        widest = max(layer, shape.padded_vocab * shape.hidden // tp)
        # the layer that computes and the one being gathered
        total += 2 * widest * engine.element_bytes
    if config.parallel.cp > 1:
        rows = shape.length * config.train.micro_batch_size
        total += 2 * rows * shape.kv_width / config.parallel.tp * engine.element_bytes
    return round(total)
