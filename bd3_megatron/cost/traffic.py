"""Bytes the axes of a grid move in one optimizer step: every collective of the engine as a line with its formula.

Decides the unit: a collective's *size* is the bytes of its larger tensor on one rank. That is what a wrapper around the
collective counts, whatever ring or tree carries it; `wire_bytes` turns it into what a ring puts on a link.
Does not list collectives of a few numbers (token counts, norms, loss logs): they cost latency, see `small_collectives`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

from bd3_megatron.config.schema import Config
from bd3_megatron.cost.assumptions import FP32, EngineAssumptions, engine_assumptions
from bd3_megatron.cost.parameters import experts_per_rank, parameters_per_rank, summed_over_tp
from bd3_megatron.cost.shape import (
    Shape,
    expected_masked_fraction,
    expert_shards,
    last_layer_is_recomputed,
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

AXES = ("tp", "pp", "cp", "dp")
EXPERT_AXIS = "ep"
"""Of models with experts, beside the others; its ranks lie on tp, cp and dp."""
COUNT_BYTES = 8
"""Of a number of rows."""
LOAD_LEVELS = 10
"""Noise levels by which loads are counted."""


class Collective(Enum):
    """How tensors move between the ranks of a group."""

    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    REDUCE = "reduce"
    """A sum that one rank gets; over the buckets of a step as much as a reduce-scatter of them all."""
    SEND = "send"
    ALL_TO_ALL = "all_to_all"
    """Rows to the ranks of their experts; the size is what one rank sends at even load, its own part included."""

    def ring_steps(self, ranks: int) -> int:
        """Messages one after another when it runs as a ring."""
        # an all-reduce is a reduce-scatter and an all-gather
        return {Collective.ALL_REDUCE: 2 * (ranks - 1), Collective.SEND: 1}.get(self, ranks - 1)

    def ring_share(self, ranks: int) -> float:
        """Of the larger tensor, what one rank puts on its link."""
        return 1.0 if self is Collective.SEND else self.ring_steps(ranks) / ranks


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Equal collectives of one rank in one step."""

    axis: str
    collective: Collective
    what: str
    ranks: int
    """Ranks of the group."""
    calls: int
    # all-reduce, broadcast: the tensor; all-gather: its output; reduce-scatter: its input; send: what is sent
    size_bytes: float
    """Of one call: the larger tensor of this rank."""

    @property
    def total_bytes(self) -> float:
        return self.calls * self.size_bytes

    @property
    def wire_bytes(self) -> float:
        """Bytes one rank puts on its link when the collective runs as a ring."""
        return self.total_bytes * self.collective.ring_share(self.ranks)


@dataclass(frozen=True)
class _Stage:
    """What the lines below share."""

    config: Config
    shape: Shape
    engine: EngineAssumptions
    index: int
    layers: int
    micro: int
    masked: float

    @property
    def first(self) -> bool:
        return self.index == 0

    @property
    def last(self) -> bool:
        return self.index == self.config.parallel.pp - 1

    @property
    def alone(self) -> tuple[int, int]:
        """(layers whose MLP is experts without a shared one, and of them the trimmed last one): tensor-parallel ranks do not
        meet in them, but in a trimmed one to deal its rows out and collect them."""
        experts = self.shape.experts
        if experts is None or experts.shared_width is not None:
            return 0, 0
        return self.sparse

    @property
    def sparse(self) -> tuple[int, int]:
        """(layers with experts, and of them the trimmed last one)."""
        first = sum(layers_per_stage(self.config)[: self.index])
        trimmed = int(self.last and last_layer_is_trimmed(self.config))
        return self.shape.num_sparse(first, first + self.layers), trimmed * int(self.shape.experts is not None)

    @property
    def rows_bytes(self) -> float:
        """Activations of all rows of a micro-batch, whole."""
        rows = pipeline_rows(self.config, self.shape) * self.config.train.micro_batch_size
        return rows * self.shape.hidden * self.engine.element_bytes

    @property
    def scored(self) -> float:
        """Rows of a micro-batch that carry loss here."""
        return scored_rows(self.config, self.shape, self.masked)

    @property
    def scored_bytes(self) -> float:
        return self.scored * self.shape.hidden * self.engine.element_bytes


def transfers(
    config: Config,
    stage: int = 0,
    engine: EngineAssumptions | None = None,
    *,
    masked_fraction: float | None = None,
    block_size: int | None = None,
) -> list[Transfer]:
    """Collectives of one rank of pipeline stage `stage` in one optimizer step, axes of size 1 left out.

    Args:
        config: a validated configuration whose dp is set.
        engine: assumptions about it; None: on a GPU.
        masked_fraction: measured share of masked noisy positions; None: the schedule's expectation.
        block_size: S in use.
    """
    masked = expected_masked_fraction(config) if masked_fraction is None else masked_fraction
    shape = shape_of(config, block_size=block_size)
    engine, layers = engine or engine_assumptions("cuda", config), layers_per_stage(config)[stage]
    at = _Stage(config, shape, engine, stage, layers, micro_batches(config), masked)
    tensor = _sequence_parallel(at) if config.parallel.sequence_parallel else _tensor_parallel(at)
    lines = [*tensor, *_head(at), *_pipeline(at), *_context(at), *_data(at), *_experts(at)]
    return [line for line in lines if line.ranks > 1 and line.calls > 0]


def bytes_by_axis(
    config: Config,
    stage: int = 0,
    engine: EngineAssumptions | None = None,
    *,
    masked_fraction: float | None = None,
    block_size: int | None = None,
) -> dict[str, int]:
    """{axis: bytes handed to its collectives by one rank of `stage` in one step}; see `transfers` for the arguments."""
    lines = transfers(config, stage, engine, masked_fraction=masked_fraction, block_size=block_size)
    axes = AXES if config.model.experts is None else (*AXES, EXPERT_AXIS)
    return {axis: round(sum(line.total_bytes for line in lines if line.axis == axis)) for axis in axes}


def small_collectives(config: Config) -> Mapping[str, int]:
    """Collectives of a few numbers a step, by axis: gradient norm, token count, loss sums of the log."""
    parallel = config.parallel
    return {
        "tp": 2 if parallel.tp > 1 else 0,
        "pp": 2 if parallel.pp > 1 else 0,
        "cp": 0,
        "dp": 3 if zero_shards(config) > 1 else 0,
    }


def _line(at: _Stage, axis: str, collective: Collective, what: str, calls: int, size: float) -> Transfer:
    parallel = at.config.parallel
    sizes = {"tp": parallel.tp, "pp": parallel.pp, "cp": parallel.cp, "dp": zero_shards(at.config), "ep": parallel.ep}
    ranks = sizes[axis]
    return Transfer(axis=axis, collective=collective, what=what, ranks=ranks, calls=calls, size_bytes=size)


def _again(at: _Stage, *kinds: str) -> tuple[int, int]:
    """(layers, and of them the trimmed last one) whose forward's collectives run again in the backward."""
    if at.config.train.recompute not in kinds:
        return 0, 0
    short = at.last and last_layer_is_trimmed(at.config) and last_layer_is_recomputed(at.config)
    return recomputed_layers(at.config, at.index), int(short)


def _tensor_parallel(at: _Stage) -> list[Transfer]:
    # 4 all-reduces of [R, mbs, D] a layer and micro-batch, R rows of a sequence on a rank: attention and MLP, forward
    # and backward (6 with full recomputation). In a trimmed last layer all but one are of scored rows.
    trimmed = int(at.last and last_layer_is_trimmed(at.config))
    layers, short = (at.layers - trimmed) * at.micro, trimmed * at.micro
    # megatron rebuilds the whole layer, its last all-reduce included
    covered, covered_short = _again(at, "full")
    forward = 2 * (layers + (covered - covered_short) * at.micro)
    forward_short = 2 * (short + covered_short * at.micro)
    lines = [
        _line(at, "tp", Collective.ALL_REDUCE, "attention and MLP outputs", forward, at.rows_bytes),
        _line(
            at, "tp", Collective.ALL_REDUCE, "gradients of attention and MLP inputs", 2 * layers + short, at.rows_bytes
        ),
        _line(
            at, "tp", Collective.ALL_REDUCE, "outputs of the last layer's scored rows", forward_short, at.scored_bytes
        ),
        _line(at, "tp", Collective.ALL_REDUCE, "gradients of its MLP input", short, at.scored_bytes),
    ]
    if at.first:
        lines.append(_line(at, "tp", Collective.ALL_REDUCE, "embedded rows", at.micro, at.rows_bytes))
    # a rank norms its own heads only, so the gradients of the shared scales are partial
    if at.shape.qk_norm:
        size = 2 * at.layers * at.shape.head_width * FP32
        lines.append(_line(at, "tp", Collective.ALL_REDUCE, "gradients of q and k norms", 1, size))
    return lines


def _sequence_parallel(at: _Stage) -> list[Transfer]:
    # 6 all-gathers and 4 reduce-scatters a layer instead: a column-parallel backward gathers its input again. Norms
    # and row-parallel biases see a part of the rows, so their gradients are summed once a step. A trimmed last layer
    # gathers its normed rows once and keeps them; behind it, all-reduces of scored rows.
    config = at.config
    trimmed = int(at.last and last_layer_is_trimmed(config))
    layers, short = (at.layers - trimmed) * at.micro, trimmed * at.micro
    covered, covered_short = _again(at, "full")
    forward = 2 * (layers + (covered - covered_short) * at.micro)
    # Experts take rows as sequence parallelism cuts them; a shared expert is cut as an MLP is. In a trimmed last layer the
    # collection of its experts' rows is what the sum of an MLP's outputs would be, and a shared expert comes on top.
    alone, alone_short = at.alone
    unmet = (alone - alone_short) * at.micro
    unmet_again = min(alone, max(0, covered - (at.layers - alone))) - covered_short * alone_short
    forward -= unmet + unmet_again * at.micro
    both = at.sparse[1] * int(at.shape.experts is not None and at.shape.experts.shared_width is not None)
    # selective recomputation gathers anew with the norm
    gathered_short = short + _again(at, "full", "selective")[1] * at.micro
    lines = [
        _line(
            at, "tp", Collective.ALL_GATHER, "rows before attention and MLP", forward + gathered_short, at.rows_bytes
        ),
        _line(at, "tp", Collective.REDUCE_SCATTER, "outputs of attention and MLP", forward, at.rows_bytes),
        _line(
            at, "tp", Collective.ALL_GATHER, "rows again and output gradients", 4 * layers - 2 * unmet, at.rows_bytes
        ),
        _line(
            at,
            "tp",
            Collective.REDUCE_SCATTER,
            "gradients of attention and MLP inputs",
            2 * layers + short - unmet,
            at.rows_bytes,
        ),
        _line(
            at,
            "tp",
            Collective.ALL_REDUCE,
            "scored rows into the last layer and its outputs",
            (3 + both) * (short + covered_short * at.micro),
            at.scored_bytes,
        ),
        _line(at, "tp", Collective.ALL_REDUCE, "gradients of its MLP input", (1 + both) * short, at.scored_bytes),
        _line(
            at,
            "tp",
            Collective.ALL_REDUCE,
            "gradients of norms and row biases",
            1,
            FP32 * summed_over_tp(config, at.index),
        ),
    ]
    if at.first:
        lines.append(_line(at, "tp", Collective.REDUCE_SCATTER, "embedded rows", at.micro, at.rows_bytes))
        lines.append(_line(at, "tp", Collective.ALL_GATHER, "gradients of embedded rows", at.micro, at.rows_bytes))
    return lines


def _head(at: _Stage) -> list[Transfer]:
    """Logits of masked rows over a cut vocabulary: hidden rows out and back, three fp32 statistics a row."""
    if not at.last:
        return []
    lines = [
        _line(at, "tp", Collective.ALL_REDUCE, "largest logit", at.micro, at.scored * FP32),
        _line(at, "tp", Collective.ALL_REDUCE, "sum of exponentials and target logit", at.micro, 2 * at.scored * FP32),
    ]
    if at.config.parallel.sequence_parallel and not last_layer_is_trimmed(at.config):
        lines.append(_line(at, "tp", Collective.ALL_GATHER, "rows before the head", at.micro, at.rows_bytes))
        lines.append(
            _line(at, "tp", Collective.REDUCE_SCATTER, "gradients of rows before the head", at.micro, at.rows_bytes)
        )
        return lines
    lines.append(_line(at, "tp", Collective.ALL_REDUCE, "gradients of scored rows", at.micro, at.scored_bytes))
    return lines


def _pipeline(at: _Stage) -> list[Transfer]:
    parallel = at.config.parallel
    vpp = parallel.vpp or 1
    size = at.rows_bytes / (parallel.tp if parallel.sequence_parallel else 1)
    # an interleaved ring also passes from the last stage to the first, between chunks
    forward = vpp if not at.last else vpp - 1
    backward = vpp if not at.first else vpp - 1
    lines = [
        _line(at, "pp", Collective.SEND, "rows to the next stage", forward * at.micro, size),
        _line(at, "pp", Collective.SEND, "gradients to the stage before", backward * at.micro, size),
    ]
    # first and last stage both hold a tied table and add up its gradients
    if at.shape.tied and parallel.pp > 1 and (at.first or at.last):
        table = at.shape.padded_vocab * at.shape.hidden // parallel.tp * FP32
        what = "gradient of the tied table"
        lines.append(
            Transfer(axis="pp", collective=Collective.ALL_REDUCE, what=what, ranks=2, calls=1, size_bytes=table)
        )
    return lines


def _context(at: _Stage) -> list[Transfer]:
    if not at.shape.clean_rows:
        return []
    tokens = at.shape.length * at.config.train.micro_batch_size
    # clean keys and values of all L positions; noisy rows never cross ranks
    size = tokens * at.shape.kv_width // at.config.parallel.tp * at.engine.element_bytes
    # attention is run again by selective recomputation too
    layers = at.layers * at.micro
    gathers = layers + _again(at, "selective", "full")[0] * at.micro
    return [
        _line(at, "cp", Collective.ALL_GATHER, "clean keys and values", gathers, size),
        _line(at, "cp", Collective.REDUCE_SCATTER, "gradients of clean keys and values", layers, size),
    ]


def _data(at: _Stage) -> list[Transfer]:
    # gradients travel in fp32 whatever the precision of the weights, where nothing else is asked for
    experts = experts_per_rank(at.config, at.index)
    zero, count = zero_stage(at.config), parameters_per_rank(at.config, at.index) - experts
    weights = count * at.engine.element_bytes
    if zero == 1 and not at.config.parallel.offload_optimizer:
        wire = 2 if at.config.parallel.grad_reduce_dtype == "bf16" else FP32
        lines = [
            _line(at, "dp", Collective.REDUCE, "gradients", 1, count * wire),
            _line(at, "dp", Collective.ALL_GATHER, "updated weights", 1, weights),
        ]
        if at.shape.experts is None:
            return lines
        routed = [
            _line(at, "dp", Collective.REDUCE, "gradients of experts", 1, experts * wire),
            _line(at, "dp", Collective.ALL_GATHER, "updated weights of experts", 1, experts * at.engine.element_bytes),
            _line(at, "dp", Collective.ALL_REDUCE, "loads of experts", 1, _load_bytes(at)),
        ]
        # only ranks with the same experts share their state
        return lines + [replace(line, ranks=expert_shards(at.config)) for line in routed]
    # DeepSpeed all-reduces whole buckets at stage 2 and with an offloaded optimizer, and lets every rank keep its part
    if zero < 3:
        return [
            _line(at, "dp", Collective.ALL_REDUCE, "gradients", 1 if zero == 1 else at.micro, count * FP32),
            _line(at, "dp", Collective.ALL_GATHER, "updated weights", 1, weights),
        ]
    # gathered weights stay for the backward while they are fewer than stage3_max_live_parameters (two buckets)
    passes = 1 if count <= 2 * at.engine.reduce_bucket_elements else 2
    return [
        _line(at, "dp", Collective.REDUCE_SCATTER, "gradients", at.micro, count * FP32),
        _line(at, "dp", Collective.ALL_GATHER, "weights before each pass", passes * at.micro, weights),
    ]


def _experts(at: _Stage) -> list[Transfer]:
    """Every row to its experts and back, forwards and backwards; how many rows come is asked for first."""
    experts = at.shape.experts
    if experts is None:
        return []
    sparse, trimmed = at.sparse
    covered, covered_short = _again(at, "full")
    # leading layers are dense, and those that compute again come first
    again = min(sparse, max(0, covered - (at.layers - sparse)))
    whole, short = (sparse - trimmed) * at.micro, trimmed * at.micro
    whole_again, short_again = (again - covered_short * trimmed) * at.micro, covered_short * trimmed * at.micro
    # a row goes to each of its experts, and tensor-parallel ranks have each their own rows
    copies = experts.top_k / at.config.parallel.tp
    exchanges = 4 * whole + 2 * whole_again, 4 * short + 2 * short_again
    counts = whole + short + whole_again + short_again
    exchange = Collective.ALL_TO_ALL
    return [
        _line(at, EXPERT_AXIS, exchange, "rows to experts and back", exchanges[0], copies * at.rows_bytes),
        _line(at, EXPERT_AXIS, exchange, "scored rows to experts and back", exchanges[1], copies * at.scored_bytes),
        _line(at, EXPERT_AXIS, exchange, "numbers of rows", counts, COUNT_BYTES * experts.number),
        _line(at, EXPERT_AXIS, Collective.ALL_REDUCE, "loads of experts", 1, _load_bytes(at)),
    ]


def _load_bytes(at: _Stage) -> float:
    """Of a step's loads: of all counted rows, and of those that carry loss by tenths of noise levels."""
    experts = at.shape.experts
    return 0 if experts is None else at.sparse[0] * (1 + LOAD_LEVELS) * experts.number * COUNT_BYTES
