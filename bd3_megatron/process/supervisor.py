"""Watching local ranks: pass stop signals on, notice the dead, end the rest, name the first failure.

Decides which of several failures is the cause: the earliest, where a rank killed by a signal comes before the connection
errors that its peers raise a moment later. Knows nothing about training: it holds process ids and pipes.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from bd3_megatron.process.rank_process import FailureKind

LAUNCHER_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C, a scheduler's or a person's kill, and SLURM's warning before the time limit."""

GRACE_SECONDS = 1.0
"""After a failure, how long the other ranks may take to report their own side before they are killed."""

SAME_SIGNAL_SECONDS = 1.0
"""Signals closer together are one: a terminal or scheduler signals the whole process group, and a wrapper does too."""

SIGNAL_LEAD_SECONDS = 2.0
"""How much earlier a signal death is taken to have happened than it was noticed: its peers' errors may be read first."""

PIPE_BYTES = 65_536
"""Most that a pipe holds, hence most that one read can return."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """How one rank failed: the time (monotonic), its report if it made one, and its wait status."""

    rank: int
    time: float
    kind: FailureKind
    text: str
    code: int


class Supervisor:
    """The parent of the ranks, from the first start to the last end.

    Args:
        on_death: told, in a sentence, that a rank was ended before it could say why.
    """

    def __init__(self, on_death: Callable[[str], None]) -> None:
        self._on_death = on_death
        self._rank_of: dict[int, int] = {}
        self._pipe_of: dict[int, int] = {}
        self._failures: list[Failure] = []
        self._codes: list[int] = []
        self._stopped_by: int | None = None
        self._stopped_at = 0.0
        self._killed = False
        self._received: list[int] = []
        self._wake_reader, self._wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # a signal that arrives just before select would be missed; the pipe remembers it
        signal.set_wakeup_fd(self._wake_writer, warn_on_full_buffer=False)
        for number in LAUNCHER_STOP_SIGNALS:
            signal.signal(number, self._note)
        # a handler, so that the wake-up pipe is written when a child ends
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)

    def forget(self) -> None:
        """In a forked child: let go of the parent's pipes and handlers."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor in (self._wake_reader, self._wake_writer, *self._pipe_of.values()):
            os.close(descriptor)

    def add(self, rank: int, process: int, report_reader: int) -> None:
        """Take charge of a started rank.

        Args:
            rank: its number.
            process: its process id, a direct child.
            report_reader: read end of the pipe it reports to.
        """
        # a process that a dead rank started may hold the pipe open: a read must not wait for it
        os.set_blocking(report_reader, False)
        self._rank_of[process] = rank
        self._pipe_of[process] = report_reader

    def watch(self) -> int:
        """Wait for all ranks to end; print the first failure once.

        Returns:
            The exit code for the whole run.
        """
        deadline = None
        while self._rank_of:
            select.select([self._wake_reader], [], [], 0.25)
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_reader, PIPE_BYTES)
            self._pass_signals_on()
            self._reap()
            if self._failures and deadline is None:
                deadline = time.monotonic() + GRACE_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                self._kill_all()
        return self._verdict()

    def _pass_signals_on(self) -> None:
        received, self._received = self._received, []
        for number in received:
            if self._stopped_by is None:
                self._stopped_by, self._stopped_at = number, time.monotonic()
                # a Ctrl-C reaches the whole process group; ranks ignore it and are told once, by the signal they handle
                self._signal_all(signal.SIGTERM if number == signal.SIGINT else number)
            elif time.monotonic() - self._stopped_at > SAME_SIGNAL_SECONDS:
                self._kill_all()

    def _signal_all(self, number: int) -> None:
        for process in self._rank_of:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def _kill_all(self) -> None:
        self._killed = True
        self._signal_all(signal.SIGKILL)

    def _reap(self) -> None:
        for process in list(self._rank_of):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                self._note_end(process, os.waitstatus_to_exitcode(status))

    def _note_end(self, process: int, code: int) -> None:
        rank, pipe = self._rank_of.pop(process), self._pipe_of.pop(process)
        report = _read_report(pipe)
        self._codes.append(code)
        if report is not None:
            self._failures.append(
                Failure(
                    rank=rank, time=report["time"], kind=FailureKind(report["kind"]), text=report["text"], code=code
                )
            )
        elif code < 0 and self._died_by_itself(-code):
            # SIGABRT gets no lead: communication libraries abort a rank over its peers' failure
            lead = SIGNAL_LEAD_SECONDS if -code != signal.SIGABRT else 0.0
            self._failures.append(
                Failure(rank=rank, time=time.monotonic() - lead, kind=FailureKind.SIGNAL, text="", code=code)
            )
        # after a stop or a kill of ours an exit code is an effect, not a cause
        elif code > 0 and self._stopped_by is None and not self._killed:
            self._failures.append(Failure(rank=rank, time=time.monotonic(), kind=FailureKind.CODE, text="", code=code))

    def _died_by_itself(self, number: int) -> bool:
        passed_on = signal.SIGTERM if self._stopped_by == signal.SIGINT else self._stopped_by
        ours = (number == signal.SIGKILL and self._killed) or number == passed_on
        return not ours

    def _verdict(self) -> int:
        cause = min(self._failures, key=lambda f: f.time, default=None)
        if cause is not None:
            print(f"{cause.text.rstrip()}\n" if cause.kind is FailureKind.TRACEBACK else "", end="", file=sys.stderr)
            print(f"bd3: error: {describe(cause)}", file=sys.stderr, flush=True)
            if cause.kind in (FailureKind.SIGNAL, FailureKind.CODE):
                self._on_death(describe(cause))
            return cause.code if cause.kind in (FailureKind.ERROR, FailureKind.CODE) else 1
        if self._stopped_by is not None and any(self._codes):
            how = "at once, at the second signal" if self._killed else "before training could save"
            sentence = f"stopped by {signal.Signals(self._stopped_by).name} {how}."
            print(f"bd3: {sentence}", file=sys.stderr, flush=True)
            self._on_death(sentence)
            # as a shell reports a death by signal
            return 128 + self._stopped_by
        return max(self._codes, default=0)


def describe(failure: Failure) -> str:
    """What the user reads about the failure that ended the run, as a sentence."""
    if failure.kind is FailureKind.ERROR:
        return " ".join(failure.text.split())
    if failure.kind is FailureKind.TRACEBACK:
        return f"rank {failure.rank} failed (traceback above); the others were ended."
    if failure.kind is FailureKind.SIGNAL:
        number = -failure.code
        name = signal.Signals(number).name
        hint = "; the kernel does that when memory runs out" if number == signal.SIGKILL else ""
        return f"rank {failure.rank} was killed by signal {number} ({name}){hint}; the others were ended."
    return f"rank {failure.rank} ended with exit code {failure.code}; the others were ended."


def _read_report(pipe: int) -> dict[str, Any] | None:
    try:
        data = os.read(pipe, PIPE_BYTES)
    except BlockingIOError:
        data = b""
    finally:
        os.close(pipe)
    try:
        return json.loads(data) if data else None
    # a rank killed while it wrote leaves half a report, which says nothing
    except json.JSONDecodeError:
        return None
