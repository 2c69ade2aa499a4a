"""Runs beside each other: one summary a run, scaling efficiency against the smallest run of the same model, notes.

Tokens a second and device are compared between runs of one model, length and objective. Scaling is strong where the
global batch is the same, weak where it grows with the devices, else mixed. Everything odd about a run is a sentence in its
notes, never a guess in its row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bd3_megatron.config.load import flatten
from bd3_megatron.config.objective import objective_of
from bd3_megatron.config.schema import Config
from bd3_megatron.cost.parameters import active_parameter_count, parameter_count
from bd3_megatron.errors import ConfigError
from bd3_megatron.report.run_record import UTILISATION_KEYS, Goodput, RunRecord, end_of, goodput


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """A row of the report; None where a run does not say."""

    run: str
    model: str
    grid: str
    devices: int
    steps: int
    data_tokens_per_second: float | None
    data_tokens_per_second_per_device: float | None
    model_tflops_per_second: float | None
    mfu: float | None
    mfu_min: float | None
    hfu: float | None
    step_seconds: float | None
    peak_memory_bytes: float | None
    time_split: dict[str, float]
    """Share of the step by kind."""
    scaling: str | None
    """strong, weak or mixed, against the smallest run of the model."""
    efficiency: float | None
    goodput: float | None
    restarts: int


@dataclass(frozen=True)
class RunComparison:
    """Runs beside each other."""

    rows: Sequence[RunSummary]
    run_notes: Sequence[str]
    """What is odd about single runs, the run's name in front."""
    group_notes: Sequence[str]
    """What limits the comparison."""


def compare_runs(runs: Sequence[RunRecord]) -> RunComparison:
    """Summaries of one or many runs, each against the smallest run of its own model."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        # efficiency compares like with like: same model, length and objective
        groups.setdefault(_model_key(run.config), []).append(run)
    group_notes = [
        f"the runs are of {len(groups)} different models (or lengths, or objectives); "
        "scaling efficiency compares runs of one model only."
    ]
    return RunComparison(
        rows=[_row(run, groups[_model_key(run.config)]) for run in runs],
        run_notes=[f"{run.name}: {note}" for run in runs for note in _notes(run)],
        group_notes=group_notes if len(groups) > 1 else (),
    )


def _model_key(config: Config) -> str:
    flat = flatten(config)
    kept = [k for k in flat if k.startswith("model.")] + ["data.seq_len", "diffusion.objective", "diffusion.block_size"]
    return repr([(key, flat[key]) for key in sorted(kept)])


def _row(run: RunRecord, group: Sequence[RunRecord]) -> RunSummary:
    step_seconds = run.typical("time/step_seconds")
    split = run.time_split()
    total = sum(split.values()) or 1.0
    scaling, efficiency = _against_smallest(run, group)
    useful: Goodput | None = goodput(run)
    return RunSummary(
        run=run.name,
        model=model_name(run.config),
        grid=_grid(run),
        devices=run.devices,
        steps=max((r["step"] for r in run.steps), default=0),
        data_tokens_per_second=run.typical("throughput/data_tokens_per_second"),
        data_tokens_per_second_per_device=_per_device(run),
        model_tflops_per_second=run.typical("throughput/model_tflops_per_second"),
        mfu=run.utilisation("throughput/mfu"),
        mfu_min=run.utilisation("throughput/mfu_min"),
        hfu=run.utilisation("throughput/hfu"),
        step_seconds=step_seconds,
        peak_memory_bytes=next(reversed(run.series("memory/peak_bytes").values()), None),
        time_split={kind: seconds / total for kind, seconds in split.items()},
        scaling=scaling,
        efficiency=efficiency,
        goodput=None if useful is None else useful.share,
        restarts=run.restarts,
    )


def _per_device(run: RunRecord) -> float | None:
    total = run.typical("throughput/data_tokens_per_second")
    return None if total is None else total / run.devices


def model_name(config: Config) -> str:
    """Such as "16.3B-A1.43B S32 L4096": parameters, those that compute a row where experts make that fewer, S, L."""
    objective = objective_of(config)
    kind = f"S{objective.block_size}" if objective.has_noise else objective.name
    try:
        count, active = parameter_count(config), active_parameter_count(config)
    # the vocabulary is not known, so parameters cannot be counted; the name leaves the count out
    except ConfigError:
        return f"{kind} L{config.data.seq_len}"
    # as the field names mixtures of experts: all parameters, then those that compute a row
    size = _size(count) if active == count else f"{_size(count)}-A{_size(active)}"
    return f"{size} {kind} L{config.data.seq_len}"


def _size(count: int) -> str:
    unit, letter = next((u, c) for u, c in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if count >= u or c == "k")
    return f"{count / unit:.3g}{letter}"


def _grid(run: RunRecord) -> str:
    parallel = run.config.parallel
    start = next((a.start for a in reversed(run.attempts) if a.start is not None), None)
    axes = start.get("grid") if start is not None else None
    if axes is None:
        # records of older versions do not hold the grid; the configuration leaves dp to the number of ranks
        axes = {"tp": parallel.tp, "pp": parallel.pp, "cp": parallel.cp, "dp": run.devices // parallel.model_ranks}
    used = [f"{axis}{size}" for axis, size in axes.items() if size > 1]
    return " ".join(used) or "1"


def _against_smallest(run: RunRecord, group: Sequence[RunRecord]) -> tuple[str | None, float | None]:
    measured = [r for r in group if _per_device(r)]
    if not measured:
        return None, None
    # scaling loses from the first doubling on, so everything is compared with the smallest run, not with its neighbour
    smallest = min(measured, key=lambda r: r.devices)
    here, there = _per_device(run), _per_device(smallest)
    if run.devices == smallest.devices or not here or not there:
        return None, None
    batch, base = run.config.train.global_batch_size, smallest.config.train.global_batch_size
    # weak scaling keeps the batch of a device; where neither holds, the ratio mixes two effects and is called mixed
    same_share = batch * smallest.devices == base * run.devices
    return "strong" if batch == base else "weak" if same_share else "mixed", here / there


def beyond_peak(run: RunRecord) -> str | None:
    """Why a run shows less of its utilisation than it recorded: a share of the peak above 1 is no result."""
    # each of the three is a share of the same peak, but with another count of work, so they pass 1 at different times
    above = [key for key in UTILISATION_KEYS if (run.typical(key) or 0.0) > 1.0]
    if not above:
        return None
    names = {"throughput/mfu": "MFU", "throughput/mfu_min": "MFU-min", "throughput/hfu": "HFU"}
    return (
        f"{', '.join(names[key] for key in above)} not shown: {run.typical(above[0]):.0%} of the peak cannot be, so the peak "
        "is too low (on CPU it is measured at start, and other work may have taken part of the machine then); set "
        "throughput.peak_tflops."
    )


def _notes(run: RunRecord) -> list[str]:
    torn = (
        "the last line of metrics.jsonl is incomplete (the job is writing it, or died there); left out."
        if run.torn
        else None
    )
    if not run.steps:
        none_yet = "no step is recorded yet, so its row is empty; ask again after log.every_steps steps."
        return [note for note in (torn, none_yet, end_of(run)) if note is not None]
    reason = run.latest("throughput/mfu_reason")
    no_start = "no start event with a time is recorded, so goodput is not known." if goodput(run) is None else None
    found = (torn, reason, beyond_peak(run), no_start, end_of(run))
    return [str(note) for note in found if note is not None]
