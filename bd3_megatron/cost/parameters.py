"""The parameters of a model, tensor by tensor: exact counts, whole and per rank.

Decides nothing; names and shapes are those of the plain model (hf/), of which the parallel model holds the same numbers
in other tables (q, k, v stacked; gate and up stacked). Tables have the padded vocabulary where training runs and
exactly V rows where a model is exported. A tied model holds one table, except that with pp > 1 the last stage has a copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from bd3_megatron.config.schema import Config
from bd3_megatron.cost.shape import Shape, last_layer_is_trimmed, layers_per_stage, shape_of


@dataclass(frozen=True)
class Parameter:
    """One tensor: its name in the plain model, its shape, the dimension that tensor parallelism cuts (None: copied)."""

    name: str
    shape: tuple[int, ...]
    cut: int | None
    is_expert: bool = False
    """A routed expert's: on one expert-parallel rank, whole."""

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def count_per_rank(self, tp: int) -> int:
        """Elements a tensor-parallel rank holds, routed experts aside."""
        if self.is_expert:
            return 0
        return self.count if self.cut is None else self.count // tp

    @property
    def decayed(self) -> bool:
        """Matrices and tables are decayed, vectors are not."""
        return len(self.shape) > 1


@lru_cache(maxsize=256)
def layer_parameters(shape: Shape, index: int) -> tuple[Parameter, ...]:
    """Tensors of transformer layer `index` (kept, because a planner asks for the same few a million times)."""
    prefix = f"model.layers.{index}."
    hidden, ffn, half_kv = shape.hidden, shape.ffn, shape.kv_width // 2
    table = [
        *_norm(f"{prefix}input_layernorm", shape),
        # the parallel model stacks q, k, v (and gate, up): other tensors, the same numbers
        Parameter(f"{prefix}self_attn.q_proj.weight", (shape.q_width, hidden), 0),
        Parameter(f"{prefix}self_attn.k_proj.weight", (half_kv, hidden), 0),
        Parameter(f"{prefix}self_attn.v_proj.weight", (half_kv, hidden), 0),
        Parameter(f"{prefix}self_attn.o_proj.weight", (hidden, shape.q_width), 1),
    ]
    if shape.qk_norm:
        table += [Parameter(f"{prefix}self_attn.{n}_norm.weight", (shape.head_width,), None) for n in "qk"]
    table += _norm(f"{prefix}post_attention_layernorm", shape)
    if shape.num_sparse(index, index + 1):
        return (*table, *_mixture(f"{prefix}mlp.", shape))
    table += _mlp(f"{prefix}mlp.", shape, ffn)
    if shape.paper:
        table.append(Parameter(f"{prefix}mlp.up_proj.bias", (ffn,), 0))
        # added after the sum over tensor-parallel ranks, so every rank holds it whole
        table.append(Parameter(f"{prefix}mlp.down_proj.bias", (hidden,), None))
    return tuple(table)


def _mlp(prefix: str, shape: Shape, width: int, *, is_expert: bool = False) -> list[Parameter]:
    rows, columns = (None, None) if is_expert else (0, 1)
    names = ("up",) if shape.paper else ("gate", "up")
    first = [Parameter(f"{prefix}{n}_proj.weight", (width, shape.hidden), rows, is_expert) for n in names]
    return [*first, Parameter(f"{prefix}down_proj.weight", (shape.hidden, width), columns, is_expert)]


def _mixture(prefix: str, shape: Shape) -> list[Parameter]:
    experts = shape.experts
    assert experts is not None
    table = [Parameter(f"{prefix}gate.weight", (experts.number, shape.hidden), None)]
    for expert in range(experts.number):
        table += _mlp(f"{prefix}experts.{expert}.", shape, experts.width, is_expert=True)
    if experts.shared_width is not None:
        table += _mlp(f"{prefix}shared_experts.", shape, experts.shared_width)
    return table


def _norm(name: str, shape: Shape) -> list[Parameter]:
    kinds = ("weight", "bias") if shape.paper else ("weight",)
    return [Parameter(f"{name}.{kind}", (shape.hidden,), None) for kind in kinds]


def _table(name: str, shape: Shape, rows: int) -> Parameter:
    return Parameter(name, (rows, shape.hidden), 0)


def _head(shape: Shape, rows: int) -> list[Parameter]:
    bias = [Parameter("lm_head.bias", (rows,), 0)] if shape.paper else []
    return [_table("lm_head.weight", shape, rows), *bias]


def parameter_table(config: Config, *, padded: bool = False) -> list[Parameter]:
    """All tensors of the model, each once.

    Args:
        padded: tables with the padded vocabulary, as training holds them; else with V rows, as exported.
    """
    shape = shape_of(config)
    rows = shape.padded_vocab if padded else shape.vocab
    table = [_table("model.embed_tokens.weight", shape, rows)]
    for index in range(shape.layers):
        table += layer_parameters(shape, index)
    table += _norm("model.norm", shape)
    return table if shape.tied else table + _head(shape, rows)


def parameter_count(config: Config, *, padded: bool = False) -> int:
    """Numbers in the model; a tied table counts once."""
    return sum(p.count for p in parameter_table(config, padded=padded))


def active_parameter_count(config: Config) -> int:
    """Numbers that compute one row: of the routed experts only those that it chooses; a tied table counts once."""
    experts = config.model.experts
    if experts is None:
        return parameter_count(config)
    table = parameter_table(config)
    routed = sum(p.count for p in table if p.is_expert)
    # all of them are of one size
    return sum(p.count for p in table if not p.is_expert) + routed * experts.top_k // experts.number


def _outside_layers(config: Config, shape: Shape, stage: int) -> list[Parameter]:
    pp = config.parallel.pp
    table: list[Parameter] = []
    if stage == 0:
        table.append(_table("model.embed_tokens.weight", shape, shape.padded_vocab))
    if stage == pp - 1:
        table += _norm("model.norm", shape)
        if not shape.tied:
            table += _head(shape, shape.padded_vocab)
        # a tied table is needed at both ends of the pipeline: the last stage has a copy
        elif pp > 1:
            table.append(_table("lm_head.weight", shape, shape.padded_vocab))
    return table


def parameters_per_rank(config: Config, stage: int) -> int:
    """Numbers a rank of pipeline stage `stage` holds before ZeRO (every tensor-parallel rank the same)."""
    dense = _counted(config, stage, lambda p: p.count_per_rank(config.parallel.tp))
    return dense + experts_per_rank(config, stage)


def experts_per_rank(config: Config, stage: int) -> int:
    """Numbers of routed experts among them."""
    return _counted(config, stage, lambda p: p.count if p.is_expert else 0) // config.parallel.ep


def copied_per_rank(config: Config, stage: int) -> int:
    """Numbers of stage `stage` that every tensor-parallel rank holds whole: norms, biases of row-parallel matrices."""
    return _counted(config, stage, lambda p: p.count if p.cut is None and not p.is_expert else 0)


def summed_over_tp(config: Config, stage: int) -> int:
    """Of these, the numbers whose gradients tensor-parallel ranks add up under sequence parallelism: each saw its rows only."""
    copied = copied_per_rank(config, stage)
    if stage != config.parallel.pp - 1 or not last_layer_is_trimmed(config):
        return copied
    # in a trimmed last layer every rank holds the rows that carry loss, from the attention's output on
    shape = shape_of(config)
    behind = ("post_attention_layernorm.", "mlp.")
    held = [p for p in layer_parameters(shape, shape.layers - 1) if p.cut is None and not p.is_expert]
    # a router is handed its share of these rows
    whole = [p for p in held if any(name in p.name for name in behind) and ".gate." not in p.name]
    return copied - sum(p.count for p in [*whole, *_norm("model.norm", shape)])


def _counted(config: Config, stage: int, count: Callable[[Parameter], int]) -> int:
    # all layers are equal but the leading dense ones, which are on the first stage
    shape = shape_of(config)
    held = layers_per_stage(config)[stage]
    first = sum(layers_per_stage(config)[:stage])
    sparse = shape.num_sparse(first, first + held)
    last = sum(count(p) for p in layer_parameters(shape, shape.layers - 1)) if sparse else 0
    dense = sum(count(p) for p in layer_parameters(shape, 0)) if held > sparse else 0
    return (held - sparse) * dense + sparse * last + sum(count(p) for p in _outside_layers(config, shape, stage))
