"""How long a step takes on a machine: a roofline of what runs, plus what moves, plus what waits.

One micro-batch takes t_s seconds on pipeline stage s (`_micro_batch`); a step takes T = m t_max + bubble + pp + dp +
optimizer + fixed (`_step`), with m micro-batches and the slowest stage t_max. Every number derives from cost/, the machine
and the constants, whose factors calibration fits to measured runs. Not modelled: stragglers, checkpoint stalls, data
loading, congestion, thermal limits. Torch-free.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from bd3_megatron.config.schema import Config
from bd3_megatron.cost.assumptions import FP32, EngineAssumptions, engine_assumptions
from bd3_megatron.cost.flops import Flops, executed_flops, execution_of
from bd3_megatron.cost.parameters import experts_per_rank, parameters_per_rank
from bd3_megatron.cost.shape import (
    Shape,
    data_parallel,
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
from bd3_megatron.cost.traffic import Collective, Transfer, small_collectives, transfers
from bd3_megatron.planner.constants import Constants, constants_for
from bd3_megatron.planner.machines import Machine
from bd3_megatron.planner.peaks import TERA


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step by part; the parts add up to `total`."""

    matrix: float = 0.0
    attention: float = 0.0
    head: float = 0.0
    elementwise: float = 0.0
    overhead: float = 0.0
    tp: float = 0.0
    cp: float = 0.0
    ep: float = 0.0
    pp: float = 0.0
    bubble: float = 0.0
    dp: float = 0.0
    optimizer: float = 0.0
    contention: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.parts().values())

    @property
    def compute(self) -> float:
        return self.matrix + self.attention + self.head + self.elementwise

    @property
    def communication(self) -> float:
        return self.tp + self.cp + self.ep + self.pp + self.dp

    def parts(self) -> dict[str, float]:
        """{part: seconds} in the order of the fields."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class _Setting:
    config: Config
    machine: Machine
    constants: Constants
    engine: EngineAssumptions
    shape: Shape
    flops: Flops
    whole: Flops
    """As if every layer computed all its rows."""
    backend: str
    """Of attention."""
    masked: float
    """Expected share of noisy positions that are masked."""

    @property
    def rate(self) -> float:
        """Peak FLOP/s of what one rank computes on."""
        return self.machine.peak_tflops * TERA

    @property
    def memory_rate(self) -> float:
        """Bytes a second that element-wise work reads and writes."""
        return self.machine.memory_bytes_per_second * self.constants.memory_efficiency

    @property
    def ranks(self) -> int:
        """Of the whole grid."""
        return self.config.parallel.model_ranks * data_parallel(self.config)


def step_time(config: Config, machine: Machine, constants: Constants | None = None) -> StepTime:
    """Predict one optimizer step.

    Args:
        config: a validated configuration whose dp is set.
        machine: device and links.
        constants: fitted, or None for the machine's defaults.
    """
    shape = shape_of(config)
    ran, masked = execution_of(config), expected_masked_fraction(config)
    flops = executed_flops(config, ran, masked)
    whole = executed_flops(config, replace(ran, last_layer="all", last_pairs="all"), masked)
    engine = engine_assumptions(machine.device_type, config)
    # one object, because every part below needs most of it
    at = _Setting(
        config, machine, constants or constants_for(machine), engine, shape, flops, whole, ran.backend, masked
    )
    pp, layers = config.parallel.pp, layers_per_stage(config)
    # stages of equal size between the first and the last are equal: a pipeline of 64 is three kinds
    keys = [(layers[s], s == 0, s == pp - 1) for s in range(pp)]
    micro = {key: _micro_batch(at, keys.index(key)) for key in set(keys)}
    return _step(at, [micro[key] for key in keys])


def _micro_batch(at: _Setting, stage: int) -> StepTime:
    """Forward and backward of one micro-batch on one rank of a stage."""
    config, parallel, c = at.config, at.config.parallel, at.constants
    layers = layers_per_stage(config)[stage]
    last = stage == parallel.pp - 1
    # t_s = matrix + attention + head + elementwise + overhead + tp + cp + ep, forward and backward. FLOPs are counted a
    # sequence; tensor and context parallelism divide them evenly. Collectives of tp, cp and ep are not hidden, and experts are
    # taken to be loaded evenly.
    share = config.train.micro_batch_size / (parallel.tp * parallel.cp)
    work = {part: share * _stage_flops(at, part, layers, last=last) for part in ("projections", "mlp", "attention")}
    lines, m = transfers(config, stage, at.engine), micro_batches(config)
    collectives = {axis: sum(_seconds(at, t) for t in lines if t.axis == axis) / m for axis in ("tp", "cp", "ep")}
    # crowding slows what computes, not what waits
    factor = c.compute_factor * c.shared_factor ** _crowding(at)
    compute = StepTime(
        matrix=factor * _matrix(at, work["projections"] + work["mlp"], layers),
        attention=factor * (_attention(at, work["attention"]) + _rectangles(at, layers, last=last)),
        head=factor * _head(at, share) if last else 0.0,
        elementwise=factor * _elementwise(at, layers, last=last),
        overhead=c.overhead_factor * c.layer_overhead_seconds * layers,
    )
    # the ranks of tp, cp and ep meet in every layer; those of dp and pp once a step or micro-batch
    waiting = {axis: compute.total * _waiting(c, getattr(parallel, axis)) for axis in collectives}
    return replace(compute, **{axis: collectives[axis] + waiting[axis] for axis in collectives})


def _waiting(constants: Constants, ranks: int) -> float:
    """Share of a layer's time that ranks which meet in it wait: the largest of `ranks` uniform draws less their mean."""
    return constants.layer_jitter * (ranks - 1) / (2 * (ranks + 1))


def _crowding(at: _Setting) -> float:
    """Share of a shared host's other cores that other ranks keep busy, 0 to 1; stages of a pipeline are idle in its bubble."""
    config, m = at.config, micro_batches(at.config) * (at.config.parallel.vpp or 1)
    busy = at.ranks * m / (m + config.parallel.pp - 1)
    return min(1.0, max(0.0, busy - 1) / (at.machine.cores - 1)) if at.machine.cores > 1 else 0.0


def _stage_flops(at: _Setting, part: str, layers: int, *, last: bool) -> float:
    """Forward FLOPs of a part in one sequence on a stage; the model's last layer may be lighter than the others."""
    # the difference between all layers computed whole and the trimmed count is what the last layer saves
    before = at.whole.forward[part] / at.shape.layers
    final = at.flops.forward[part] - (at.shape.layers - 1) * before
    return layers * before - (before - final if last else 0.0)


def _again(config: Config, part: str) -> float:
    """Share of this part's forward that recomputation runs a second time."""
    # selective leaves matrices, and of the element-wise work residual sums and rotation
    share = {"attention": 1.0, "elementwise": 0.8}.get(part, 0.0) if config.train.recompute == "selective" else 1.0
    return share * recomputed_layers(config) / config.model.num_layers


def _matrix(at: _Setting, forward: float, layers: int) -> float:
    passes = 3 + _again(at.config, "matrix")
    by_rate = passes * forward / (at.rate * at.constants.matrix_efficiency)
    shape, tp, b = at.shape, at.config.parallel.tp, at.engine.element_bytes
    # every expert of a rank has rows, so that all of its weights are read
    inner = shape.ffn / tp if shape.experts is None else _held_width(at)
    numbers = shape.hidden * ((2 * shape.q_width + shape.kv_width) / tp + shape.mlp_matrices * inner)
    rows = pipeline_rows(at.config, shape) * at.config.train.micro_batch_size
    touched = numbers + rows * (4 * shape.hidden + (2 * shape.q_width + shape.kv_width + 3 * shape.active_ffn) / tp)
    by_memory = passes * layers * touched * b / at.machine.memory_bytes_per_second
    return max(by_rate, by_memory)


def _held_width(at: _Setting) -> float:
    """Inner MLP channels of a layer with experts whose weights one rank holds."""
    experts, parallel = at.shape.experts, at.config.parallel
    assert experts is not None
    return experts.number * experts.width / parallel.ep + (experts.shared_width or 0) / parallel.tp


def _attention(at: _Setting, forward: float) -> float:
    c, part = at.constants, "attention"
    backward = forward * at.flops.backward[part] / at.flops.forward[part]
    passes = 1 + _again(at.config, part)
    # exponentials cost as much for a head of 32 columns as for one of 128, whose products take four times as long
    narrow = 1 + c.softmax_columns / at.shape.head_width
    return narrow * (passes * forward / c.attention_forward + backward / c.attention_backward) / at.rate


def _rectangles(at: _Setting, layers: int, *, last: bool) -> float:
    """Seconds of the structured backend that are not arithmetic: what lies before a block is halved log2(L / S) times, and
    every halving is a call and a merge of many small rectangles; each block of both streams is one more."""
    shape, parallel, c = at.shape, at.config.parallel, at.constants
    if at.backend != "structured" or shape.rows == shape.length:
        return 0.0
    blocks = shape.length / shape.block
    number = 3 * blocks * at.config.train.micro_batch_size * shape.heads / parallel.tp / parallel.cp
    # a trimmed last layer asks for its noisy rows only
    counted = layers - (0.5 if last and last_layer_is_trimmed(at.config) else 0.0)
    return counted * (c.halving_seconds * math.log2(blocks) + c.rectangle_seconds * number)


def _head(at: _Setting, share: float) -> float:
    """Products of the scored rows with the table and back, and the passes of the softmax over their logits."""
    # the softmax reads and writes its logits several times, in fp32 whatever the weights are
    logits = scored_rows(at.config, at.shape, at.masked) * at.shape.padded_vocab / at.config.parallel.tp * FP32
    by_rate = at.flops.part("head") * share / (at.rate * at.constants.matrix_efficiency)
    return by_rate + at.constants.logits_passes * logits / at.memory_rate


def _elementwise(at: _Setting, layers: int, *, last: bool) -> float:
    """Bytes read and written: two norms and two residual sums of D, rotation of q and k, the MLP's activation."""
    shape, tp = at.shape, at.config.parallel.tp
    cut = tp if at.config.parallel.sequence_parallel else 1
    rows = pipeline_rows(at.config, shape) * at.config.train.micro_batch_size
    rotation = 2 * (shape.q_width + shape.kv_width / 2) / tp
    activation = (2 if shape.paper else 3) * shape.active_ffn / tp
    # the first norm of a trimmed last layer, a fifth of its traffic, still sees every row
    trimmed = last and last_layer_is_trimmed(at.config)
    scored = scored_rows(at.config, shape, at.masked) / rows if trimmed else 1.0
    counted = layers - (0.8 * (1 - scored) if trimmed else 0.0)
    # sorted, unsorted, weighted and added up: a row of D is written and read for each of its experts
    sorting = 0 if shape.experts is None else 6 * shape.experts.top_k * shape.hidden / cut
    elements = rows * (10 * shape.hidden / cut + rotation + activation + sorting)
    passes = 3 + _again(at.config, "elementwise")
    return passes * counted * elements * at.engine.element_bytes / at.memory_rate


def _step(at: _Setting, by_stage: list[StepTime]) -> StepTime:
    config, m = at.config, micro_batches(at.config)
    # T = m t_max + bubble + pp (sends that the schedule does not hide) + dp (gradients reduced, weights gathered, less what
    # compute hides) + optimizer + fixed: in a pipeline's steady state every stage waits for the slowest
    slowest = max(by_stage, key=lambda t: t.total)
    vpp = config.parallel.vpp or 1
    lines = transfers(config, 0, at.engine)
    # filling and draining: every other stage is passed once, in vpp smaller pieces
    rest = sum(t.total for t in by_stage) - slowest.total
    scaled = {name: m * value for name, value in slowest.parts().items()}
    scaled["overhead"] += at.constants.overhead_factor * at.constants.step_overhead_seconds
    step = StepTime(
        **{
            **scaled,
            "pp": _pipeline(at, lines),
            "bubble": rest / vpp,
            "dp": _data(at, lines, m * slowest.compute),
            "optimizer": _optimizer(at),
        }
    )
    if not at.machine.cores:
        return step
    return _shared(at, step, m * sum(t.total for t in by_stage) / len(by_stage))


def _shared(at: _Setting, step: StepTime, busy: float) -> StepTime:
    """On shared cores a step takes at least all ranks' busy time divided by the cores."""
    # messages and the optimizer keep cores busy as well as compute does
    fixed = step.dp + step.pp + step.optimizer + at.constants.overhead_factor * at.constants.step_overhead_seconds
    least = at.ranks * (busy + fixed) / at.machine.cores
    missing = max(0.0, least - step.total)
    return StepTime(**{**step.parts(), "contention": missing})


def _pipeline(at: _Setting, lines: list[Transfer]) -> float:
    """Sends of the slowest stage; the interleaved schedule overlaps them."""
    lines = [t for t in lines if t.axis == "pp"]
    vpp = at.config.parallel.vpp or 1
    sends = sum(_seconds(at, t) for t in lines if t.collective is Collective.SEND)
    other = sum(_seconds(at, t) for t in lines if t.collective is not Collective.SEND)
    # a middle stage also sends back: twice what the first one does
    exposed = 1.0 if vpp == 1 else 1 - at.constants.hidden_share
    return 2 * exposed * sends + other


def _data(at: _Setting, lines: list[Transfer], compute: float) -> float:
    total = sum(_seconds(at, t) for t in lines if t.axis == "dp")
    # collectives of a few numbers cost their latency only
    small = small_collectives(at.config)["dp"] * at.machine.inter_node_latency_seconds
    if zero_stage(at.config) > 1:
        return _exposed(at, total, compute) + small
    if not leaves_early(at.config):
        return total + small
    # gradients leave during the last micro-batch's backward, two thirds of its time; weights are gathered after the update
    sums = sum(_seconds(at, t) for t in lines if t.axis == "dp" and t.collective is Collective.REDUCE)
    return total - sums + _exposed(at, sums, 2 / 3 * compute / micro_batches(at.config)) + small


def leaves_early(config: Config) -> bool:
    """True where ZeRO 1 sums gradients during the last backward (engine/sharded_gradients)."""
    return config.parallel.overlap_grad_reduce and not config.parallel.offload_optimizer


def _exposed(at: _Setting, seconds: float, behind: float) -> float:
    """What compute does not hide of communication that runs beside it."""
    # overlapped traffic slows the compute beside it, so a share is never hidden however long the compute is
    return max(seconds * (1 - at.constants.hidden_share), seconds - behind)


def _optimizer(at: _Setting) -> float:
    """Adam and the average over the own shard, and one pass over its gradients for their norm."""
    experts = experts_per_rank(at.config, 0)
    dense = parameters_per_rank(at.config, 0) - experts
    owned = dense / zero_shards(at.config) + experts / expert_shards(at.config)
    ema = 2 if at.config.optim.ema_decay > 0 else 0
    touched = owned * FP32 * (at.constants.optimizer_passes + ema + 1)
    return at.constants.optimizer_factor * touched / at.memory_rate


def _seconds(at: _Setting, transfer: Transfer) -> float:
    """Of all calls: latency of a ring's steps plus its bytes on the slowest link it crosses."""
    rate, latency = _link(at, transfer)
    steps = transfer.collective.ring_steps(transfer.ranks)
    c = at.constants
    # gloo gathers at a third of the rate of its all-reduces; NCCL's efficiencies are equal by default
    is_gather = transfer.collective in (Collective.ALL_GATHER, Collective.REDUCE_SCATTER, Collective.ALL_TO_ALL)
    efficiency = c.gather_efficiency if is_gather else c.link_efficiency
    wire = transfer.wire_bytes / (rate * efficiency)
    return c.communication_factor * (transfer.calls * steps * latency + wire)


def _link(at: _Setting, transfer: Transfer) -> tuple[float, float]:
    """(bytes a second, seconds of latency) of the links a group's ring uses."""
    parallel, machine = at.config.parallel, at.machine
    # neighbouring ranks lie in one node, and tp is the fastest axis, then cp, dp, pp: a group lies inside a node if its
    # stride times its size fits there
    strides = {"tp": 1, "ep": 1, "cp": parallel.tp, "dp": parallel.tp, "pp": parallel.tp * zero_shards(at.config)}
    stride = strides[transfer.axis]
    here = max(1, machine.gpus_per_node // stride)
    if transfer.ranks <= here:
        return machine.intra_node_bytes_per_second, machine.intra_node_latency_seconds
    # members of one node share the ring's crossing: each has a network card of its own
    members = 1 if transfer.collective is Collective.SEND else min(here, transfer.ranks)
    between = min(machine.intra_node_bytes_per_second, members * machine.inter_node_bytes_per_second)
    return between, machine.inter_node_latency_seconds
