"""Stopping on request: a signal sets a flag, the ranks agree on it at a step boundary.

Decides: SIGTERM and SIGUSR1 mean "finish the step, save, stop" (preemption sends the one, a time limit the other); the
second signal ends the process at once, and the previous checkpoint stays as it is. Ranks tell each other before a step and
read the answer after it: what comes during a step is acted upon after the next one.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from bd3_megatron.compat.device import HostCopy

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
        self._answer: HostCopy | None = None

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

    def ask(self, device: torch.device) -> None:
        """Tell all ranks what this one was asked so far; `agreed` has the answer. Collective; does not wait for a GPU."""
        # a rank may be told before another, so one element is reduced every step; filled there, not copied from the host
        told = torch.full((), self._own_reason(), device=device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        self._answer = HostCopy(told)

    def agreed(self) -> str | None:
        """The reason why some rank had been asked to stop at the last `ask`, or None; equal on every rank."""
        # the device has passed the reduction before it began with the step, so this does not wait for the step
        code = 0 if self._answer is None else int(self._answer.read())
        return REASONS[code] if code else None

    def _own_reason(self) -> int:
        if self._signalled_at is not None:
            return 1
        if self._stop_file is not None and self._stop_file.exists():
            return 2
        return 3 if self._deadline is not None and time.time() > self._deadline else 0
