"""Which mixture holds from which sample on: the configured stages, and what a run has already been through.

Contract: stages are fixed in samples the moment they begin, and that history is saved with the run. What was consumed is
counted as it was consumed, whatever batch size, weights or stage lengths a resumed run has: every source goes on where it
was. A stage whose weights equal those before it begins nothing.
Refuses: histories with more sources than are named now. Sources are known by their position in the list: new ones come last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from bd3_megatron.config.data import DataConfig, Weight
from bd3_megatron.config.load import build_named
from bd3_megatron.config.ranges import MOST_TOKENS, Range
from bd3_megatron.data.mixture import Stage
from bd3_megatron.errors import ConfigError
from bd3_megatron.train.plan import RunPlan

Weights = tuple[float, ...]


def mixture_stages(data: DataConfig, plan: RunPlan, saved: Mapping[str, Any] | None = None) -> list[Stage]:
    """The stages of a run in samples: those that began before it stood where it stands, and what is to come.

    Args:
        data: names mixture or stages; without either there is one source.
        plan: of this attempt; its origin is where the run stands.
        saved: from `stages_state` of the attempt before; None: the run begins, or knows of none.

    Raises:
        ConfigError: sources were taken away.
    """
    consumed = plan.origin_samples
    planned = _planned(data, plan)
    num_sources = len(planned[0][1])
    # A stage that was to begin exactly here has not taken a sample yet, so today's configuration decides it.
    begun = [s for s in _read(saved, num_sources) if s.start < consumed]
    # What the configuration of today wants at this sample.
    current = [weights for start, weights in planned if start <= consumed][-1]
    if not begun:
        begun = [Stage(start=0, weights=current)]
    # Weights that were changed on resuming begin a stage here; counts of the sources carry over.
    stages = begun if begun[-1].weights == current else [*begun, Stage(start=consumed, weights=current)]
    for start, weights in planned:
        if start > consumed and weights != stages[-1].weights:
            stages = [*stages, Stage(start=start, weights=weights)]
    return stages


def stages_state(stages: Sequence[Stage]) -> dict[str, Any]:
    """What `mixture_stages` takes as `saved`; JSON."""
    return {"stages": [{"start": stage.start, "weights": list(stage.weights)} for stage in stages]}


def _planned(data: DataConfig, plan: RunPlan) -> list[tuple[int, Weights]]:
    """(first sample, weights) of every configured stage; stages that began in earlier steps get the origin's sample."""
    folders = data.mixed_folders
    if not folders:
        return [(0, (1.0,))]
    planned: list[tuple[int, Weights]] = []
    first_step = first_sample = 0
    for stage in data.mixtures:
        # Lengths in steps end where the plan has that step; lengths in tokens do not depend on the batch size.
        start = plan.samples_before(max(first_step, plan.origin_step)) if first_step else first_sample
        planned.append((start, tuple(stage.mixture.get(folder, 0.0) for folder in folders)))
        first_step += stage.steps or 0
        first_sample += -(-(stage.tokens or 0) // data.seq_len)
    return planned


@dataclass(frozen=True, kw_only=True)
class SavedStage:
    """A stage as a checkpoint holds it."""

    start: Annotated[int, Range(0, MOST_TOKENS)]
    """First sample."""
    weights: tuple[Weight, ...]
    """By source."""


@dataclass(frozen=True, kw_only=True)
class SavedStages:
    """What `stages_state` made."""

    stages: tuple[SavedStage, ...] = ()


def _read(saved: Mapping[str, Any] | None, num_sources: int) -> list[Stage]:
    # a stream's state has other keys
    known = {"stages": (saved or {}).get("stages", [])}
    stages = build_named(SavedStages, known, "the checkpoint's train_state.data").stages
    for stage in stages:
        before = len(stage.weights)
        if before > num_sources:
            raise ConfigError(
                f"the run has mixed {before} sources and the configuration names {num_sources}; name them all in their "
                "order, with weight 0 for those no longer wanted."
            )
    # Sources that were added since had weight 0 before.
    return [Stage(start=s.start, weights=(*s.weights, *[0.0] * (num_sources - len(s.weights)))) for s in stages]
