"""A run as the report page sees it: every record of metrics.jsonl as series over steps, and the files beside it.

A step that was done again counts as it was done last. A value that is null or no finite number is left out of its series
and counted, so that the page can say so. Only reads; a running job may write meanwhile.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bd3_megatron.report.chart import Point
from bd3_megatron.report.run_record import MetricsRecord, RunRecord, finite, read_records, read_run

MAX_SAMPLE_CHARACTERS = 6000


@dataclass(frozen=True)
class ReportedRun:
    """One run."""

    name: str
    """Unique on the page."""
    run: RunRecord
    records: Sequence[MetricsRecord]
    """All complete records, in order of the file."""
    written_at: float
    """When metrics.jsonl was last written, seconds since the epoch."""
    samples: str | None
    """samples.txt, cut."""
    manifest: Mapping[str, Any]
    """Of the newest checkpoint; empty where there is none."""

    @cached_property
    def num_steps(self) -> int:
        """The newest step of the record."""
        return max((r["step"] for r in self.records if "step" in r), default=0)

    @cached_property
    def keys(self) -> set[str]:
        """Every key of any record."""
        return {key for record in self.records for key in record}

    def values(self, key: str) -> dict[int, float]:
        """{step: value} of finite values, by rising step."""
        # a dictionary keeps the last value of a step: after a roll-back the step that was kept, not the one that was undone
        found = [(r["step"], value) for r in self.records if "step" in r and (value := finite(r, key)) is not None]
        return dict(sorted(dict(found).items()))

    def not_finite(self, key: str) -> list[int]:
        """Steps whose record has the key without a finite number."""
        return sorted({r["step"] for r in self.records if "step" in r and key in r and finite(r, key) is None})

    def events(self, name: str) -> list[MetricsRecord]:
        """Records of one kind of event."""
        return [record for record in self.records if record.get("event") == name]

    @cached_property
    def tokens_at(self) -> dict[int, float]:
        """Cumulative clean tokens by step."""
        return self.values("tokens")

    def tokens(self, step: int) -> float:
        """Clean tokens consumed at a step; between and beyond logged steps in proportion."""
        # evaluations are logged at steps of their own, at which no token count is recorded
        known = list(self.tokens_at)
        if not known or step == 0:
            return 0.0
        nearest = known[min(bisect_left(known, step), len(known) - 1)]
        return self.tokens_at[nearest] * step / nearest

    def series(self, key: str, *, by_tokens: bool) -> list[Point]:
        """(x, value) points of a key."""
        found = self.values(key)
        return [(self.tokens(step) if by_tokens else float(step), value) for step, value in found.items()]

    @property
    def commit(self) -> str | None:
        """The code that wrote the newest checkpoint."""
        commit = self.manifest.get("git_commit")
        return None if commit is None else str(commit)


def read_runs(folders: Sequence[Path]) -> list[ReportedRun]:
    """Read run folders; equal names get their parent's in front.

    Raises:
        DataError: a folder holds no run, or its record is broken before the last line.
    """
    ends = [folder.resolve() for folder in folders]
    # sweeps name their folders alike (lr1/run, lr2/run), and two curves of one name cannot be told apart
    names = [
        end.name if sum(e.name == end.name for e in ends) == 1 else f"{end.parent.name}/{end.name}" for end in ends
    ]
    return [_read(folder, name) for folder, name in zip(folders, names, strict=True)]


def needs_tokens(runs: Sequence[ReportedRun]) -> bool:
    """Whether steps of these runs are not comparable: tokens a step differ."""
    # rounded, because a warm-up of the batch size makes the mean a fraction
    sizes = {round(run.tokens(run.num_steps) / run.num_steps) for run in runs if run.num_steps and run.tokens_at}
    return len(sizes) > 1


def _read(folder: Path, name: str) -> ReportedRun:
    run = read_run(folder)
    records, _ = read_records(folder / "metrics.jsonl")
    samples = folder / "samples.txt"
    # samples are whatever the model wrote; half a character must not take the page down
    text = samples.read_text(encoding="utf-8", errors="replace") if samples.is_file() else None
    return ReportedRun(
        name=name,
        run=run,
        records=records,
        # the age of the file tells a job that waits from one that is gone
        written_at=os.path.getmtime(folder / "metrics.jsonl"),
        samples=None if text is None else text[:MAX_SAMPLE_CHARACTERS],
        manifest=_newest_manifest(folder / "checkpoints"),
    )


def _newest_manifest(checkpoints: Path) -> dict[str, Any]:
    # step numbers have leading zeros, so the last name is the newest checkpoint
    found = sorted(checkpoints.glob("step_*/manifest.json")) if checkpoints.is_dir() else []
    return _json(found[-1]) if found else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
