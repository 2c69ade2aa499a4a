"""What the SLURM tests do with a cluster: submit through the launcher, watch a job, read what a run left.

Jobs are watched through `scontrol show job`, which forgets none within a session. A rank is either the trainer or a few
lines of bash in its place, for what concerns the scheduler and the batch script alone.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integration.slurm_lab import SlurmLab

ROOT = Path(__file__).resolve().parents[2]
DEBUG = ROOT / "configs/debug_cpu.yaml"
CPU_PROFILE = ROOT / "configs/cluster/cpu.yaml"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}

AT_STEP = """
import signal, threading, time
from bd3_megatron.train.trainer import Trainer
original = Trainer._step
def step(self, batches):
    now = self.state.step + 1
    {body}
    return original(self, batches)
Trainer._step = step
"""
"""A fault for `Slurm.faulty` before each update; `body` is a line of Python with now, rank, node and attempt."""

RANK = """\
#!/bin/bash
# in place of a rank's interpreter; its last argument is the configuration
run_dir=$(sed -n 's/^  dir: //p' "${!#}")
attempt=${SLURM_RESTART_COUNT:-0}
end() { # $1: status, $2: reason, $3: exit code
    [ "$SLURM_PROCID" = 0 ] || return 0
    echo "{\\"status\\": \\"$1\\", \\"reason\\": \\"$2\\", \\"exit_code\\": ${3:-0}, \\"step\\": 1}" |
        tee "$BD3_LOGS/status.json" >"$run_dir/status.json"
}
"""


@dataclass
class Slurm:
    """A cluster as seen by one test.

    `folder` is the test's own; the launcher is started there.
    """

    lab: SlurmLab
    folder: Path
    jobs: list[int]

    def launch(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run launch/slurm.py; the ids of what it submitted are added to `jobs`."""
        done = self.lab.run(sys.executable, ROOT / "launch/slurm.py", *arguments, check=check, cwd=self.folder)
        found = re.search(r"^job id +(.*)$", done.stdout, re.MULTILINE)
        self.jobs += [int(number) for number in found.group(1).split(",")] if found else []
        return done

    def train(self, *arguments: str, profile: Path = CPU_PROFILE, run: str = "run") -> int:
        """Submit the debug run into `folder`/RUN.

        Returns:
            The (first) job's id.
        """
        before = len(self.jobs)
        self.launch(str(DEBUG), "--cluster", str(profile), f"run.dir={self.folder / run}", *arguments)
        return self.jobs[before]

    def profile(self, python: str, **settings: object) -> Path:
        """The shipped CPU profile with one rank a node and another interpreter.

        Args:
            python: a program that stands in for the interpreter.
            settings: further keys.
        """
        path = self.folder / "site.yaml"
        changed = {"ranks_per_node": 1, "python": python, **settings}
        kept = [line for line in CPU_PROFILE.read_text().splitlines() if line.partition(":")[0] not in changed]
        path.write_text("\n".join([*kept, *(f"{k}: {json.dumps(v)}" for k, v in changed.items())]) + "\n")
        return path

    def rank(self, body: str, **settings: object) -> Path:
        """A profile whose ranks are the given lines of bash, which have run_dir, attempt and `end`."""
        program = self.folder / "rank"
        program.write_text(RANK + body)
        program.chmod(0o755)
        return self.profile(str(program), **settings)

    def faulty(self, code: str) -> Path:
        """A profile whose ranks are the trainer with a fault: `code` runs first in each process.

        Args:
            code: Python, with rank, node and attempt defined.
        """
        fault = self.folder / "fault.py"
        fault.write_text(
            "import os, runpy, sys\n"
            "rank, node = int(os.environ['SLURM_PROCID']), os.environ['SLURMD_NODENAME']\n"
            "attempt = int(os.environ['BD3_ATTEMPT'])\n"
            f"{code}\n"
            "sys.argv = sys.argv[2:]\n"
            "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
        )
        program = self.folder / "python"
        program.write_text(f'#!/bin/bash\nexec {sys.executable} {fault} "$@"\n')
        program.chmod(0o755)
        return self.profile(str(program))

    def job(self, number: int | str) -> dict[str, str]:
        """The fields of `scontrol show job`; empty while the controller does not answer."""
        shown = self.lab.run("scontrol", "-o", "show", "job", str(number), check=False)
        return dict(word.partition("=")[::2] for word in shown.stdout.split())

    def wait(self, number: int | str, timeout: float = 120.0) -> dict[str, str]:
        """Wait for a job's end.

        Raises:
            AssertionError: not in time; with the job's fields and logs.
        """
        self.until(lambda: self.job(number).get("JobState") in ENDED, number, timeout)
        return self.job(number)

    def until(self, condition: Callable[[], bool], number: int | str, timeout: float = 120.0) -> None:
        """Wait for a condition about a job.

        Raises:
            AssertionError: not in time.
        """
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {timeout:.0f} s: {self.job(number)}\n{self.log(number)}")
            time.sleep(0.1)

    def log(self, number: int | str) -> str:
        """What the batch script said, all attempts."""
        path = Path(self.job(number).get("StdOut", "/nowhere"))
        return path.read_text() if path.is_file() else ""

    def cancel_all(self) -> None:
        """End what the test left."""
        self.lab.run("scancel", "--state=PENDING", check=False)
        self.lab.run("scancel", "-f", "--signal=KILL", "--state=RUNNING", check=False)
        deadline = time.monotonic() + 60
        while self.lab.run("squeue", "-h", check=False).stdout.strip():
            assert time.monotonic() < deadline, "jobs remain"
            self.lab.run("scancel", *map(str, self.jobs), check=False)
            time.sleep(0.1)


def losses(run_dir: Path) -> list[tuple[int, float]]:
    """(step, loss) of every training record, in order."""
    path = run_dir / "metrics.jsonl"
    records: list[Mapping[str, Any]] = []
    for line in path.read_text().split("\n")[:-1] if path.is_file() else ():
        records.append(json.loads(line))
    return [(r["step"], r["loss/train_nats_per_token"]) for r in records if "loss/train_nats_per_token" in r]


def last_step(run_dir: Path) -> int:
    """The last step that the record speaks of; 0 without one."""
    return max((step for step, _ in losses(run_dir)), default=0)


def status(run_dir: Path) -> dict[str, Any]:
    """status.json."""
    return json.loads((run_dir / "status.json").read_text())
