"""A step that does not end: every rank writes a report, the rank to blame is named, and the job fails.

Decides: how long is too long (the larger of watch.hang_seconds and watch.hang_factor times the median step), and who is
to blame. Evaluation and saving count as a step: hang_seconds must exceed both. Costs: a clock reading a step; nothing with
hang_factor=0. Does not end a rank that the kernel has stopped: SLURM's --kill-on-bad-exit does.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import json
import linecache
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from bd3_megatron.compat.device import HostCopy
from bd3_megatron.config.schema import WatchConfig
from bd3_megatron.files import write_json, write_text
from bd3_megatron.lease import node_name
from bd3_megatron.process.status import write_status

MEDIAN_STEPS = 101
"""Steps whose median says what is usual."""
REPORTS_SECONDS = 5.0
"""How long ranks wait for each other's reports before they name one."""
LAST_RESORT_SECONDS = 30.0
"""After the limit, until faulthandler's timer ends a process whose interpreter answers no more."""
COLLECTIVE_FILE = "distributed_c10d.py"
WAITS = (".wait(", ".item(", ".tolist(", ".cpu(", "synchronize(")
"""On a device collectives are only queued; the host then waits in a call without a Python frame, told by its line."""
OUTSIDE = "no collective"
HUNG = 1
"""Exit code."""


@dataclass(frozen=True, kw_only=True)
class HangReport:
    """Status report of a rank that waits too long."""

    rank: int
    node: str
    step: int
    collective: str
    """Name of the collective it waits in, or OUTSIDE."""
    location: str
    """Where in the code: the innermost line of ours."""


class Watchdog:
    """Watches one rank's loop.

    Args:
        config: hang_factor 0 turns it off.
        run_dir: what is found goes to its status.json; stacks to logs/hang/rank-N.txt there, or where BD3_LOGS says.
        rank, world_size: of this job.
    """

    def __init__(self, config: WatchConfig, run_dir: Path, *, rank: int, world_size: int) -> None:
        self._config, self._run_dir = config, run_dir
        self._folder = Path(os.environ.get("BD3_LOGS") or run_dir / "logs") / "hang"
        self._rank, self._world_size = rank, world_size
        self._node = node_name()
        self._durations: deque[float] = deque(maxlen=MEDIAN_STEPS)
        self._step, self._beat = 0, time.monotonic()
        self._ended = threading.Event()

    @property
    def limit_seconds(self) -> float:
        """How long the present step may take."""
        usual = statistics.median(self._durations) if self._durations else 0.0
        return max(self._config.hang_seconds, self._config.hang_factor * usual)

    @contextlib.contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Watch what happens inside, from `step` on."""
        if self._config.hang_factor <= 0:
            yield
            return
        self._ended.clear()
        for name in (f"rank-{self._rank}.txt", f"rank-{self._rank}.json", "verdict.txt"):
            # of an earlier run in this folder
            (self._folder / name).unlink(missing_ok=True)
        self.alive(step)
        loop = threading.get_ident()
        thread = threading.Thread(target=self._watch, args=(loop,), name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            faulthandler.cancel_dump_traceback_later()

    def step_done(self, step: int) -> None:
        """A step has ended."""
        self._durations.append(time.monotonic() - self._beat)
        self.alive(step)

    def alive(self, step: int) -> None:
        """The loop goes on (also after evaluation and saving, which are not steps)."""
        self._step, self._beat = step, time.monotonic()
        if self._config.hang_factor > 0:
            # the watching thread never runs if the loop keeps the interpreter to itself; this timer needs no
            # interpreter
            faulthandler.dump_traceback_later(self.limit_seconds + LAST_RESORT_SECONDS, exit=True)

    def _watch(self, loop: int) -> None:
        while not self._ended.wait(min(1.0, self._config.hang_seconds / 10)):
            waited = time.monotonic() - self._beat
            if waited > self.limit_seconds:
                self._give_up(loop, waited)

    def _give_up(self, loop: int, waited: float) -> None:
        # limits follow each rank's own median, so the others may be a little later
        patience = max(REPORTS_SECONDS, 0.1 * self.limit_seconds)
        faulthandler.dump_traceback_later(2 * (patience + REPORTS_SECONDS) + LAST_RESORT_SECONDS, exit=True)
        verdict = self._folder / "verdict.txt"
        # whatever goes wrong here, the process must end: others wait for it
        try:
            self._write_report(loop)
            # One rank reads everybody's report: all of them reading all would be a million files on 1,000 ranks. It is rank
            # 0, or where rank 0 does not answer the lowest that has written one.
            if self._rank > 0:
                _wait_until(verdict.exists, patience + REPORTS_SECONDS)
            if not verdict.exists() and self._rank == min(self._reported()):
                self._name_the_blamed(verdict, waited, patience if self._rank == 0 else 0.0)
            # the first rank to end has the others killed, the author among them
            _wait_until(verdict.exists, patience + REPORTS_SECONDS)
            sentence = verdict.read_text(encoding="utf-8").strip()
            print(f"bd3: error: {sentence}; stacks of all ranks in {self._folder}", file=sys.stderr, flush=True)
        finally:
            os._exit(HUNG)

    def _name_the_blamed(self, verdict: Path, waited: float, patience: float) -> None:
        _wait_until(lambda: len(self._reported()) == self._world_size, patience)
        files = [self._folder / f"rank-{rank}.json" for rank in sorted(self._reported())]
        reports = [HangReport(**json.loads(file.read_text(encoding="utf-8"))) for file in files]
        sentence = (
            f"no step for {waited:.0f} s after step {self._step} (limit {self.limit_seconds:.0f} s): "
            f"{blamed(reports, self._world_size)}"
        )
        write_status(self._run_dir, "hung", reason=sentence, step=self._step, exit_code=HUNG)
        write_text(verdict, f"{sentence}\n")

    def _reported(self) -> list[int]:
        """Ranks whose report is there, by one listing of the folder."""
        names = (name for name in os.listdir(self._folder) if name.startswith("rank-") and name.endswith(".json"))
        return [int(name.removeprefix("rank-").removesuffix(".json")) for name in names]

    def _write_report(self, loop: int) -> HangReport:
        folder = self._folder
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"rank-{self._rank}.txt").open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file=file, all_threads=True)
        frame = sys._current_frames().get(loop)
        collective, location = where(frame)
        report = HangReport(rank=self._rank, node=self._node, step=self._step, collective=collective, location=location)
        write_json(folder / f"rank-{self._rank}.json", asdict(report), indent=None)
        return report


def _wait_until(holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.2)


def where(frame: FrameType | None) -> tuple[str, str]:
    """The collective, or the function that waits for a device, that a stack is in, and the innermost line of ours."""
    collective, location = OUTSIDE, "unknown"
    if frame is not None and any(wait in linecache.getline(frame.f_code.co_filename, frame.f_lineno) for wait in WAITS):
        collective = frame.f_code.co_name
    ours = f"{os.sep}bd3_megatron{os.sep}"
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file.endswith(COLLECTIVE_FILE) and collective == OUTSIDE:
            collective = name
        if location == "unknown" and ours in file:
            short = file[file.rindex(ours) + 1 :]
            location = f"{short}:{frame.f_lineno} in {name}"
        frame = frame.f_back
    return collective, location


def blamed(reports: Sequence[HangReport], world_size: int) -> str:
    """Who is to blame, as a part of a sentence; pure.

    Args:
        reports: of the ranks that could still write one.
        world_size: how many there should be.
    """
    # To blame, in this order: a rank without a report (stopped, or dead on a node that is), ranks outside of a
    # collective while others wait in one, ranks that wait in another collective than most.
    silent = sorted(set(range(world_size)) - {r.rank for r in reports})
    waiting = [r.collective for r in reports if r.collective != OUTSIDE]
    if silent:
        names = ", ".join(map(str, silent))
        rest = f" and the others wait in {_usual(waiting)}" if waiting else ""
        return f"rank {names} does not answer any more{rest}"
    usual = _usual(waiting) if waiting else OUTSIDE
    outside = [r for r in reports if r.collective == OUTSIDE and waiting]
    blamed = outside or [r for r in reports if r.collective != usual] or list(reports)
    told = "; ".join(f"rank {r.rank} (node {r.node}) is in {r.collective}, at {r.location}" for r in blamed)
    others = f"; the others wait in {usual}" if len(blamed) < len(reports) else ""
    return told + others


def _usual(names: Sequence[str]) -> str:
    return statistics.mode(names)


def straggler_metrics(times: Mapping[str, float], device: torch.device) -> Callable[[], dict[str, float]]:
    """The slowest rank's own work (forward and backward) against the median. Collective; only the answer waits.

    Args:
        times: this rank's time entries of a record.
        device: of the collectives.

    Returns:
        Gives time/slowest_rank and time/slowest_over_median; none with one rank, or where a rank has no times yet.
    """
    size = dist.get_world_size()
    if size == 1:
        return dict
    # forward and backward alone: whole steps take equally long on all ranks, which wait for the slowest
    own = times.get("time/forward_seconds", 0.0) + times.get("time/backward_seconds", 0.0)
    seconds_R = torch.zeros(size, dtype=torch.float64, device=device)
    seconds_R[dist.get_rank()] = own
    # every rank fills its own entry, so the sum is a gather
    dist.all_reduce(seconds_R)
    return functools.partial(_slowest, HostCopy(seconds_R))


def _slowest(seconds_R: HostCopy) -> dict[str, float]:
    seconds = seconds_R.read().tolist()
    if min(seconds) <= 0.0:
        return {}
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    return {
        "time/slowest_rank": slowest,
        "time/slowest_over_median": seconds[slowest] / statistics.median_low(seconds),
    }
