"""Initial weights that do not depend on the grid: each parameter is drawn whole from a generator seeded by its global
name, then cut.

Decides: matrices and tables normal with init_std, residual projections (linear_proj, linear_fc2) with
init_std / sqrt(2 num_layers), norms one, biases zero. Also marks every parameter with how it is cut, which DeepSpeed
reads to count norms (`tensor_model_parallel`).
Costs: a rank draws the whole of every tensor it holds a piece of, on the CPU: about a minute for 7B parameters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bd3_megatron.config.schema import ModelConfig
from bd3_megatron.model.bd3_model import Root
from bd3_megatron.model.partition import full_shape, is_expert, partition_of, shard
from bd3_megatron.parallel.topology import Topology
from bd3_megatron.rng import Purpose, generator_seed


def init_weights(root: Root, model: ModelConfig, topology: Topology, *, seed: int) -> None:
    """Fill every parameter of this rank in place and mark how it is cut.

    Args:
        root: the rank's chunks.
        model: for the deviations.
        topology: this rank's coordinates in the grid.
        seed: run.seed.
    """
    gated = model.style == "modern"
    for name, parameter in root.named_parameters():
        partition = partition_of(name, gated=gated)
        # DeepSpeed reads these marks: replicated parameters enter the gradient norm once, cut ones piece by piece. Experts
        # are marked too, although tp does not cut them: each is on one rank, and no other would count it.
        parameter.tensor_model_parallel = partition.dim is not None  # type: ignore[attr-defined]
        parameter.partition_dim = -1 if partition.dim is None else partition.dim  # type: ignore[attr-defined]
        parameter.partition_stride = partition.strides  # type: ignore[attr-defined]
        rank, size = topology.along(partition.axis)
        with torch.no_grad():
            if is_expert(name):
                first = rank * parameter.shape[0]
                for index, expert in enumerate(parameter):
                    expert.copy_(initial_expert(name, first + index, tuple(expert.shape), model, seed=seed))
                continue
            # The whole tensor is drawn and then cut: pieces drawn by each rank would depend on the grid.
            whole = initial_value(name, full_shape(tuple(parameter.shape), partition, size), model, seed=seed)
            parameter.copy_(shard(whole, partition, rank, size))


def initial_expert(name: str, index: int, shape: tuple[int, ...], model: ModelConfig, *, seed: int) -> Tensor:
    """The initial matrix of routed expert `index` of the stack called `name`: drawn alone, so that no rank draws others'."""
    return initial_value(name.replace(".experts.", f".experts.{index}."), shape, model, seed=seed)


def initial_value(name: str, shape: tuple[int, ...], model: ModelConfig, *, seed: int) -> Tensor:
    """The whole initial tensor called `name` (global name), fp32."""
    if name.endswith("bias"):
        return torch.zeros(shape)
    if "norm" in name:
        return torch.ones(shape)
    deviation = model.init_std
    if name.endswith((".linear_proj.weight", ".linear_fc2.weight")):
        # Each layer adds two such projections to the residual stream; this keeps its variance from growing with depth
        # (GPT-2).
        deviation /= math.sqrt(2 * model.num_layers)
    generator = torch.Generator().manual_seed(generator_seed(seed, Purpose.INIT, name))
    return torch.empty(shape).normal_(0.0, deviation, generator=generator)
