"""Rules of mixtures of experts: a router that can choose, and grids on which every expert has one owner.

Contract: raises `ConfigError` or `GridError` with value, rule and remedy. Torch-free; called by `config/validate.py`.
"""

from __future__ import annotations

from bd3_megatron.config.experts import ExpertsConfig
from bd3_megatron.config.schema import Config, ModelConfig
from bd3_megatron.errors import ConfigError, GridError, check_divides, counted


def check_experts(model: ModelConfig) -> None:
    """Refuse a router that cannot choose, or experts where a style has none.

    Args:
        model: the model section.

    Raises:
        ConfigError: one sentence with value, law and remedy.
    """
    experts = model.experts
    if experts is None:
        return
    if model.style == "paper":
        raise ConfigError("model.experts with style=paper, whose MLP is dense; use style=modern.")
    if experts.leading_dense_layers >= model.num_layers:
        raise ConfigError(
            f"leading_dense_layers={experts.leading_dense_layers} leaves no layer of num_layers={model.num_layers} with "
            f"experts; use at most {model.num_layers - 1}, or leave model.experts unset."
        )
    if experts.top_k > experts.number:
        raise ConfigError(
            f"top_k={experts.top_k} exceeds number={experts.number} of experts; use at most {experts.number}."
        )
    _check_groups(experts)


def _check_groups(experts: ExpertsConfig) -> None:
    if experts.groups == 1:
        if experts.group_top_k != 1:
            raise ConfigError(f"group_top_k={experts.group_top_k} with groups=1; set groups above 1 or group_top_k=1.")
        return
    check_divides("groups", experts.groups, "number of experts", experts.number)
    size = experts.number // experts.groups
    # the score of a group is the sum of two
    if size < 2:
        raise ConfigError(f"groups={experts.groups} leaves groups of one expert; use at most {experts.number // 2}.")
    if experts.group_top_k > experts.groups:
        raise ConfigError(
            f"group_top_k={experts.group_top_k} exceeds groups={experts.groups}; use at most {experts.groups}."
        )
    if experts.top_k > experts.group_top_k * size:
        raise ConfigError(
            f"top_k={experts.top_k} exceeds the {experts.group_top_k * size} experts of group_top_k={experts.group_top_k} "
            f"groups of {size}; use at most {experts.group_top_k * size}, or more groups."
        )


def check_experts_grid(config: Config, dp: int) -> None:
    """Refuse a grid on which experts are not proved exact, or cannot be dealt out.

    Args:
        config: the run.
        dp: data-parallel ranks.

    Raises:
        GridError: one sentence with value, law and remedy.
    """
    experts, parallel = config.model.experts, config.parallel
    if experts is None:
        if parallel.ep > 1:
            raise GridError(
                f"ep={parallel.ep} without model.experts deals out nothing; use ep=1, or give model.experts."
            )
        return
    check_divides("ep", parallel.ep, "number of experts", experts.number, kind=GridError)
    check_divides("ep", parallel.ep, "tp x cp x dp", parallel.tp * parallel.cp * dp, kind=GridError)
    if experts.shared_width is not None:
        check_divides("tp", parallel.tp, "shared_width", experts.shared_width, kind=GridError)
    # without it every rank of a tensor-parallel group would send the same rows to the experts
    if parallel.tp > 1 and not parallel.sequence_parallel:
        raise GridError(
            f"tp={parallel.tp} with model.experts and sequence_parallel=false sends every row {parallel.tp} times to its "
            "experts; set parallel.sequence_parallel=true, or tp=1 and a larger ep."
        )
    if parallel.zero_stage > 1:
        raise GridError(
            f"zero_stage={parallel.zero_stage} with model.experts is not proved equal on every grid; use zero_stage=1, which "
            "shards the state of experts over the ranks that hold the same ones."
        )
    if parallel.offload_optimizer:
        raise GridError("offload_optimizer=true with model.experts is not proved; leave it off and use a larger ep.")
    _check_stages(config)


def _check_stages(config: Config) -> None:
    """Every pipeline stage needs an expert: DeepSpeed counts parameter groups alike on all of them."""
    model, parallel = config.model, config.parallel
    assert model.experts is not None
    dense = model.experts.leading_dense_layers
    if (parallel.vpp or 1) > 1:
        raise GridError(f"vpp={parallel.vpp} with model.experts is not proved equal on every grid; leave vpp unset.")
    if parallel.pp == 1 or dense == 0:
        return
    # the automatic split differs from an even one by what the head weighs, at most all of one stage
    first = parallel.layers_per_stage[0] if parallel.layers_per_stage else model.num_layers // parallel.pp
    if dense >= first:
        raise GridError(
            f"leading_dense_layers={dense} fills the first of pp={parallel.pp} stages (of {counted(first, 'layer')}), which "
            "then holds no "
            "expert; use fewer stages, or a longer first one by layers_per_stage."
        )
