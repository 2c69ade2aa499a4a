"""The numbers of a run that every count starts from, read off its configuration.

Decides: how many streams, rows and table rows a sequence has; the expected masked fraction of a noise schedule; which
layers a pipeline stage holds when the configuration leaves that open. Refuses a configuration whose vocabulary is still
to be read from data. Knows nothing of FLOPs or bytes. Torch-free: launchers import it on a login node.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bd3_megatron.config.experts import ExpertsConfig
from bd3_megatron.config.objective import objective_of
from bd3_megatron.config.schema import Config
from bd3_megatron.cost.stages import split_layers
from bd3_megatron.diffusion.axes import ObjectiveAxes
from bd3_megatron.diffusion.objective import Objective
from bd3_megatron.errors import ConfigError


# Letters in this folder: L clean tokens of a sample, S diffusion block, D hidden, N heads, G key/value heads, H head
# width, F MLP width, V vocabulary. Rows a sequence: block diffusion (S < L) views * L noisy and L clean ones; masked
# diffusion (S = L) views * L noisy ones, for its clean stream is never seen; next-token prediction (S = 1, causal) L
# clean ones.
@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one sequence and one model; every count is arithmetic on these."""

    objective: Objective
    """At the block size of the phase being counted."""
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_width: int
    ffn: int
    mlp_matrices: int
    """3 with a gate (modern), 2 without (paper)."""
    vocab: int
    """V: ids that exist, mask id included. What the loss needs."""
    padded_vocab: int
    """Rows of the tables, V rounded up to model.vocab_multiple. What runs."""
    length: int
    paper: bool
    qk_norm: bool
    tied: bool
    dropout: float
    experts: ExpertsConfig | None = None

    @property
    def block(self) -> int:
        """S."""
        return self.objective.block_size

    @property
    def views(self) -> int:
        return self.objective.views

    def num_sparse(self, first: int, last: int) -> int:
        """Layers with experts among layers `first` to `last` - 1."""
        if self.experts is None:
            return 0
        return max(0, last - max(first, self.experts.leading_dense_layers))

    @property
    def active_ffn(self) -> int:
        """Inner MLP channels that compute a row in a layer of the kind that most layers are."""
        if self.experts is None:
            return self.ffn
        return self.experts.top_k * self.experts.width + (self.experts.shared_width or 0)

    @property
    def noisy_rows(self) -> int:
        """Noisy rows of a sequence before any is skipped."""
        return self.objective.noisy_rows(self.length)

    @property
    def clean_rows(self) -> int:
        """Clean rows of a sequence before any is skipped."""
        return self.objective.clean_rows(self.length)

    @property
    def rows(self) -> int:
        return self.noisy_rows + self.clean_rows

    @property
    def q_width(self) -> int:
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        """Columns of K and V together."""
        return 2 * self.kv_heads * self.head_width


def shape_of(config: Config, *, block_size: int | None = None) -> Shape:
    """Sizes of a configuration.

    Args:
        config: a validated configuration with model.vocab_size set.
        block_size: S of the phase being counted; None: the first phase, or diffusion.block_size.

    Raises:
        ConfigError: model.vocab_size is None, so tables and logits have no size yet.
    """
    model, data = config.model, config.data
    if model.vocab_size is None:
        raise ConfigError(
            "model.vocab_size is not set, and without prepared data nothing can be counted; "
            "set it to the number of ids, mask included (for example model.vocab_size=50258)."
        )
    return Shape(
        objective=objective_of(config, block_size=block_size),
        layers=model.num_layers,
        hidden=model.hidden_size,
        heads=model.num_heads,
        kv_heads=model.kv_heads,
        head_width=model.head_width,
        ffn=model.ffn_width,
        mlp_matrices=2 if model.style == "paper" else 3,
        vocab=model.vocab_size,
        padded_vocab=-(-model.vocab_size // model.vocab_multiple) * model.vocab_multiple,
        length=data.seq_len,
        paper=model.style == "paper",
        qk_norm=model.qk_norm,
        tied=model.tie_embeddings,
        dropout=model.dropout,
        experts=model.experts,
    )


def expected_masked_fraction(
    config: Config,
    *,
    interval: tuple[float, float] | None = None,
    block_size: int | None = None,
    axes: ObjectiveAxes | None = None,
) -> float:
    """Mean share of a noisy stream's positions that are masked, over t uniform in the interval (AR: 1, every row predicts).

    Closed integrals of the mask probabilities t, 1 - cos(pi t / 2), t^2, sqrt(t), log2(1 + t).

    Args:
        interval: (beta, omega) in use, when a search has moved it; None: the configuration's, of the first phase.
        block_size, axes: of the phase in force; None: of the first.
    """
    first, diffusion = objective_of(config), config.diffusion
    objective = first.at(first.block_size if block_size is None else block_size, axes=axes)
    if not objective.has_noise:
        return 1.0
    phase = diffusion.phases[0].interval if diffusion.phases else None
    beta, omega = interval or phase or diffusion.interval_at(objective.block_size)
    if objective.axes.pairing == "complementary":
        # whatever the first view of a pair masks, the second masks the rest
        probability = 0.5
    elif objective.axes.positions == "exact":
        probability = _mean_rounded(diffusion.noise_schedule, beta, omega, objective)
    else:
        probability = _mean_probability(diffusion.noise_schedule, beta, omega)
    if diffusion.never_mask_first:
        # the other L - 1 positions are masked as the schedule says
        probability *= (config.data.seq_len - 1) / config.data.seq_len
    return probability


def _mean_probability(name: str, beta: float, omega: float) -> float:
    if beta == omega:
        # an interval of no width: the quotient below would be 0 / 0
        return _probability(name, beta)
    antiderivative = {
        "loglinear": lambda t: t * t / 2,
        "cosine": lambda t: t - 2 / math.pi * math.sin(math.pi * t / 2),
        "square": lambda t: t**3 / 3,
        "sqrt": lambda t: 2 / 3 * t**1.5,
        "log": lambda t: ((1 + t) * math.log(1 + t) - t) / math.log(2),
    }[name]
    return (antiderivative(omega) - antiderivative(beta)) / (omega - beta)


def _mean_rounded(name: str, beta: float, omega: float, objective: Objective) -> float:
    """Mean share of a block's tokens where round(p S) of them are masked, by the midpoint rule."""
    size, least, nodes = objective.block_size, objective.axes.least_masked, 1000
    levels = (beta + (omega - beta) * (node + 0.5) / nodes for node in range(nodes))
    return sum(max(least, math.floor(_probability(name, t) * size + 0.5)) for t in levels) / (nodes * size)


def _probability(name: str, t: float) -> float:
    return {
        "loglinear": t,
        "cosine": 1 - math.cos(math.pi * t / 2),
        "square": t * t,
        "sqrt": math.sqrt(t),
        "log": math.log2(1 + t),
    }[name]


def data_parallel(config: Config) -> int:
    """dp of the grid; as few as can be where the configuration leaves it to the world size."""
    return config.parallel.replicas


def micro_batches(config: Config) -> int:
    """Forward passes a rank makes in one optimizer step."""
    train = config.train
    return train.global_batch_size // (data_parallel(config) * train.micro_batch_size)


def zero_shards(config: Config) -> int:
    """Ranks that share one optimizer state: data-parallel times context-parallel."""
    return data_parallel(config) * config.parallel.cp


def expert_shards(config: Config) -> int:
    """Ranks that share one optimizer state of experts: those of a pipeline stage that hold the same ones."""
    return zero_shards(config) * config.parallel.tp // config.parallel.ep


def zero_stage(config: Config) -> int:
    """Stage that runs: 0 means 1."""
    return max(1, config.parallel.zero_stage)


def layers_per_stage(config: Config) -> tuple[int, ...]:
    """Transformer layers of each pipeline stage, first to last, summed over its interleaved chunks.

    Raises:
        GridError: the stages cannot be filled.
    """
    pp = config.parallel.pp
    chunks = layers_per_chunk(config)
    return tuple(sum(chunks[stage::pp]) for stage in range(pp))


def layers_per_chunk(config: Config) -> tuple[int, ...]:
    """Transformer layers of each chunk of the pipeline in order of depth; chunk c of stage s is number c x pp + s.

    Raises:
        GridError: the stages cannot be filled.
    """
    parallel = config.parallel
    pp, vpp = parallel.pp, parallel.vpp or 1
    return split_layers(
        config.model.num_layers,
        pp * vpp,
        head_layers=head_in_layers(config) if pp > 1 else 0.0,
        given=parallel.layers_per_stage if pp > 1 else (),
        interleaved=vpp > 1,
    )


def recomputed_layers(config: Config, stage: int | None = None) -> int:
    """Layers that compute again in their backward: of every chunk the first train.recompute_layers.

    Args:
        stage: of one pipeline stage; None: of all.
    """
    if config.train.recompute == "none":
        return 0
    chunks, most = layers_per_chunk(config), config.train.recompute_layers
    held = chunks if stage is None else chunks[stage :: config.parallel.pp]
    return sum(held) if most is None else sum(min(layers, most) for layers in held)


def last_layer_is_recomputed(config: Config) -> bool:
    """True where the first train.recompute_layers of the last chunk are all of it."""
    most = config.train.recompute_layers
    return config.train.recompute != "none" and (most is None or layers_per_chunk(config)[-1] <= most)


def head_in_layers(config: Config) -> float:
    """Work of the head in units of one layer's: half of the noisy rows reach it, a layer works on 2 L rows."""
    model = config.model
    # matrices alone: attention's pairs are left out, so that the head weighs a little too much at long lengths
    attention = model.hidden_size * model.head_width * (2 * model.num_heads + 2 * model.kv_heads)
    width = model.ffn_width
    if model.experts is not None:
        width = model.experts.top_k * model.experts.width + (model.experts.shared_width or 0)
    layer = attention + (2 if model.style == "paper" else 3) * model.hidden_size * width
    padded = -(-(model.vocab_size or 0) // model.vocab_multiple) * model.vocab_multiple
    return 0.5 * model.hidden_size * padded / (2 * layer)


def last_layer_is_trimmed(config: Config) -> bool:
    """True where the last layer computes only rows that carry loss, beyond everybody's keys and values."""
    return config.train.skip_dead_rows


def scored_rows(config: Config, shape: Shape, masked_fraction: float) -> float:
    """Rows of a micro-batch on one context-parallel rank that carry loss (the baseline: all but the last token)."""
    return (
        shape.objective.scored_rows(shape.length, masked_fraction) * config.train.micro_batch_size / config.parallel.cp
    )


def pipeline_rows(config: Config, shape: Shape) -> int:
    """Rows of one sequence that pass from layer to layer on one context-parallel rank, before sequence parallelism.

    The last clean block is dropped where train.skip_dead_rows allows: cp must be 1 (a zigzag slice has no short end),
    and under sequence parallelism tp must divide what is left.
    """
    parallel = config.parallel
    if parallel.cp > 1:
        return shape.rows // parallel.cp
    # where the clean stream carries the loss itself its last block is not dropped, only left out of the head
    if not (config.train.skip_dead_rows and shape.noisy_rows and shape.clean_rows):
        return shape.rows
    short = shape.rows - shape.block
    return shape.rows if parallel.sequence_parallel and short % parallel.tp else short
