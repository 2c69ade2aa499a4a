"""One local rank from the inside: it dies with its parent and hands its failure over instead of printing it.

Decides: what a failing rank tells its holder (see `supervisor`), and its exit code. Of N ranks that fail over one fault
only the first is worth reading, and only the holder can know which that was.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from enum import StrEnum
from typing import NoReturn

from bd3_megatron.errors import BD3Error

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal this process gets when the thread that created it dies."""

REPORT_CHARACTERS = 8000
"""Longest report; as JSON at most six bytes each, below a pipe's 64 KiB, so that writing never waits for the holder."""


class FailureKind(StrEnum):
    """What is known of a rank's failure; the words stand in its report."""

    ERROR = "error"
    """It said a sentence."""
    TRACEBACK = "traceback"
    """It said where its code failed."""
    SIGNAL = "signal"
    """It was killed and said nothing."""
    CODE = "code"
    """It left with an exit code and said nothing."""


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies; end at once if it already has.

    Args:
        parent: process id of the parent, taken before this process was created.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # the parent may have died before prctl: then nobody would ever send the signal
    if os.getppid() != parent:
        os._exit(1)


def run_reported(run: Callable[[], int], rank: int, report_fd: int) -> NoReturn:
    """Run a rank's work, write its failure to the holder's pipe, and leave without the interpreter's own clean-up.

    The clean-up is skipped because exit handlers of communication libraries wait for ranks that may be gone.

    Args:
        run: the work; returns the exit code.
        rank: this rank.
        report_fd: write end of a pipe to the holder.
    """
    _default_signals()
    code, report = 0, None
    try:
        code = run()
    except BD3Error as error:
        code = error.exit_code
        report = {"kind": FailureKind.ERROR, "text": str(error)}
    except SystemExit as error:
        # the code may be a text, which means failure, or None, which means success
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        code = 1
        report = {"kind": FailureKind.TRACEBACK, "text": traceback.format_exc()}
    if report is not None:
        # monotonic is one clock for all ranks of a machine, so the holder can compare these times
        _send({**report, "rank": rank, "time": time.monotonic()}, report_fd)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _default_signals() -> None:
    # Ctrl-C reaches every process of the group; the holder passes it on as SIGTERM, once
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))


def _send(report: dict[str, object], report_fd: int) -> None:
    # the end of a traceback is the part that says what happened
    report["text"] = str(report["text"])[-REPORT_CHARACTERS:]
    with contextlib.suppress(OSError):
        os.write(report_fd, json.dumps(report).encode())
