"""Launches as `bd3 train` makes them on this machine, forked from a process that has imported everything.

The forked process becomes the holder of the ranks: configuration from a file, overrides, supervisor, exit code, all by
`local_ranks.main`. What it says goes to a file.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bd3_megatron.compat import deepspeed as deepspeed_compat
from bd3_megatron.compat import megatron as megatron_compat
from bd3_megatron.config.load import dump_config
from bd3_megatron.lease import start_ticks
from bd3_megatron.train import local_ranks
from tests.ranks.train_runs import train_config, write_data

START_SECONDS = 120.0


class Launch:
    """One launch.

    Args:
        folder: holds data/, run/ and config.yaml.
        overrides: "section.key=value"; the run has 8 steps otherwise.
        ranks: of this machine.
    """

    def __init__(self, folder: Path, *overrides: str, ranks: int = 1) -> None:
        self.folder, self.run_dir = folder, folder / "run"
        self.log = folder / f"{time.monotonic_ns()}.log"
        self._status: int | None = None
        argv = ["--ranks", str(ranks), str(prepared(folder)), *overrides]
        sys.stdout.flush()
        sys.stderr.flush()
        self.process = os.fork()
        if self.process == 0:
            self._hold(argv)

    def _hold(self, argv: list[str]) -> None:
        code = 1
        try:
            os.setsid()
            descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            # pytest's own streams are none of these two
            sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1)
            code = local_ranks.main(argv)
        finally:
            sys.stderr.flush()
            os._exit(code)

    @property
    def said(self) -> str:
        """Everything on stderr so far."""
        return self.log.read_text() if self.log.exists() else ""

    def errors(self) -> list[str]:
        """The sentences that begin as errors do."""
        return [line for line in self.said.splitlines() if line.startswith("bd3: error: ")]

    def ranks(self) -> list[int]:
        """Process ids."""
        text = Path(f"/proc/{self.process}/task/{self.process}/children").read_text()
        return [int(child) for child in text.split()]

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait while the launch goes on."""
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            assert not self._has_ended(), self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.01)

    def until_step(self, step: int) -> None:
        """Wait for a record of a step."""
        record = self.run_dir / "metrics.jsonl"
        self.until(lambda: record.exists() and f'"step": {step},' in record.read_text())

    def end(self) -> int:
        """Wait for the end; the exit code."""
        deadline = time.monotonic() + START_SECONDS
        while not self._has_ended():
            assert time.monotonic() < deadline, self.said
            time.sleep(0.01)
        assert self._status is not None
        return os.waitstatus_to_exitcode(self._status)

    def kill(self) -> None:
        """End whatever is left of it."""
        if not self._has_ended():
            ranks = self.ranks()
            os.killpg(self.process, signal.SIGKILL)
            self.end()
            while any(start_ticks(rank) is not None for rank in ranks):
                time.sleep(0.01)

    def _has_ended(self) -> bool:
        if self._status is None:
            done, status = os.waitpid(self.process, os.WNOHANG)
            self._status = status if done else None
        return self._status is not None


def prepared(folder: Path) -> Path:
    """The configuration file of the folder's run, made with its data at the first call."""
    path = folder / "config.yaml"
    if not path.exists():
        # in the parent, so that every launch is a fork
        megatron_compat.install()
        deepspeed_compat.load_deepspeed()
        import bd3_megatron.train.entry  # noqa: F401

        watch = {"leak_check": False, "preflight": False}
        dump_config(train_config(write_data(folder / "data"), folder / "run", watch=watch), path)
    return path


@contextmanager
def launched(folder: Path, *overrides: str, ranks: int = 1) -> Iterator[Launch]:
    """A launch that is over after the block, however the block ends."""
    launch = Launch(folder, *overrides, ranks=ranks)
    try:
        yield launch
    finally:
        launch.kill()
