"""Where the time of a step goes, without stopping the device to ask.

Contract: time is a chain of marks. Entering and leaving a span sets a mark; what lies between two marks belongs to the
innermost span that is open, and to "other" where none is. So the split adds up to the step by construction.
Time between steps (checkpoint, evaluation) is kept apart: it is not part of any step, but of goodput.
Costs one event or clock reading a mark (about a microsecond), no host sync; events are used again.
Knows nothing of devices: an `event_factory` makes events, None means the clock.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from bd3_megatron.cost.traffic import AXES
from bd3_megatron.files import whole

KINDS = (
    "forward",
    "backward",
    "communication",
    "optimizer",
    "data_wait",
    "bubble",
    "checkpoint",
    "evaluation",
    "other",
)
"""Kinds of spans; communication may name its axis: communication_tp."""


class Event(Protocol):
    """A timing event of a device stream, as torch.Event(enable_timing=True) is."""

    def record(self) -> None: ...

    def query(self) -> bool: ...

    def elapsed_time(self, end: Event) -> float: ...


@dataclass(frozen=True)
class StepSplit:
    """Seconds of one step, or of one pause between steps, by kind; they add up to `seconds`."""

    step: int | None
    """None: between two steps."""
    seconds: float
    by_kind: Mapping[str, float]
    follows_step: bool = False
    """A pause after a step: not the wait for the first one."""


class _ClockMark(Event):
    """A clock reading with the face of an event."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.at = 0.0

    def record(self) -> None:
        self.at = self._clock()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3 if isinstance(end, _ClockMark) else 0.0


def _clock_marks(clock: Callable[[], float]) -> Callable[[], Event]:
    return lambda: _ClockMark(clock)


@dataclass
class _Chain:
    """Marks of one step or pause; `kinds[i]` owns the time from mark i to mark i + 1."""

    step: int | None
    follows_step: bool = False
    marks: list[Event] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)


class Timeline:
    """Splits steps into kinds of work.

    Use: start_step, then `with span("forward"):` and so on, then end_step; read `finished()` whenever a log line is due.
    Spans outside of steps are kept as pauses.

    Args:
        event_factory: makes timing events of the device; None times with the clock.
        clock: seconds, used without events.
    """

    def __init__(
        self, *, event_factory: Callable[[], Event] | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._make = event_factory if event_factory is not None else _clock_marks(clock)
        # Events that were read: making one costs a driver call, using one again does not.
        self._free: list[Event] = []
        self._open: list[str] = []
        self._current = _Chain(None)
        self._pending: list[_Chain] = []
        self._done: list[StepSplit] = []
        self._mark("other")

    def start_step(self, step: int) -> None:
        """Begin step `step`; what came before was a pause."""
        self._turn(step)

    def end_step(self) -> None:
        """End the step; a pause begins."""
        self._turn(None)

    @contextlib.contextmanager
    def span(self, kind: str) -> Iterator[None]:
        """Time what happens inside as `kind`.

        Args:
            kind: one of KINDS, or "communication_" and an axis.

        Raises:
            ValueError: an unknown kind.
        """
        if kind not in KINDS and kind.removeprefix("communication_") not in AXES:
            raise ValueError(f"span {kind!r} is not one of {', '.join(KINDS)} or communication_tp, _pp, _cp, _dp")
        self._open.append(kind)
        # A nested span (a collective inside the forward) takes its time out of the span around it: nothing is counted
        # twice.
        self._mark(kind)
        try:
            yield
        finally:
            self._open.pop()
            self._mark(self._open[-1] if self._open else "other")

    def finished(self) -> list[StepSplit]:
        """Steps and pauses that the device has passed and nobody has read yet, in order. Never waits."""
        self._collect()
        done, self._done = self._done, []
        return done

    def _mark(self, owner: str) -> None:
        event = self._free.pop() if self._free else self._make()
        # On a device a timing event on the current stream. A gap of the stream while the host waits falls between the
        # marks around that wait: it is seen where it costs, and not seen where it was hidden.
        event.record()
        self._current.marks.append(event)
        self._current.kinds.append(owner)

    def _turn(self, step: int | None) -> None:
        """Close the chain at a mark that is also the first of the next one, so that no time falls between."""
        owner = self._open[-1] if self._open else "other"
        self._mark(owner)
        closed, self._current = self._current, _Chain(step, follows_step=self._current.step is not None)
        last = closed.marks[-1]
        self._current.marks.append(last)
        self._current.kinds.append(owner)
        self._pending.append(closed)
        self._collect()

    def _collect(self) -> None:
        # query() never waits: a chain that the device has not passed yet is read at a later call.
        while self._pending and self._pending[0].marks[-1].query():
            chain = self._pending.pop(0)
            self._done.append(_split(chain))
            # the last mark is the first of the next chain, which still needs it
            self._free.extend(chain.marks[:-1])


def _split(chain: _Chain) -> StepSplit:
    by_kind: dict[str, float] = defaultdict(float)
    for owner, start, end in zip(chain.kinds, chain.marks, chain.marks[1:], strict=False):
        # torch's events give milliseconds.
        by_kind[owner] += start.elapsed_time(end) / 1e3
    return StepSplit(chain.step, sum(by_kind.values()), MappingProxyType(dict(by_kind)), chain.follows_step)


def time_metrics(splits: Sequence[StepSplit]) -> dict[str, float]:
    """The record's time keys: seconds of a step by kind, mean over the steps given, and the pauses' sums.

    Args:
        splits: what `finished` gave since the last record.

    Returns:
        time/step_seconds and time/KIND_seconds as means a step (only kinds that occurred); time/pause_seconds and
        time/pause_KIND_seconds as sums over the pauses. Without a step, the pauses only. time/step_and_pause_seconds is the
        clock of speed: a mean step with its share of what lies between steps and has no name of its own.
    """
    steps = [s for s in splits if s.step is not None]
    pauses = [s for s in splits if s.step is None]
    record: dict[str, float] = {}
    if steps:
        record["time/step_seconds"] = sum(s.seconds for s in steps) / len(steps)
        for kind, seconds in _sums(steps).items():
            record[f"time/{kind}_seconds"] = seconds / len(steps)
        # evaluation and checkpoints are somebody's choice; records, questions and loops are what a step costs
        unnamed = sum(s.by_kind.get("other", 0.0) for s in pauses if s.follows_step)
        record["time/step_and_pause_seconds"] = record["time/step_seconds"] + unnamed / len(steps)
    if pauses:
        record["time/pause_seconds"] = sum(s.seconds for s in pauses)
        for kind, seconds in _sums(pauses).items():
            record[f"time/pause_{kind}_seconds"] = seconds
    return record


def _sums(splits: Sequence[StepSplit]) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for split in splits:
        for kind, seconds in split.by_kind.items():
            total[kind] += seconds
    return dict(total)


def device_event_factory() -> Callable[[], Event] | None:
    """Makes timing events of the present accelerator; None where there is none, which times with the clock."""
    import torch  # everything above works without it

    if not torch.accelerator.is_available():
        return None
    return lambda: torch.Event(enable_timing=True)  # type: ignore[return-value]


@contextlib.contextmanager
def profiled(step: int, profile_steps: Sequence[int], folder: Path, rank: int) -> Iterator[None]:
    """Write a torch profiler trace of a chosen step; does nothing for the others.

    Args:
        step: this step.
        profile_steps: log.profile_steps.
        folder: where step_STEP_rank_RANK.json appears, made if absent.
        rank: of this process.
    """
    if step not in profile_steps:
        yield
        return
    import torch  # only runs that profile pay for the profiler

    with torch.profiler.profile(record_shapes=True, with_flops=True) as profile:
        yield
    with whole(folder / f"step_{step}_rank_{rank}.json") as partial:
        profile.export_chrome_trace(str(partial))
