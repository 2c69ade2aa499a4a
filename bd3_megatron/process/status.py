"""status.json: how a run ended, by which a batch script decides whether to go on.

Exit codes do not survive SLURM's --kill-on-bad-exit, nor torchrun. States: finished (the budget is used up), stopped (on
request, after saving), failed (a mistake in the input: another attempt would fail the same way), hung. No file: the run
died. Written whole by one rank.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

from bd3_megatron.files import write_json

Status = Literal["finished", "stopped", "failed", "hung"]


def write_status(run_dir: Path, status: Status, *, reason: str, step: int) -> None:
    """Replace status.json.

    Args:
        run_dir: the run's folder; made if absent.
        status: how the run ended.
        reason: a word ("signal") or a sentence; becomes one line without double quotes, which sed reads.
        step: the last step made.
    """
    plain = " ".join(reason.split()).replace('"', "'")
    record = {"status": status, "reason": plain, "step": step, "time": time.time()}
    write_json(run_dir / "status.json", record, indent=None)
