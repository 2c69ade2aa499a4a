"""Fits the time model's factors to runs that were measured.

Each of five factors is a positive multiplier of its default, found by least squares on logarithms of step times, and of
the optimizer's own column where a run recorded it. Two runs that differ in grid suffice; one run moves the factor that
explains it with the least change. Costs milliseconds. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bd3_megatron.config.schema import Config
from bd3_megatron.errors import ConfigError
from bd3_megatron.planner.constants import Constants, constants_for
from bd3_megatron.planner.machines import Machine
from bd3_megatron.planner.timing import step_time

FACTORS = ("compute_factor", "communication_factor", "optimizer_factor", "overhead_factor", "shared_factor")
PRIOR_WEIGHT = 0.02
"""A factor of e costs as much as a misfit of 14 % in one step time."""
FITTING_ROUNDS = 60


@dataclass(frozen=True)
class Observation:
    """A measured run: its configuration (dp set) and mean seconds."""

    config: Config
    step_seconds: float
    optimizer_seconds: float | None = None


def calibrate(observations: Sequence[Observation], machine: Machine, constants: Constants | None = None) -> Constants:
    """Constants whose factors fitted_factors the observations best.

    Args:
        observations: at least one run on this machine.
        machine: what they ran on.
        constants: to begin with; None: the machine's defaults.

    Raises:
        ConfigError: no observation, or one without a positive step time.
    """
    if not observations:
        raise ConfigError(
            "calibration needs at least one measured run; give --calibrate a run.dir with recorded steps."
        )
    if min(o.step_seconds for o in observations) <= 0:
        raise ConfigError("a run to calibrate on has no positive time/step_seconds; let it record steps first.")
    start = constants or constants_for(machine)
    # logarithms keep every factor positive, and make half as fast weigh as much as twice as fast
    logs = [0.0] * len(FACTORS)
    for _ in range(FITTING_ROUNDS):
        step = _gauss_newton_step(observations, machine, start, logs)
        # half steps: residuals bend where contention begins
        logs = [value + 0.5 * change for value, change in zip(logs, step, strict=True)]
    return _with_factors(start, logs)


def _with_factors(start: Constants, logs: Sequence[float]) -> Constants:
    values = {name: getattr(start, name) * math.exp(log) for name, log in zip(FACTORS, logs, strict=True)}
    return replace(start, **values)


def _residuals(
    observations: Sequence[Observation], machine: Machine, start: Constants, logs: Sequence[float]
) -> list[float]:
    constants = _with_factors(start, logs)
    rows = []
    for seen in observations:
        predicted = step_time(seen.config, machine, constants)
        # the total decides plans, so it has full weight; a column alone has less
        rows.append(math.log(predicted.total / seen.step_seconds))
        if seen.optimizer_seconds:
            # the optimizer's column holds the reduction too: DeepSpeed does both in one call
            rows.append(0.3 * math.log((predicted.optimizer + predicted.dp) / seen.optimizer_seconds))
    return rows


def _gauss_newton_step(
    observations: Sequence[Observation], machine: Machine, start: Constants, logs: Sequence[float]
) -> list[float]:
    at = _residuals(observations, machine, start, logs)
    # differences of the logarithms: the model has kinks (max, contention) where derivatives written out would be wrong
    delta = 1e-4
    columns = []
    for index in range(len(FACTORS)):
        moved = [log + (delta if i == index else 0.0) for i, log in enumerate(logs)]
        columns.append(
            [(b - a) / delta for a, b in zip(at, _residuals(observations, machine, start, moved), strict=True)]
        )
    matrix = [[sum(a * b for a, b in zip(x, y, strict=True)) for y in columns] for x in columns]
    right = [-sum(a * b for a, b in zip(column, at, strict=True)) for column in columns]
    # the prior: what no run says anything about stays where it was
    for index, log in enumerate(logs):
        matrix[index][index] += PRIOR_WEIGHT
        right[index] -= PRIOR_WEIGHT * log
    return _solve(matrix, right)


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gaussian elimination; the prior makes the matrix positive definite, so no pivot is zero."""
    size = len(right)
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    # five unknowns: a library would be a dependency of the launcher
    for i in range(size):
        for j in range(i + 1, size):
            factor = rows[j][i] / rows[i][i]
            rows[j] = [b - factor * a for a, b in zip(rows[i], rows[j], strict=True)]
    result = [0.0] * size
    for i in reversed(range(size)):
        known = sum(rows[i][j] * result[j] for j in range(i + 1, size))
        result[i] = (rows[i][size] - known) / rows[i][i]
    return result


def fitted_factors(constants: Constants) -> str:
    """The fitted factors in one line."""
    return ", ".join(f"{name} {getattr(constants, name):.3g}" for name in FACTORS)
