"""Runs of the miniature as processes of `bd3 train`: in the order their branches need, a few at a time.

Decides: a run whose status.json says finished is not started again, so a miniature that was broken off goes on where it
stopped. A run that fails ends the miniature with the last line of its log. Only processes started here are ended.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bd3_megatron.errors import BD3Error
from bd3_megatron.files import whole
from bd3_megatron.process.status import read_status
from tools.mini.variants import TRUNK, VARIANTS, MiniSize, Variant, overrides

RUN_POLL_SECONDS = 0.2


class RunFailed(BD3Error):
    """A training run of the miniature that ended with an error; carries the last line of its log."""

    exit_code = 1


@dataclass(frozen=True)
class MiniRun:
    """One model to train."""

    variant: Variant
    seed: int
    folder: Path

    @property
    def is_finished(self) -> bool:
        status = read_status(self.folder)
        return status is not None and status.status == "finished"


def mini_runs(size: MiniSize, out: Path) -> list[MiniRun]:
    """Every model of the miniature, trunks first."""
    # Trunks first: every branch waits for one.
    names = sorted(size.variants, key=lambda name: (name != TRUNK, list(VARIANTS).index(name)))
    return [MiniRun(VARIANTS[name], seed, out / f"seed{seed}" / name) for name in names for seed in size.seeds]


@dataclass
class Runner:
    """Starts jobs, at most `at_once` together, each with one thread."""

    size: MiniSize
    config: Path
    at_once: int
    say: Callable[[str], None]
    _running: dict[Path, tuple[MiniRun, subprocess.Popen[bytes]]] = field(default_factory=dict)

    def run(self, jobs: Sequence[MiniRun]) -> None:
        """Train everything.

        Raises:
            RunFailed: a run ended with an error; the others are stopped.
        """
        waiting = [job for job in jobs if not job.is_finished]
        done = len(jobs) - len(waiting)
        try:
            while waiting or self._running:
                # Any job that may start, not the first in the list: a branch must not hold up the others.
                ready = next((job for job in waiting if self._may_start(job, jobs)), None)
                if ready is not None and len(self._running) < self.at_once:
                    waiting.remove(ready)
                    self._start(ready, jobs)
                    continue
                for job in self._ended():
                    done += 1
                    self.say(f"{done} of {len(jobs)}: {job.variant.label}, seed {job.seed} is trained")
                time.sleep(RUN_POLL_SECONDS)
        finally:
            for _, process in self._running.values():
                # After a failure or Ctrl-C: a run takes this as a request to save and stop.
                process.terminate()

    def _trunk(self, job: MiniRun, jobs: Sequence[MiniRun]) -> MiniRun:
        return next(one for one in jobs if one.variant.name == TRUNK and one.seed == job.seed)

    def _may_start(self, job: MiniRun, jobs: Sequence[MiniRun]) -> bool:
        return not job.variant.is_branch or self._trunk(job, jobs).is_finished

    def _start(self, job: MiniRun, jobs: Sequence[MiniRun]) -> None:
        job.folder.mkdir(parents=True, exist_ok=True)
        if job.variant.is_branch:
            _branch(self._trunk(job, jobs).folder, job.folder, self.size.branch_step)
        named = overrides(job.variant, self.size, seed=job.seed, run_dir=str(job.folder))
        command = [sys.executable, "-m", "bd3_megatron.cli", "train", str(self.config), *named]
        # Appended: a restarted run keeps the log of the attempt before.
        with open(job.folder / "log.txt", "ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=_environment())
        self._running[job.folder] = (job, process)

    def _ended(self) -> list[MiniRun]:
        ended = []
        for folder, (job, process) in list(self._running.items()):
            if process.poll() is None:
                continue
            del self._running[folder]
            # Exit code 0 alone may mean that it was asked to stop.
            if process.returncode or not job.is_finished:
                words = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
                raise RunFailed(
                    f"{job.variant.label}, seed {job.seed} ended with code {process.returncode}: {words[0]}"
                )
            ended.append(job)
        return ended


def _branch(trunk: Path, folder: Path, step: int) -> None:
    """Give a branch the trunk's checkpoint of that step, once; it appears whole or not at all."""
    name = f"step_{step:08d}"
    target = folder / "checkpoints" / name
    if target.exists():
        return
    with whole(target) as temporary:
        shutil.copytree(trunk / "checkpoints" / name, temporary)


def _environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
    # One core a run; the checkout is importable, installed or not.
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
