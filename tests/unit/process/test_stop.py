"""Stopping is asked for by signal, file or deadline, and agreed on; a handler does nothing but remember."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bd3_megatron.process.stop import DOUBLED_SECONDS, STOP_SIGNALS, StopRequest

CPU = torch.device("cpu")


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def handlers() -> Iterator[None]:
    """Puts this process's handlers back."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def answered(stop: StopRequest) -> str | None:
    """What all ranks were told before a step, and read after it."""
    stop.ask(CPU)
    return stop.agreed()


def test_nobody_asked(alone: None) -> None:
    assert answered(StopRequest()) is None


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_remembered_until_the_step_ends(alone: None, handlers: None, number: int) -> None:
    stop = StopRequest()
    stop.install()
    signal.raise_signal(number)
    assert answered(stop) == answered(stop) == "signal"


def test_what_comes_during_a_step_is_acted_upon_after_the_next_one(alone: None, handlers: None) -> None:
    stop = StopRequest()
    stop.install()
    assert stop.agreed() is None
    stop.ask(CPU)
    signal.raise_signal(signal.SIGTERM)
    assert stop.agreed() is None
    assert answered(stop) == "signal"


def test_a_file_stops_the_run(alone: None, tmp_path: Path) -> None:
    stop = StopRequest(stop_file=tmp_path / "stop")
    assert answered(stop) is None
    (tmp_path / "stop").touch()
    assert answered(stop) == "file"


def test_a_deadline_stops_the_run(alone: None) -> None:
    assert answered(StopRequest(deadline=1.0)) == "deadline"
    assert answered(StopRequest(deadline=1e12)) is None


def told_twice(seconds_apart: float) -> int:
    """Exit code of a process that gets a second signal that much later."""
    pid = os.fork()
    if pid == 0:
        stop = StopRequest()
        stop.install()
        signal.raise_signal(signal.SIGUSR1)
        at = time.monotonic()
        time.monotonic = lambda: at + seconds_apart
        signal.raise_signal(signal.SIGTERM)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def test_the_second_signal_ends_the_process() -> None:
    assert told_twice(DOUBLED_SECONDS + 0.1) == 128 + signal.SIGTERM


def test_a_signal_delivered_twice_is_one_request() -> None:
    assert told_twice(DOUBLED_SECONDS / 2) == 0
