"""The command users run: `bd3 train` on this machine, from a clean folder to finished, stopped, resumed and refused runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import clean_variables

ROOT = Path(__file__).resolve().parents[2]
DEBUG = str(ROOT / "configs/debug_cpu.yaml")
START_SECONDS = 120.0
"""Importing, joining and preparing text on a busy machine."""
STEPS = 3


@dataclass(frozen=True)
class Finished:
    """A run that has ended."""

    run_dir: Path
    done: subprocess.CompletedProcess[str]

    @property
    def data(self) -> str:
        """The override that reads the tokens this run prepared."""
        return f"data.path={self.run_dir}/data"


@pytest.fixture(scope="module")
def environment() -> Mapping[str, str]:
    """As `clean_environment`, for what a module's tests share."""
    return clean_variables(os.environ)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, environment: Mapping[str, str]) -> Finished:
    """The debug run from nothing, on one rank; what it prepared is the other runs' data."""
    run_dir = tmp_path_factory.mktemp("first") / "run"
    return Finished(run_dir, train(run_dir, environment, f"train.steps={STEPS}"))


def train(run_dir: Path, env: Mapping[str, str], *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(run_dir, overrides), env=dict(env), capture_output=True, text=True, timeout=280)


def command(run_dir: Path, overrides: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "bd3_megatron.cli", "train", DEBUG, f"run.dir={run_dir}", *overrides]


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> dict[int, float]:
    return {r["step"]: r["loss/train_nats_per_token"] for r in records(run_dir) if "loss/train_nats_per_token" in r}


class Running:
    """A training run in a process group of its own, watched through its record."""

    def __init__(self, run_dir: Path, env: Mapping[str, str], *overrides: str) -> None:
        self.run_dir = run_dir
        self.process = subprocess.Popen(
            command(run_dir, overrides),
            env=dict(env),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not (self.run_dir / "metrics.jsonl").is_file() or max(steps_so_far(self.run_dir), default=0) < step:
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline, "the run did not start"
            time.sleep(0.02)

    def ranks(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(child) for child in children]

    def end(self) -> tuple[int, str]:
        assert self.process.stderr is not None
        err = self.process.stderr.read()
        return self.process.wait(timeout=60), err


def steps_so_far(run_dir: Path) -> list[int]:
    """Steps with a loss, in the record's order; a line that is being written is left out."""
    found = []
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "loss/train_nats_per_token" in record:
            found.append(record["step"])
    return found


@pytest.fixture
def start(tmp_path: Path, environment: Mapping[str, str], first: Finished) -> Iterator[Callable[[], Running]]:
    """Starts a run on two ranks that does not end by itself; each call goes on where the last one stopped."""
    grid = ["parallel.tp=2", first.data, "train.steps=100000", "checkpoint.every_steps=5", "watch.leak_check=false"]
    runs: list[Running] = []

    def started() -> Running:
        runs.append(Running(tmp_path / "run", environment, *grid))
        return runs[-1]

    yield started
    for run in runs:
        if run.process.poll() is None:
            os.killpg(run.process.pid, signal.SIGKILL)
        run.process.wait()
        if run.process.stderr is not None:
            run.process.stderr.close()


def test_the_debug_run_works_from_nothing_and_says_so(first: Finished) -> None:
    run_dir, done = first.run_dir, first.done
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr and "finished" in done.stderr
    assert sorted(losses(run_dir)) == list(range(1, STEPS + 1))
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "data", "status.json"} <= {p.name for p in run_dir.iterdir()}
    wanted = {
        "step",
        "tokens",
        "loss/train_nats_per_token",
        "optim/lr",
        "optim/grad_norm",
        "noise/masked_fraction",
        "throughput/data_tokens_per_second",
        "throughput/model_tflops_per_second",
        "throughput/mfu",
        "time/step_seconds",
    }
    last = records(run_dir)[-1]
    assert wanted <= set(last), wanted - set(last)
    assert last["tokens"] == STEPS * 8 * 64


def test_a_run_on_a_grid_equals_the_run_on_one_rank(
    tmp_path: Path, environment: Mapping[str, str], first: Finished
) -> None:
    done = train(tmp_path / "grid", environment, first.data, f"train.steps={STEPS}", "parallel.tp=2", "parallel.dp=2")
    assert done.returncode == 0, done.stderr
    one, grid = losses(first.run_dir), losses(tmp_path / "grid")
    assert one.keys() == grid.keys()
    assert all(abs(one[step] - grid[step]) < 1e-5 for step in one), (one, grid)


def test_a_stop_saves_the_same_command_goes_on_and_ranks_die_with_the_launcher(start: Callable[[], Running]) -> None:
    run = start()
    run.wait_for_step(2)
    run.process.send_signal(signal.SIGTERM)
    code, err = run.end()
    assert code == 0, err
    stopped_at = json.loads((run.run_dir / "status.json").read_text())["step"]

    again = start()
    again.wait_for_step(stopped_at + 2)
    ranks = again.ranks()
    assert len(ranks) == 2 and {os.getpgid(r) for r in ranks} == {again.process.pid}
    again.process.kill()
    deadline = time.monotonic() + 10
    while any(is_running(rank) for rank in ranks):
        assert time.monotonic() < deadline, "ranks outlived the launcher"
        time.sleep(0.02)
    steps = steps_so_far(again.run_dir)
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= stopped_at + 2, "each step stands once"


def test_one_process_a_rank_as_on_gpus_says_its_mistake_once(tmp_path: Path, environment: Mapping[str, str]) -> None:
    """The way of GPUs, where CUDA forbids forking; here on the CPU."""
    holder = [sys.executable, "-m", "bd3_megatron.train.local_ranks", "--ranks", "2", "--gpu", DEBUG, "parallel.tp=2"]
    done = subprocess.run(
        [*holder, f"run.dir={tmp_path}/run", "data.path=/nowhere"],
        env=dict(environment) | {"GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if not line.startswith("bd3: preflight: ")]
    assert errors == ["bd3: error: /nowhere/train does not exist; give a folder made by tools/prepare_data.py."]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
