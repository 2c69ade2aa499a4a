"""status.json: what became of a run, for batch scripts, reports and people.

Written at the start of an attempt and at every end that a process lives to see. An end is recorded once: of several ranks
that fail, the first one knows the cause. Under SLURM a copy lies in the attempt's own log folder ($BD3_LOGS), which no
other attempt writes to; the batch script decides by that copy. README describes the fields.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from bd3_megatron.config.load import build
from bd3_megatron.config.ranges import Range
from bd3_megatron.errors import BD3Error, ConfigError, FileError
from bd3_megatron.files import write_json
from bd3_megatron.lease import LEASE_FILE, is_held, node_name

STATUS_FILE = "status.json"
REASON_CHARACTERS = 600
"""The errors of foreign engines may fill pages; the log has them whole."""
CRASHED = 1
"""Exit code of a programming error, a dead rank and a hang."""

# to the year 9999, where dates end
Seconds = Annotated[float, Range(0, 253402300799)]
State = Literal["running", "finished", "stopped", "failed", "crashed", "hung", "died"]


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """The fields of status.json."""

    status: State
    """running; finished: the budget is used up; stopped: on request, after saving; failed: by an error that is one
    sentence; crashed: a programming error, or a rank that was killed; hung: the watchdog ended it. Only `read_status`
    says died: the file says running, but nobody holds the folder."""
    reason: str = ""
    """Why it ended: signal, file or deadline for stopped, else a sentence; one line without double quotes."""
    error: str | None = None
    """Class of the error; None where there was none."""
    exit_code: int = 0
    """By the table of exit codes in `errors`."""
    step: Annotated[int, Range(0, 2**53)] = 0
    """Updates made when this was written: at the start of the attempt and at its end."""
    attempt: Annotated[int, Range(1, 2**53)] = 1
    """Launches that took this run folder so far, this one included; one that finds the run finished is none."""
    job: str | None = None
    """SLURM job id; None outside SLURM."""
    host: str = ""
    """Machine of the rank that wrote this."""
    started: Seconds = 0.0
    """When the attempt began, seconds since the epoch."""
    time: Seconds = 0.0
    """When this was written, seconds since the epoch."""


def begin_attempt(run_dir: Path) -> RunStatus:
    """Count an attempt and record that it runs; by the rank that holds the folder.

    A finished run stays finished until `record_steps`: what cannot even begin has not changed it.

    Returns:
        The attempt's status.
    """
    before = _read(run_dir)
    now = time.time()
    began = RunStatus(
        status="running",
        step=before.step if before is not None else 0,
        attempt=before.attempt + 1 if before is not None else 1,
        job=os.environ.get("SLURM_JOB_ID"),
        host=node_name(),
        started=now,
        time=now,
    )
    if before is None or before.status != "finished":
        _write(run_dir, began)
    _write_copy(began)
    return began


def record_steps(run_dir: Path, began: RunStatus, *, step: int) -> None:
    """Record that the attempt makes its first update at `step`; by the rank that holds the folder."""
    running = dataclasses.replace(began, step=step, time=time.time())
    _write(run_dir, running)
    _write_copy(running)


def write_status(run_dir: Path, status: State, *, reason: str, step: int, exit_code: int = 0) -> None:
    """Record how an attempt ended, unless that has been done; by any rank.

    Args:
        run_dir: the run's folder.
        status: how the run ended.
        reason: "signal", "file", "deadline", or a sentence.
        step: updates made.
        exit_code: of the run.
    """
    _end(run_dir, RunStatus(status=status, reason=reason, exit_code=exit_code), step)


def record_death(run_dir: Path, sentence: str, *, launched: float) -> None:
    """Record that a rank was ended from outside, over what its peers made of that; by the process that holds the ranks.

    Args:
        run_dir: the run's folder.
        sentence: which rank, and by what.
        launched: when this launch began, seconds since the epoch: an earlier attempt's end stays as it is.
    """
    before = _read(run_dir)
    # peers of a killed rank fail on their connections and may have recorded a crash: the death is its cause
    if before is None or before.started < launched or before.status not in ("running", "crashed"):
        return
    crashed = dataclasses.replace(before, status="crashed", reason=sentence, error=None, exit_code=CRASHED)
    _write(run_dir, dataclasses.replace(crashed, time=time.time()))


def record_error(run_dir: Path | None, error: BaseException, *, step: int | None = None) -> None:
    """Record the error that ended an attempt, unless an end has been recorded.

    Args:
        run_dir: the run's folder; None where it is not ours: then only the batch script is told.
        error: a sentence for the user (failed), or anything else (crashed).
        step: updates made; None keeps what the file says.
    """
    is_sentence = isinstance(error, BD3Error)
    ended = RunStatus(
        status="failed" if is_sentence else "crashed",
        reason=str(error) if is_sentence else f"{type(error).__name__}: {error}",
        error=type(error).__name__,
        exit_code=error.exit_code if isinstance(error, BD3Error) else CRASHED,
    )
    # the caller raises the error itself, which a full disk must not hide
    with contextlib.suppress(FileError):
        _end(run_dir, ended, step)


def read_status(run_dir: Path) -> RunStatus | None:
    """What became of a run; None where no attempt was begun.

    A run that says it is running although nobody holds its folder has died.
    """
    found = _read(run_dir)
    if found is None or found.status != "running" or is_held(run_dir / LEASE_FILE):
        return found
    return dataclasses.replace(found, status="died", reason="the run was ended from outside; its logs may say by what")


def _end(run_dir: Path | None, ended: RunStatus, step: int | None) -> None:
    # the batch script decides by the copy in the attempt's own log folder, which no other attempt writes to
    for folder in (run_dir, _copies()):
        before = _read(folder) if folder is not None else None
        # an end is recorded once: of several ranks that fail, the first one knows the cause
        if folder is None or (before is not None and before.status != "running"):
            continue
        known = before or RunStatus(status="running", job=os.environ.get("SLURM_JOB_ID"), started=time.time())
        _write(
            folder,
            dataclasses.replace(
                ended,
                step=known.step if step is None else step,
                attempt=known.attempt,
                job=known.job,
                host=node_name(),
                started=known.started,
                time=time.time(),
            ),
        )


def _copies() -> Path | None:
    logs = os.environ.get("BD3_LOGS")
    return Path(logs) if logs else None


def _write_copy(status: RunStatus) -> None:
    folder = _copies()
    if folder is not None:
        _write(folder, status)


def _read(folder: Path) -> RunStatus | None:
    try:
        tree = json.loads((folder / STATUS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(tree, dict):
        return None
    names = {field.name for field in dataclasses.fields(RunStatus)}
    try:
        # older versions wrote fewer fields, and newer ones may write more
        found: RunStatus = build(RunStatus, {k: v for k, v in tree.items() if k in names}, where="status")
    except ConfigError:
        return None
    return found


def _write(folder: Path, status: RunStatus) -> None:
    # one line without double quotes in its values, so that sed can read it
    plain = " ".join(status.reason.split()).replace('"', "'")[:REASON_CHARACTERS]
    record = dataclasses.asdict(dataclasses.replace(status, reason=plain))
    write_json(folder / STATUS_FILE, record, indent=None)
