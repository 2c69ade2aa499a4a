"""Worker processes that make parts: each loads source and tokenizer once, then takes parts as it becomes free.

Decides: workers are spawned (no threads or locks are inherited) and talk through one pipe each. A worker that dies is
noticed at once; parents that die close the pipes, and workers end after the part in hand.
Refuses: nothing; errors of a worker are raised here with the worker's own type and sentence.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, NoReturn, Protocol

from bd3_megatron.errors import BD3Error, WorkStopped

Report = Callable[["Progress"], None]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Work done since the last report."""

    documents: int = 0
    tokens: int = 0
    weight: float = 0.0


class PartMaker(Protocol):
    """What a worker does; travels to it by pickling."""

    def open(self) -> None:
        """Load what all parts need; called once in the process that works."""

    def make(self, task: Any, report: Report) -> Any:
        """Make one part."""


def make_parts(maker: PartMaker, tasks: Sequence[Any], num_workers: int, report: Report) -> Iterator[Any]:
    """Make all parts, in this process or in `num_workers` others; yields results as they come.

    Args:
        maker: does the work.
        tasks: one a part, in order of preference.
        num_workers: 1 works in this process.
        report: told about progress.

    Raises:
        BD3Error: what a worker raised.
        WorkStopped: a worker died.
    """
    # In this process a debugger works and an error keeps its traceback.
    if num_workers <= 1 or len(tasks) <= 1:
        if tasks:
            maker.open()
        for task in tasks:
            yield maker.make(task, report)
        return
    pool = _Pool(maker, min(num_workers, len(tasks)))
    try:
        yield from pool.run(tasks, report)
    finally:
        pool.stop()


class _Sent(Enum):
    """What a worker sends."""

    PROGRESS = auto()
    RESULT = auto()
    ERROR = auto()


class _Pool:
    def __init__(self, maker: PartMaker, size: int) -> None:
        # Spawned, not forked: tokenizer libraries hold threads and locks that a fork would copy in any state.
        context = multiprocessing.get_context("spawn")
        self._workers: dict[Connection, Any] = {}
        for _ in range(size):
            # One pipe a worker: with a shared queue, a worker killed while it holds the lock would stop all others.
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(maker, theirs), daemon=True)
            process.start()
            # With our copy open, a dead worker's pipe would never report its end.
            theirs.close()
            self._workers[ours] = process

    def run(self, tasks: Sequence[Any], report: Report) -> Iterator[Any]:
        # Taken from the end: the tasks go out in their order, one to each worker that is free.
        waiting = list(reversed(tasks))
        busy: set[Connection] = set()
        for connection in self._workers:
            if waiting:
                self._send(connection, waiting.pop())
                busy.add(connection)
        while busy:
            for ready in wait(list(busy)):
                # By identity: `wait` returns the objects it was given.
                connection = next(one for one in busy if one is ready)
                kind, content = self._receive(connection)
                if kind is _Sent.PROGRESS:
                    report(content)
                    continue
                if kind is _Sent.ERROR:
                    raise content
                yield content
                if waiting:
                    self._send(connection, waiting.pop())
                else:
                    busy.discard(connection)

    def stop(self) -> None:
        for connection, process in self._workers.items():
            connection.close()
            # A part is published by one rename, so a worker may be stopped at any moment.
            process.terminate()
        for process in self._workers.values():
            process.join()

    def _send(self, connection: Connection, task: Any) -> None:
        try:
            connection.send(task)
        except OSError:
            self._report_death(connection)

    def _receive(self, connection: Connection) -> tuple[_Sent, Any]:
        try:
            received: tuple[_Sent, Any] = connection.recv()
        except (EOFError, OSError):
            self._report_death(connection)
        return received

    def _report_death(self, connection: Connection) -> NoReturn:
        process = self._workers[connection]
        # Seconds: the pipe closes shortly before the exit code is known.
        process.join(timeout=5)
        raise WorkStopped(
            f"a worker process ended with exit code {process.exitcode}; look for memory pressure, use fewer --workers, "
            "and run the same command again: finished parts are kept."
        )


def _work(maker: PartMaker, connection: Connection) -> None:
    # Each worker is one of many; threads of the tokenizer library would only fight over the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        maker.open()
        while True:
            task = connection.recv()
            result = maker.make(task, lambda progress: connection.send((_Sent.PROGRESS, progress)))
            connection.send((_Sent.RESULT, result))
    except BD3Error as error:
        with suppress(OSError):  # the parent may be the one that died
            connection.send((_Sent.ERROR, error))
    except (EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        return


class ProgressBar:
    """A bar on stderr, or nothing: share done, documents/s, tokens/s, time left."""

    def __init__(self, total_weight: float, *, show: bool) -> None:
        self._documents = self._tokens = 0
        self._started = time.monotonic()
        self._bar: Any = None
        if show:
            from tqdm import tqdm

            layout = "{l_bar}{bar}| {elapsed} elapsed, {remaining} left{postfix}"
            self._bar = tqdm(total=total_weight, bar_format=layout, desc="tokenising", dynamic_ncols=True)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def skip(self, weight: float) -> None:
        """Work that an earlier run finished; it does not count for the rates."""
        if self._bar is not None:
            self._bar.initial += weight
            self._bar.update(weight)

    def advance(self, progress: Progress) -> None:
        """Count work done."""
        self._documents += progress.documents
        self._tokens += progress.tokens
        if self._bar is None:
            return
        # A first report may come at once; the rate must not divide by zero.
        seconds = max(time.monotonic() - self._started, 1e-3)
        rates = f", {self._documents / seconds:,.0f} documents/s, {self._tokens / seconds:,.0f} tokens/s"
        self._bar.set_postfix_str(rates.removeprefix(", "), refresh=False)
        self._bar.update(progress.weight)
