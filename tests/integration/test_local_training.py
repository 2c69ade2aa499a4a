"""The door users take: `bd3 train` on this machine, from a clean folder to finished, stopped, resumed and refused runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEBUG = str(ROOT / "configs/debug_cpu.yaml")
START_SECONDS = 120.0
"""Importing, joining and preparing text on a busy machine."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens of the debug run's text, made once."""
    folder = tmp_path_factory.mktemp("data") / "bytes"
    tool = [sys.executable, str(ROOT / "tools/prepare_data.py"), "--builtin", "python-topics", "--tokenizer", "bytes"]
    subprocess.run([*tool, "--out", str(folder), "--quiet"], check=True, capture_output=True, timeout=300)
    return folder


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
        while not (self.run_dir / "metrics.jsonl").is_file() or max(losses_so_far(self.run_dir), default=0) < step:
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


def losses_so_far(run_dir: Path) -> list[int]:
    found = []
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        try:
            found.append(json.loads(line)["step"])
        except ValueError:
            continue
    return found


@pytest.fixture
def running(tmp_path: Path, clean_environment: Mapping[str, str], prepared: Path) -> Iterator[Running]:
    grid = [
        "parallel.tp=2",
        f"data.path={prepared}",
        "train.steps=100000",
        "checkpoint.every_steps=5",
        "watch.leak_check=false",
    ]
    run = Running(tmp_path / "run", clean_environment, *grid)
    yield run
    if run.process.poll() is None:
        os.killpg(run.process.pid, signal.SIGKILL)
    run.process.wait()
    if run.process.stderr is not None:
        run.process.stderr.close()


def test_the_debug_run_works_from_nothing_and_says_so(tmp_path: Path, clean_environment: Mapping[str, str]) -> None:
    run_dir = tmp_path / "run"
    done = train(run_dir, clean_environment, "train.steps=6")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    assert sorted(losses(run_dir)) == [1, 2, 3, 4, 5, 6]
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
    assert last["tokens"] == 6 * 8 * 64

    again = train(run_dir, clean_environment, "train.steps=6")
    assert again.returncode == 0 and "finished" in again.stderr
    assert sorted(losses(run_dir)) == [1, 2, 3, 4, 5, 6], "a finished run adds nothing"


def test_a_run_on_a_grid_equals_the_run_on_one_rank(
    tmp_path: Path, clean_environment: Mapping[str, str], prepared: Path
) -> None:
    same = [f"data.path={prepared}", "train.steps=3"]
    assert train(tmp_path / "one", clean_environment, *same).returncode == 0
    done = train(tmp_path / "grid", clean_environment, *same, "parallel.tp=2", "parallel.dp=2")
    assert done.returncode == 0, done.stderr
    one, grid = losses(tmp_path / "one"), losses(tmp_path / "grid")
    assert one.keys() == grid.keys()
    assert all(abs(one[step] - grid[step]) < 1e-5 for step in one), (one, grid)


def test_a_stop_saves_and_the_same_command_goes_on(
    running: Running, clean_environment: Mapping[str, str], prepared: Path
) -> None:
    running.wait_for_step(2)
    running.process.send_signal(signal.SIGTERM)
    code, err = running.end()
    assert code == 0, err
    stopped_at = json.loads((running.run_dir / "status.json").read_text())["step"]
    grid = ["parallel.tp=2", f"data.path={prepared}", f"train.steps={stopped_at + 2}", "watch.leak_check=false"]
    resumed = train(running.run_dir, clean_environment, *grid)
    assert resumed.returncode == 0, resumed.stderr
    steps = [r["step"] for r in records(running.run_dir) if "loss/train_nats_per_token" in r]
    assert steps == list(range(1, stopped_at + 3)), "each step stands once"


def test_ranks_die_with_the_launcher_however_it_dies(running: Running) -> None:
    running.wait_for_step(1)
    ranks = running.ranks()
    assert len(ranks) == 2 and {os.getpgid(r) for r in ranks} == {running.process.pid}
    running.process.kill()
    deadline = time.monotonic() + 10
    while any(is_running(rank) for rank in ranks):
        assert time.monotonic() < deadline, "ranks outlived the launcher"
        time.sleep(0.02)


def test_a_killed_rank_ends_the_run_by_name(running: Running) -> None:
    running.wait_for_step(1)
    os.kill(running.ranks()[1], signal.SIGKILL)
    # its peers would wait for it as long as a collective may take
    code, err = running.end()
    assert code == 1 and "rank 1 was killed by signal 9 (SIGKILL)" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["data.text=[missing.txt]"], "missing.txt"),
        (["data.path=nowhere"], "nowhere"),
        (["model.vocab_size=100"], "model.vocab_size=100 is smaller than the tokenizer's"),
    ],
)
def test_bad_input_found_by_the_ranks_is_one_line_once(
    tmp_path: Path, clean_environment: Mapping[str, str], prepared: Path, overrides: list[str], sentence: str
) -> None:
    path = [] if any(o.startswith("data.") for o in overrides) else [f"data.path={prepared}"]
    done = train(tmp_path / "run", clean_environment, "parallel.tp=2", *path, *overrides)
    lines = [line for line in done.stderr.splitlines() if line.startswith("bd3: error: ")]
    assert done.returncode == 2 and len(lines) == 1 and sentence in lines[0], done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_torn_checkpoint_is_one_line(tmp_path: Path, clean_environment: Mapping[str, str], prepared: Path) -> None:
    run_dir = tmp_path / "run"
    same = [f"data.path={prepared}", "checkpoint.keep_last=1", "watch.leak_check=false"]
    assert train(run_dir, clean_environment, *same, "train.steps=2").returncode == 0
    for file in (run_dir / "checkpoints").rglob("*.pt"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    done = train(run_dir, clean_environment, *same, "train.steps=4")
    lines = [line for line in done.stderr.splitlines() if line.startswith("bd3: error: ")]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr


def test_one_process_a_rank_as_on_gpus_says_its_mistake_once(
    tmp_path: Path, clean_environment: Mapping[str, str]
) -> None:
    """The way of GPUs, where CUDA forbids forking; here on the CPU."""
    holder = [sys.executable, "-m", "bd3_megatron.train.local_ranks", "--ranks", "2", "--gpu", DEBUG, "parallel.tp=2"]
    environment = dict(clean_environment) | {"GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*holder, f"run.dir={tmp_path}/run", "data.path=/nowhere"],
        env=environment,
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
