"""Stopping on request: a signal sets a flag, the ranks agree on it at a step boundary.

Decides: SIGTERM and SIGUSR1 mean "finish the step, save, stop" (preemption sends the one, a time limit the other); the
second signal ends the process at once, and the previous checkpoint stays as it is.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Signals closer together are one request: `timeout`, a SLURM step signal and a kill of the process group each deliver
# theirs twice.
DOUBLED_SECONDS = 1.0
# The index is the code that is reduced by MAX: where ranks differ, the later reason in this order is reported.
REASONS = ("none", "signal", "file", "deadline")


class StopRequest:
    """Whether this rank was asked to stop, and whether any was.

    Args:
        stop_file: training stops when this file appears.
        deadline: time.time() after which training stops; None: never.
    """

    def __init__(self, *, stop_file: Path | None = None, deadline: float | None = None) -> None:
        self._stop_file, self._deadline = stop_file, deadline
        self._signalled_at: float | None = None

    def install(self) -> None:
        """Take over the stop signals of this process."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # only a flag: saving in a handler would interrupt a collective
        now = time.monotonic()
        if self._signalled_at is not None and now - self._signalled_at > DOUBLED_SECONDS:
            # as a shell reports a death by signal
            os._exit(128 + number)
        self._signalled_at = self._signalled_at or now

    def agreed(self, device: torch.device) -> str | None:
        """The reason why some rank was asked to stop, or None; equal on every rank. Collective."""
        # a rank may be told before another, so one element is reduced every step
        told = torch.tensor(float(self._own_reason()), device=device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        code = int(told.item())
        return REASONS[code] if code else None

    def _own_reason(self) -> int:
        if self._signalled_at is not None:
            return 1
        if self._stop_file is not None and self._stop_file.exists():
            return 2
        return 3 if self._deadline is not None and time.time() > self._deadline else 0
