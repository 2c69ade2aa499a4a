"""What a configuration costs, by arithmetic alone: parameters, FLOPs, memory and bytes moved, under one door.

Decides nothing: the counts are in cost_shape (sizes), cost_pairs (attention), cost_parameters, cost_flops, cost_memory
and cost_traffic, each with its formulas. This file is what rooms outside `model` import; it is torch-free, answers in
milliseconds and may be asked on a login node. Time is not here: that needs a machine, see plan_timing.
"""

from __future__ import annotations

from dataclasses import dataclass

from bd3_megatron.config.schema import Config
from bd3_megatron.model.cost_flops import (
    Execution,
    Flops,
    convention_flops,
    executed_flops,
    execution_of,
    min_flops,
    naive_execution,
)
from bd3_megatron.model.cost_memory import Habits, MemoryBytes, habits_on, memory_of_stage, memory_per_device
from bd3_megatron.model.cost_pairs import Pairs, attended_pairs, document_lengths, executed_pairs, mean_pairs
from bd3_megatron.model.cost_parameters import (
    Parameter,
    parameter_count,
    parameter_table,
    parameters_per_rank,
    stage_parameters,
)
from bd3_megatron.model.cost_shape import Shape, expected_masked_fraction, layers_per_stage, shape_of
from bd3_megatron.model.cost_traffic import Transfer, bytes_by_axis, small_collectives, transfers

__all__ = [
    "Execution",
    "Flops",
    "Habits",
    "MemoryBytes",
    "Pairs",
    "Parameter",
    "Shape",
    "StepFlops",
    "Transfer",
    "attended_pairs",
    "bytes_by_axis",
    "convention_flops",
    "document_lengths",
    "executed_flops",
    "executed_pairs",
    "execution_of",
    "expected_masked_fraction",
    "habits_on",
    "layers_per_stage",
    "mean_pairs",
    "memory_of_stage",
    "memory_per_device",
    "min_flops",
    "naive_execution",
    "parameter_count",
    "parameter_table",
    "parameters_per_rank",
    "shape_of",
    "small_collectives",
    "stage_parameters",
    "step_flops",
    "transfers",
]


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one optimizer step over all devices, three ways."""

    convention: float
    minimum: float
    executed: float


def step_flops(
    config: Config,
    masked_fraction: float,
    *,
    sequences: int | None = None,
    block_size: int | None = None,
    interval: tuple[float, float] | None = None,
    pairs: Pairs | None = None,
    execution: Execution | None = None,
) -> StepFlops:
    """FLOPs of one step.

    Args:
        config: a validated configuration.
        masked_fraction: measured share of masked noisy positions, for what was executed; MIN takes the schedule's.
        sequences: samples of the step over all ranks; None: train.global_batch_size.
        block_size, interval: in use, when a curriculum or a search has moved them.
        pairs: mean allowed pairs a sequence of the documents in use; None: no documents.
        execution: what ran; None: what the engine does for this configuration.
    """
    n = config.train.global_batch_size if sequences is None else sequences
    expected = expected_masked_fraction(config, interval=interval)
    ran = execution or execution_of(config, block_size=block_size)
    return StepFlops(
        convention=n * convention_flops(config, block_size=block_size, pairs=pairs).total,
        minimum=n * min_flops(config, expected, block_size=block_size, pairs=pairs).total,
        executed=n * executed_flops(config, ran, masked_fraction, block_size=block_size, pairs=pairs).total,
    )
