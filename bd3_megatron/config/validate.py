"""Rules between keys: grids, lengths, batches and schedules that cannot run are refused here, on the login node.

Each refusal names the value, the rule and the nearest legal values. Torch-free. Ranges of single keys are in the schema.
"""

from __future__ import annotations

from collections.abc import Sequence

from bd3_megatron.config.objective import axes_of, block_sizes, objective_of
from bd3_megatron.config.schema import Config, PhaseConfig
from bd3_megatron.config.validate_data import check_data
from bd3_megatron.config.validate_experts import check_experts, check_experts_grid
from bd3_megatron.config.validate_run import check_run
from bd3_megatron.errors import ConfigError, GridError, check_divides, check_multiple, counted, divisors, either, shown


def validate(config: Config, *, world_size: int | None = None) -> None:
    """Refuse a configuration that cannot run.

    Args:
        config: the whole configuration.
        world_size: ranks that are there (torchrun, SLURM); None: as many as the grid asks for.

    Raises:
        ConfigError, GridError: one sentence with value, law and remedy.
    """
    check_data(config.data)
    _check_model(config)
    _check_diffusion(config)
    check_grid(config, world_size=world_size)
    _check_train(config, data_parallel_size(config, world_size))
    check_run(config)


def data_parallel_size(config: Config, world_size: int | None = None) -> int:
    """dp of the run: given, or what the other axes leave of `world_size` (as few as can be without one).

    Raises:
        GridError: the axes do not multiply to the world size.
    """
    parallel = config.parallel
    if world_size is None:
        return parallel.replicas
    axes = f"tp={parallel.tp} x pp={parallel.pp} x cp={parallel.cp}"
    # started by torchrun or SLURM, the world is what the queue gave
    if parallel.dp is None:
        if world_size % parallel.model_ranks:
            fits = [n for n in (world_size // parallel.model_ranks * parallel.model_ranks,) if n] + [
                -(-world_size // parallel.model_ranks) * parallel.model_ranks
            ]
            raise GridError(
                f"world size {world_size} is not a multiple of {axes} = {parallel.model_ranks}; start {either(fits)} ranks."
            )
        return world_size // parallel.model_ranks
    wanted = parallel.model_ranks * parallel.dp
    if wanted != world_size:
        raise GridError(
            f"world size {world_size} does not match {axes} x dp={parallel.dp} = {wanted}; "
            f"start {counted(wanted, 'rank')} or leave parallel.dp unset."
        )
    return parallel.dp


def _check_model(config: Config) -> None:
    model = config.model
    # a given head_dim need not divide the width: Qwen3-0.6B has 16 heads of 128 on a width of 1024
    if model.head_dim is None:
        check_divides("num_heads", model.num_heads, "hidden_size", model.hidden_size)
    check_divides("num_kv_heads", model.kv_heads, "num_heads", model.num_heads)
    if model.head_width % 2:
        raise ConfigError(
            f"hidden_size={model.hidden_size} / num_heads={model.num_heads} makes heads of an odd width {model.head_width}, "
            "and rotary positions turn channels in pairs; set model.head_dim to an even number."
        )
    if model.rotary_width % 2 or model.rotary_width == 0:
        raise ConfigError(
            f"rotary_fraction={model.rotary_fraction} of heads of {model.head_width} channels is {model.rotary_width}, and "
            "positions turn channels in pairs; choose a fraction that leaves an even number."
        )
    check_experts(model)
    # the paper's code has none of the modern options
    if model.style == "paper":
        _check_paper_style(config)


def _check_paper_style(config: Config) -> None:
    model = config.model
    if model.kv_heads != model.num_heads:
        raise ConfigError(
            f"num_kv_heads={model.kv_heads} with style=paper, which has full heads; use {model.num_heads} or style=modern."
        )
    if model.qk_norm:
        raise ConfigError("qk_norm=true with style=paper, which has no norm on queries and keys; use style=modern.")
    if model.tie_embeddings:
        raise ConfigError("tie_embeddings=true with style=paper, whose head is a matrix of its own; use style=modern.")


def _check_diffusion(config: Config) -> None:
    diffusion, seq_len = config.diffusion, config.data.seq_len
    for size in block_sizes(config):
        check_multiple("seq_len", seq_len, "block_size", size)
    for interval in (diffusion.interval, *(p.interval for p in diffusion.phases)):
        # a point is a law of its own only at full masking
        if interval is not None and (interval[0] > interval[1] or interval[0] == interval[1] != 1.0):
            raise ConfigError(
                f"interval {list(interval)} is empty; give a smaller first number, for example [0.45, 0.95]."
            )
    if diffusion.views > 1 and seq_len in block_sizes(config):
        raise ConfigError(
            f"diffusion.views={diffusion.views} with block_size={seq_len}, the whole sequence: there is no clean half to "
            "share; use views=1."
        )
    _check_axes(config)
    objective_of(config).refuse(num_phases=len(diffusion.phases), searches=diffusion.search_every_steps > 0)
    for number, phase in enumerate(diffusion.phases):
        _check_phase_length(number, phase.steps, phase.tokens, last=number == len(diffusion.phases) - 1)


def _check_axes(config: Config) -> None:
    diffusion = config.diffusion
    if not objective_of(config).has_noise:
        return
    phases: tuple[PhaseConfig | None, ...] = diffusion.phases or (None,)
    for phase in phases:
        size = diffusion.block_size if phase is None else phase.block_size
        named = None if phase is None else phase.interval
        axes_of(config, phase).refuse(
            views=diffusion.views,
            resample=diffusion.resample,
            # a phase that names its interval is not searched
            searches=diffusion.search_every_steps > 0 and named is None,
            interval=named or diffusion.interval_at(size),
            num_blocks=config.data.seq_len // size,
        )


def _check_phase_length(number: int, steps: int | None, tokens: int | None, *, last: bool) -> None:
    if steps is not None and tokens is not None:
        raise ConfigError(f"phases[{number}] gives both steps={steps} and tokens={tokens}; give one.")
    if steps is None and tokens is None and not last:
        raise ConfigError(f"phases[{number}] gives neither steps nor tokens and is not the last; give one.")


def check_grid(config: Config, *, world_size: int | None = None) -> None:
    """Refuse an illegal grid (also used by launchers before a queue sees the job).

    Raises:
        GridError: the axis, the rule and the nearest legal values.
    """
    model, parallel = config.model, config.parallel
    dp = data_parallel_size(config, world_size)
    check_divides("tp", parallel.tp, "num_heads", model.num_heads, kind=GridError)
    check_divides("tp", parallel.tp, "num_kv_heads", model.kv_heads, kind=GridError)
    check_divides("tp", parallel.tp, "ffn_hidden_size", model.ffn_width, kind=GridError)
    check_multiple("vocab_multiple", model.vocab_multiple, "tp", parallel.tp, kind=GridError)
    if parallel.sequence_parallel and parallel.tp == 1:
        raise GridError("sequence_parallel=true with tp=1 cuts nothing; set parallel.tp above 1 or turn it off.")
    _check_pipeline(config, dp)
    _check_context(config)
    _check_sequence_parallel(config)
    if parallel.grad_reduce_dtype == "bf16" and (parallel.zero_stage > 1 or parallel.offload_optimizer):
        raise GridError(
            f"grad_reduce_dtype=bf16 with zero_stage={parallel.zero_stage}, offload_optimizer={parallel.offload_optimizer}: "
            "DeepSpeed reduces in fp32 there; use zero_stage=1 without offload_optimizer, or grad_reduce_dtype=fp32."
        )
    check_experts_grid(config, dp)
    # ZeRO 2 cuts gradients as they come, and each micro-batch of a pipeline adds to them
    if parallel.pp > 1 and parallel.zero_stage > 1:
        raise GridError(
            f"zero_stage={parallel.zero_stage} with pp={parallel.pp}: the pipeline needs whole gradients until its last "
            "micro-batch; use zero_stage=1, or pp=1 with a larger tp."
        )


def _check_pipeline(config: Config, dp: int) -> None:
    model, parallel, train = config.model, config.parallel, config.train
    chunks = parallel.pp * (parallel.vpp or 1)
    if parallel.layers_per_stage and (parallel.vpp or 1) > 1:
        raise GridError("layers_per_stage with vpp: interleaved chunks are of equal size; leave one of them unset.")
    if parallel.layers_per_stage:
        check_layer_split(parallel.layers_per_stage, model.num_layers, parallel.pp)
    elif chunks > model.num_layers:
        raise GridError(
            f"pp x vpp = {chunks} exceeds num_layers={model.num_layers}; use at most {model.num_layers} chunks."
        )
    if (parallel.vpp or 1) > 1:
        if parallel.pp == 1:
            raise GridError(f"vpp={parallel.vpp} with pp=1 interleaves nothing; set pp above 1 or leave vpp unset.")
        check_divides("pp x vpp", chunks, "num_layers", model.num_layers, kind=GridError)
        # otherwise the batch's own rule speaks
        if train.global_batch_size % (dp * train.micro_batch_size) == 0:
            micro = train.global_batch_size // (dp * train.micro_batch_size)
            check_multiple("micro-batches a step", micro, "pp (interleaved schedule)", parallel.pp, kind=GridError)


def check_layer_split(given: Sequence[int], num_layers: int, num_stages: int) -> None:
    """Refuse numbers of layers that are not those of the stages.

    Raises:
        GridError: of another count or sum.
    """
    if len(given) != num_stages or sum(given) != num_layers:
        raise GridError(
            f"layers_per_stage={shown(list(given))} does not split num_layers={num_layers} over {counted(num_stages, 'stage')}; "
            f"give {counted(num_stages, 'number that adds', 'numbers that add')} up to {num_layers}."
        )


def _check_context(config: Config) -> None:
    cp, seq_len = config.parallel.cp, config.data.seq_len
    if cp == 1:
        return
    if config.model.dropout > 0:
        raise GridError(
            f"cp={cp} with dropout={config.model.dropout} is not proved equal on every grid; use dropout 0."
        )
    for size in block_sizes(config):
        check_context_slices(seq_len, size, cp)


def check_context_slices(seq_len: int, block_size: int, cp: int) -> None:
    """Refuse context-parallel ranks whose slices of the sequence are not whole blocks.

    Raises:
        GridError: names the cp that cut it.
    """
    # zigzag: each rank holds one slice from the front and one from the back
    if cp == 1 or seq_len % (2 * cp * block_size) == 0:
        return
    num_blocks = seq_len // block_size
    best = [c for c in divisors(num_blocks) if num_blocks % (2 * c) == 0] or [1]
    raise GridError(
        f"cp={cp} cuts seq_len={seq_len} into slices of {seq_len / (2 * cp):g}, not a multiple of block_size={block_size}; "
        f"use cp={either(best)}."
    )


def _check_sequence_parallel(config: Config) -> None:
    parallel = config.parallel
    if not parallel.sequence_parallel:
        return
    # the pair's rows are twice as many, so what divides these divides them
    rows = config.data.seq_len // parallel.cp
    check_multiple("rows a rank (seq_len / cp)", rows, "tp (sequence_parallel)", parallel.tp, kind=GridError)


def _check_train(config: Config, dp: int) -> None:
    train = config.train
    if (train.steps is None) == (train.tokens is None):
        raise ConfigError(f"train.steps={train.steps} and train.tokens={train.tokens}: give exactly one of them.")
    check_multiple(
        "global_batch_size",
        train.global_batch_size,
        "dp x micro_batch_size",
        dp * train.micro_batch_size,
        kind=GridError,
    )
    _check_recompute(config)
    if train.spike_factor and config.parallel.zero_stage > 1:
        raise ConfigError(
            f"train.spike_factor={train.spike_factor} with zero_stage={config.parallel.zero_stage}: use ZeRO stage 1, where "
            "gradients are whole until the loss is known."
        )
    if (train.warmup_batch_size is None) != (train.batch_warmup_steps == 0):
        raise ConfigError("train.warmup_batch_size and train.batch_warmup_steps belong together; give both or neither.")
    if train.warmup_batch_size is not None:
        _check_batch_warmup(config, train.warmup_batch_size, dp)


def _check_recompute(config: Config) -> None:
    layers, most = config.train.recompute_layers, config.model.num_layers
    if layers is None:
        return
    if not config.train.recomputes:
        raise ConfigError(
            f"train.recompute_layers={layers} with recompute=none recomputes nothing; set train.recompute to selective or "
            "full, or leave recompute_layers unset."
        )
    if layers > most:
        raise ConfigError(
            f"train.recompute_layers={layers} is outside [1, {most}], the layers of the model; give how many first layers of "
            "each stage recompute, or leave it unset for all."
        )


def _check_batch_warmup(config: Config, first: int, dp: int) -> None:
    """The batch grows in multiples of its first size, so every grid must be able to cut that one."""
    train, parallel = config.train, config.parallel
    if first > train.global_batch_size:
        raise ConfigError(
            f"warmup_batch_size={first} is outside [1, {train.global_batch_size}], the global batch size; use one inside."
        )
    # interleaved schedules walk micro-batches in rounds of as many as there are stages
    interleaved = (parallel.vpp or 1) > 1
    unit = dp * train.micro_batch_size * (parallel.pp if interleaved else 1)
    factor = "dp x micro_batch_size x pp (interleaved schedule)" if interleaved else "dp x micro_batch_size"
    check_multiple("warmup_batch_size", first, factor, unit, kind=GridError)
