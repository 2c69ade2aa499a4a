"""FLOPs of one optimizer step over all devices: convention, MIN and executed.

The counts of one sequence are in `cost/flops`; this file multiplies them by the sequences of a step. Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass

from bd3_megatron.config.schema import Config
from bd3_megatron.cost.flops import Execution, convention_flops, executed_flops, execution_of, min_flops
from bd3_megatron.cost.pairs import Pairs
from bd3_megatron.cost.shape import expected_masked_fraction
from bd3_megatron.diffusion.axes import ObjectiveAxes


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
    axes: ObjectiveAxes | None = None,
    pairs: Pairs | None = None,
    execution: Execution | None = None,
) -> StepFlops:
    """FLOPs of one step.

    Args:
        config: a validated configuration.
        masked_fraction: measured share of masked noisy positions, for what was executed; MIN takes the schedule's.
        sequences: samples of the step over all ranks; None: train.global_batch_size.
        block_size, interval, axes: in use, when a curriculum or a search has moved them.
        pairs: mean allowed pairs a sequence of the documents in use; None: no documents.
        execution: what ran; None: what the engine does for this configuration.
    """
    n = config.train.global_batch_size if sequences is None else sequences
    # MIN is a property of the schedule, not of one step's draw
    expected = expected_masked_fraction(config, interval=interval, block_size=block_size, axes=axes)
    ran = execution or execution_of(config, block_size=block_size)
    return StepFlops(
        convention=n * convention_flops(config, block_size=block_size, pairs=pairs).total,
        minimum=n * min_flops(config, expected, block_size=block_size, pairs=pairs).total,
        executed=n * executed_flops(config, ran, masked_fraction, block_size=block_size, pairs=pairs).total,
    )
