"""FLOPs of a training step by part: what the loss needs (MIN), what the convention credits, what runs.

Only matrix products count (a multiply-add is 2 FLOPs); element-wise work, softmax, norms and the embedding are time,
not FLOPs. `Execution` says what runs: rows skipped or not, tiles, recomputation, padded vocabulary.
Source: performance notes of the project; Megatron-LM training/training.py num_floating_point_operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from bd3_megatron.config.schema import Config
from bd3_megatron.cost.pairs import Pairs, attended_pairs, executed_pairs
from bd3_megatron.cost.shape import (
    Shape,
    last_layer_is_recomputed,
    last_layer_is_trimmed,
    pipeline_rows,
    recomputed_layers,
    shape_of,
)

RowsKind = Literal["all", "noisy", "masked"]
"""Rows of a sequence: all, those of the stream that carries loss, those that carry loss."""

PARTS = ("embedding", "projections", "attention", "mlp", "head", "recompute")


@dataclass(frozen=True)
class Flops:
    """FLOPs of one sequence by part; `recompute` is the forward run again inside the backward."""

    forward: Mapping[str, float]
    backward: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.forward.values()) + sum(self.backward.values())

    def part(self, name: str) -> float:
        """Forward and backward of one part."""
        return self.forward[name] + self.backward[name]


@dataclass(frozen=True, kw_only=True)
class Execution:
    """What a step really computes; the defaults of `execution_of` describe the engine."""

    backend: str = "structured"
    """structured, dense, flex or triton."""
    dropped_rows: int = 0
    """Last clean rows left out of every layer: S or 0."""
    last_layer: RowsKind = "all"
    """Rows of the last layer that go beyond keys and values."""
    last_pairs: RowsKind = "all"
    """Rows whose attention is computed in the last layer: backends know static rows, so masked ones alone need a loop."""
    head_rows: RowsKind = "masked"
    """Rows whose logits are computed."""
    head_forwards: int = 1
    """Times the logits are computed: 1 where their gradient is taken on the spot, 2 where the backward rebuilds them."""
    attention_backward: float = 2.5
    """Backward over forward of the attention kernel: 2.5 flash, 2 where scores are kept."""
    recompute: str = "none"
    """none, selective (attention again) or full (whole layers again)."""
    recompute_layers: int | None = None
    """Layers that do so, the last one included; None: all."""
    recompute_last: bool = True
    """The last one is among them."""
    padded: bool = True
    """Logits over the padded vocabulary."""
    tile: int = 128


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Rows of a sequence by what is done to them."""

    full: float
    """Rows of the layers before the last."""
    last_kv: float
    last: float
    head: float
    pairs: float
    last_pairs: float


def row_flops(shape: Shape) -> dict[str, float]:
    """Forward FLOPs of one row in one layer: q, kv, o, mlp of a dense layer, experts of the others."""
    return {
        # 2 D N H (q), 2 D 2 G H (k, v), 2 N H D (o), m 2 D F (MLP; m = 3 gated, 2 plain). A pair costs 4 N H (q k^T
        # and p v), the logits of a row 2 D V.
        "q": 2 * shape.hidden * shape.q_width,
        "kv": 2 * shape.hidden * shape.kv_width,
        "o": 2 * shape.q_width * shape.hidden,
        "mlp": 2 * shape.mlp_matrices * shape.hidden * shape.ffn,
        "experts": _expert_flops(shape),
    }


def _expert_flops(shape: Shape) -> int:
    """The router's matrix, and the experts that compute a row: all of them do the same work."""
    if shape.experts is None:
        return 0
    return 2 * shape.hidden * (shape.experts.number + shape.mlp_matrices * shape.active_ffn)


def convention_flops(config: Config, *, block_size: int | None = None, pairs: Pairs | None = None) -> Flops:
    """Training FLOPs of one sequence by the convention: all rows, allowed pairs, logits of the noisy half.

    Args:
        block_size: S in use; None: the configuration's first.
        pairs: mean allowed pairs of the documents in use; None: no documents.
    """
    shape = shape_of(config, block_size=block_size)
    pairs = pairs or attended_pairs(shape.length, shape.block)
    allowed = executed_pairs(shape, "structured", pairs=pairs)
    head = shape.objective.loss_stream_rows(shape.length)
    # 3 [n (k+1) L lin + n (k+1)/2 L (L+S) pair + k L head]: n layers, k noisy views, L clean tokens, S the block, lin
    # all matrices of a row, pair = 4 N H
    rows = _Rows(full=shape.rows, last_kv=shape.rows, last=shape.rows, head=head, pairs=allowed, last_pairs=allowed)
    # V without padding: Megatron counts its padded vocabulary, which differs by the padding's share of the head
    return _trained(shape, rows, shape.vocab)


def min_flops(
    config: Config, masked_fraction: float, *, block_size: int | None = None, pairs: Pairs | None = None
) -> Flops:
    """Training FLOPs of one sequence that the loss cannot do without.

    Args:
        masked_fraction: mu, share of noisy positions that are masked (ignored by the AR baseline).
        block_size, pairs: as in `convention_flops`.
    """
    shape = shape_of(config, block_size=block_size)
    pairs = pairs or attended_pairs(shape.length, shape.block)
    # clean rows that no loss row sees are not needed, wherever the loss is
    clean = shape.clean_rows - pairs.dead_rows if shape.clean_rows else 0.0
    clean_pairs = pairs.clean - pairs.dead_pairs if shape.clean_rows else 0.0
    noisy_pairs = shape.views * pairs.noisy if shape.noisy_rows else 0.0
    # for the AR baseline L less the dead rows: the last token of a document predicts nothing
    scored = shape.objective.scored_rows(shape.length, masked_fraction, dead_rows=pairs.dead_rows)
    rows = _Rows(
        # 3 [(n-1) R lin + R kv + mu k L (lin - kv) + ((n-1) A + mu k L(L+S)/2) pair + mu k L head] with mu the masked
        # share, R = (k+1) L - dead rows, A = pairs - dead pairs, kv the matrices of k and v
        full=shape.noisy_rows + clean,
        last_kv=shape.noisy_rows + clean,
        last=scored,
        head=scored,
        pairs=noisy_pairs + clean_pairs,
        last_pairs=masked_fraction * noisy_pairs if shape.noisy_rows else clean_pairs,
    )
    return _trained(shape, rows, shape.vocab)


def execution_of(config: Config, *, block_size: int | None = None, backend: str | None = None) -> Execution:
    """What the engine computes for a configuration.

    Args:
        block_size: S in use.
        backend: the attention backend that was chosen; None: the configuration's, auto read as structured.
    """
    shape = shape_of(config, block_size=block_size)
    chosen = backend or ("structured" if config.attention.backend == "auto" else config.attention.backend)
    cp = config.parallel.cp
    trimmed = last_layer_is_trimmed(config)
    return Execution(
        backend=chosen,
        last_layer="masked" if trimmed else "all",
        last_pairs="noisy" if trimmed else "all",
        # slices of context-parallel ranks are never shortened (see `pipeline_rows`)
        dropped_rows=shape.rows // cp - pipeline_rows(config, shape) if cp == 1 else 0,
        attention_backward=2.0 if chosen == "dense" else 2.5,
        recompute=config.train.recompute,
        recompute_layers=recomputed_layers(config),
        recompute_last=last_layer_is_recomputed(config),
    )


def executed_flops(
    config: Config,
    execution: Execution,
    masked_fraction: float,
    *,
    block_size: int | None = None,
    pairs: Pairs | None = None,
) -> Flops:
    """Training FLOPs of one sequence that run, over all ranks of one model replica.

    Args:
        execution: rows, backend, recomputation.
        masked_fraction: measured share of masked noisy positions.
        block_size, pairs: as in `convention_flops`.
    """
    shape = shape_of(config, block_size=block_size)
    pairs = pairs or attended_pairs(shape.length, shape.block)
    dropped = execution.dropped_rows
    run = executed_pairs(shape, execution.backend, pairs=pairs, dropped_rows=dropped, tile=execution.tile)
    full = shape.rows - dropped
    stream = shape.objective.loss_stream_rows(shape.length)
    scored = shape.objective.scored_rows(shape.length, masked_fraction, dead_rows=pairs.dead_rows)
    count = {"all": full, "noisy": stream, "masked": scored}
    last = count[execution.last_layer]
    rows = _Rows(
        full=full,
        last_kv=full,
        last=last,
        head=count[execution.head_rows],
        pairs=run,
        last_pairs=_last_pairs(shape, execution, pairs, run, scored / stream),
    )
    forward = _forward(shape, rows, shape.padded_vocab if execution.padded else shape.vocab)
    return _executed(shape, rows, forward, execution)


def _last_pairs(shape: Shape, execution: Execution, pairs: Pairs, run: float, masked_share: float) -> float:
    if execution.last_pairs == "all" or not shape.noisy_rows:
        return run
    share = 1.0 if execution.last_pairs == "noisy" else masked_share
    if execution.backend == "structured":
        return share * shape.views * pairs.noisy
    # square and tiled backends: the queries' share of the rectangle that is run
    return share * run * shape.noisy_rows / (shape.rows - execution.dropped_rows)


def _executed(shape: Shape, rows: _Rows, forward: dict[str, float], execution: Execution) -> Flops:
    backward = {part: 2 * value for part, value in forward.items()}
    # a flash backward computes the scores again: 2.5 times its forward, not 2
    backward["attention"] = execution.attention_backward * forward["attention"]
    again = {"none": (), "selective": ("attention",), "full": ("projections", "attention", "mlp")}[execution.recompute]
    covered = shape.layers if execution.recompute_layers is None else execution.recompute_layers
    last = int(execution.recompute_last and covered > 0)
    # a trimmed last layer rebuilds only the rows that it had computed
    layers = _layers(shape, rows, covered - last, last)
    backward["recompute"] = sum(layers[part] for part in again) + (execution.head_forwards - 1) * forward["head"]
    return Flops(MappingProxyType(forward), MappingProxyType(backward))


def _layers(shape: Shape, rows: _Rows, before: int, last: int) -> dict[str, float]:
    """Forward FLOPs of `before` layers of all rows and `last` (0 or 1) of the last one's."""
    row, pair = row_flops(shape), 4 * shape.q_width
    projections = before * rows.full * (row["q"] + row["kv"] + row["o"])
    projections += last * (rows.last_kv * row["kv"] + rows.last * (row["q"] + row["o"]))
    sparse, sparse_last = shape.num_sparse(0, before), last * shape.num_sparse(shape.layers - 1, shape.layers)
    dense_rows = (before - sparse) * rows.full + (last - sparse_last) * rows.last
    sparse_rows = sparse * rows.full + sparse_last * rows.last
    return {
        "projections": float(projections),
        "attention": float(pair * (before * rows.pairs + last * rows.last_pairs)),
        "mlp": float(dense_rows * row["mlp"] + sparse_rows * row["experts"]),
    }


def _forward(shape: Shape, rows: _Rows, vocab: int) -> dict[str, float]:
    return {
        # a gather and a scatter, no product; listed so that nobody looks for it
        "embedding": 0.0,
        **_layers(shape, rows, shape.layers - 1, 1),
        "head": float(2 * shape.hidden * vocab * rows.head),
        "recompute": 0.0,
    }


def _trained(shape: Shape, rows: _Rows, vocab: int) -> Flops:
    # backward is twice the forward: the gradients of both factors of every product
    forward = _forward(shape, rows, vocab)
    return Flops(MappingProxyType(forward), MappingProxyType({part: 2 * value for part, value in forward.items()}))
