"""A run read back from its folder: config.yaml, metrics.jsonl and status.json, while it runs or afterwards.

A torn last line is left out; a broken line anywhere else is an error. An attempt begins at a record with
`"event": "start"`. Speed is the median over the settled records of the last attempt that has any. Goodput is useful step
time over wall time since the first start: lost work, restarts, checkpoints and evaluations lower it. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

from bd3_megatron.config.load import load_config
from bd3_megatron.config.schema import Config
from bd3_megatron.errors import DataError, shown
from bd3_megatron.files import json_record
from bd3_megatron.process.status import RunStatus, read_status

MetricsRecord = Mapping[str, Any]
LOSS_KEY = "loss/train_nats_per_token"
STEP_KEYS = (LOSS_KEY, "time/step_seconds")
"""A record with one of these is of a training step (a GPU may not yet have timed the step when it is written)."""
ENDINGS: Mapping[str, str] = MappingProxyType(
    {"failed": "failed", "crashed": "crashed", "hung": "hung and was ended", "died": "died"}
)
LARGEST = 1e100
"""No measurement is larger; differences and squares of larger numbers overflow."""
UTILISATION_KEYS = ("throughput/mfu", "throughput/mfu_min", "throughput/hfu")
"""Shares of the device's peak."""


@dataclass(frozen=True)
class Attempt:
    """One start of the job and the step records it wrote."""

    start: MetricsRecord | None
    """The start event; None where the file begins without one."""
    steps: Sequence[MetricsRecord]

    @property
    def devices(self) -> int | None:
        return None if self.start is None else self.start.get("world_size")


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder tells it."""

    folder: Path
    config: Config
    attempts: Sequence[Attempt]
    torn: bool
    """The last line was incomplete and left out."""
    status: RunStatus | None = None
    """What became of the run; None where its folder does not say."""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def steps(self) -> list[MetricsRecord]:
        """All step records in order of the file."""
        return [record for attempt in self.attempts for record in attempt.steps]

    @property
    def restarts(self) -> int:
        return max(0, sum(a.start is not None for a in self.attempts) - 1)

    @property
    def devices(self) -> int:
        """Ranks of the last attempt; what the grid asks for where no start was recorded."""
        # a job that went on with another number of ranks: its last attempt is what the speed is of
        recorded = [a.devices for a in self.attempts if a.devices]
        return recorded[-1] if recorded else self.config.parallel.world_size()

    def settled(self) -> list[MetricsRecord]:
        """Records that speak for the run's speed."""
        # the last attempt may have died before its first record; then the one before speaks for the speed
        steps = next((a.steps for a in reversed(self.attempts) if a.steps), [])
        timed = [r for r in steps if finite(r, "time/step_seconds") is not None]
        # the first record of an attempt holds compilation, warm-up of caches and the loader's start
        return list(timed[1:] if len(timed) > 1 else timed)

    def typical(self, key: str) -> float | None:
        """Median of `key` over the settled records that have it."""
        values = [value for record in self.settled() if (value := finite(record, key)) is not None]
        # medians: a pause for a checkpoint must not look like a slow step
        return median(values) if values else None

    def utilisation(self, key: str) -> float | None:
        """Typical value of one of UTILISATION_KEYS; None above 1, which says that the peak is wrong, not what was used."""
        share = self.typical(key)
        # nothing runs faster than the peak: above 1 the peak is wrong, and with it every share
        return None if share is None or share > 1.0 else share

    def series(self, key: str) -> dict[int, float]:
        """{step: value} of the step records with a finite value; a step done again counts as it was done last."""
        found = [(r["step"], value) for r in self.steps if (value := finite(r, key)) is not None]
        return dict(sorted(dict(found).items()))

    def latest(self, key: str) -> Any:
        """Value of `key` in the newest step record that has it, or None."""
        return next((r[key] for r in reversed(self.steps) if r.get(key) is not None), None)

    def time_split(self) -> dict[str, float]:
        """{kind: mean seconds a step} over the settled records, from the keys time/KIND_seconds."""
        settled = self.settled()
        kinds = {key for record in settled for key in record if _is_kind(key)}
        total = {key: sum(finite(r, key) or 0.0 for r in settled) / len(settled) for key in kinds}
        return {key.removeprefix("time/").removesuffix("_seconds"): total[key] for key in sorted(total)}


def _is_kind(key: str) -> bool:
    return key.startswith("time/") and key.endswith("_seconds") and not key.startswith(("time/step", "time/pause"))


def finite(record: MetricsRecord, key: str) -> float | None:
    """A record's value where it is a finite number; None where it is missing or anything else."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) < LARGEST else None


def end_of(run: RunRecord) -> str | None:
    """How a run ended other than by finishing, in one sentence; None while it runs and where nobody recorded it."""
    status = run.status
    if status is None or status.status in ("running", "finished"):
        return None
    if status.status == "stopped":
        return f"the run stopped at step {status.step} ({status.reason}); the same command goes on."
    if status.status == "died":
        # nobody was left to write a code, and the status is of the last save or of the start
        step = max([status.step, *(record["step"] for record in run.steps)])
        return f"the run died at step {step} or later: {status.reason}"
    kind = f", {status.error}" if status.error else ""
    return (
        f"the run {ENDINGS[status.status]} at step {status.step} (exit code {status.exit_code}{kind}): {status.reason}"
    )


def read_run(folder: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        DataError: no config.yaml or metrics.jsonl there, or a line before the last is no JSON object.
    """
    for name in ("config.yaml", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise DataError(f"'{folder}' holds no {name}; give the run.dir of a run that has started.")
    records, torn = read_records(folder / "metrics.jsonl")
    return RunRecord(folder, load_config(folder / "config.yaml"), _attempts(records), torn, read_status(folder))


def read_records(path: Path) -> tuple[list[MetricsRecord], bool]:
    """All complete records of a metrics.jsonl, and whether a torn last line was left out.

    Raises:
        DataError: a line before the last is no JSON object.
    """
    # a job that died may have left half a character, too
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    complete, rest = lines[:-1], lines[-1]
    records: list[MetricsRecord] = []
    for number, line in enumerate(complete, start=1):
        if not line.strip():
            continue
        record = json_record(line)
        # torn, yet followed by a line break: the next attempt began a new line after it
        if record is None and number == len(complete) and not rest:
            return records, True
        if record is None:
            raise DataError(f"line {number} of '{path}' is no JSON object ({line[:40]!r}); remove it to read the rest.")
        if (wrong := _wrong_key(record)) is not None:
            raise DataError(
                f"line {number} of '{path}' has {wrong}={shown(record[wrong])}, which no trainer writes; remove the line."
            )
        records.append(record)
    return records, bool(rest.strip())


def _wrong_key(record: MetricsRecord) -> str | None:
    """A key that decides how the record is read and has a value of another kind."""
    # other values are read by `finite`, which leaves out what is no number; these decide how lines belong together
    for key, smallest in (("step", 0), ("world_size", 1)):
        value = record.get(key, smallest)
        # 2^53: beyond it, a step is no longer exact as a float on an axis
        if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value < 2**53:
            return key
    grid = record.get("grid", {})
    if not isinstance(grid, dict) or not all(type(size) is int and size > 0 for size in grid.values()):
        return "grid"
    return None


def _attempts(records: Sequence[MetricsRecord]) -> list[Attempt]:
    attempts: list[Attempt] = []
    start: MetricsRecord | None = None
    steps: list[MetricsRecord] = []
    for record in records:
        # every attempt appends to the same file and announces itself
        if record.get("event") == "start":
            if start is not None or steps:
                attempts.append(Attempt(start, steps))
            start, steps = record, []
        elif "step" in record and not record.keys().isdisjoint(STEP_KEYS):
            steps.append(record)
    return [*attempts, Attempt(start, steps)] if start is not None or steps else attempts


@dataclass(frozen=True)
class Goodput:
    """Useful time of a run."""

    useful_seconds: float
    wall_seconds: float

    @property
    def share(self) -> float:
        return min(1.0, self.useful_seconds / self.wall_seconds)


def goodput(run: RunRecord) -> Goodput | None:
    """Useful step time over wall time since the first start; None without a start event, times, or a step.

    Records stand for the steps since the record before them; `time` is seconds since the epoch.
    """
    starts = [t for a in run.attempts if a.start is not None and (t := finite(a.start, "time")) is not None]
    steps = run.steps
    ends = [t for record in steps if (t := finite(record, "time")) is not None]
    if not starts or not ends or max(ends) <= starts[0]:
        return None
    # a step that was lost and done again counts once: only the first time did it bring the run forward
    useful, seen = 0.0, 0
    for record in steps:
        # a record stands for all steps since the one before it, whatever log.every_steps was
        step = record["step"]
        if step > seen:
            useful += (step - seen) * (finite(record, "time/step_seconds") or 0.0)
            seen = step
    return Goodput(useful, max(ends) - starts[0])
