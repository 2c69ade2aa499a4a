"""A run folder has one owner, and its status.json says what became of the run, whatever ends it."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bd3_megatron.process.status import read_status
from bd3_megatron.train.trainer import Trainer
from tests.ranks.launches import Launch, launched, prepared
from tests.ranks.train_runs import losses

FOREVER = "train.steps=100000"


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run/status.json").read_text())


def told(folder: Path, *keys: str) -> tuple[Any, ...]:
    found = status(folder)
    return tuple(found[key] for key in keys)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, rank: int, action: Any) -> None:
    """Do something on a rank just before the update that leads to `step`."""
    original = Trainer._step

    def planted(self: Trainer, batches: Any) -> bool:
        if self.state.step + 1 == step and self.topology.rank == rank:
            action()
        return original(self, batches)

    monkeypatch.setattr(Trainer, "_step", planted)


def test_a_second_launch_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    stop = f"train.stop_file={tmp_path}/stop"
    with launched(tmp_path, FOREVER, stop, "parallel.dp=2", ranks=2) as first:
        first.until_step(2)
        rank_0 = json.loads((tmp_path / "run/lease.json").read_text())["process"]
        assert rank_0 in first.ranks()
        running = status(tmp_path)
        assert (running["status"], running["step"], running["attempt"]) == ("running", 0, 1)
        with launched(tmp_path, "train.steps=4", "parallel.dp=2", ranks=2) as second:
            assert second.end() == 4
            assert len(second.errors()) == 1
            assert f"run.dir={tmp_path}/run is held by another launch (host " in second.said
            assert f"process {rank_0}, no SLURM job, started " in second.said
        assert status(tmp_path) == running
        (tmp_path / "stop").touch()
        assert first.end() == 0, first.said
    assert told(tmp_path, "status", "reason", "exit_code") == ("stopped", "file", 0)
    done = status(tmp_path)["step"]
    assert list(losses(tmp_path / "run")) == list(range(1, done + 1))
    assert not (tmp_path / "stop").exists(), "it has done its work"
    assert not (tmp_path / "run/lease.json").exists()


def test_a_finished_run_stays_finished_whatever_is_typed_next(tmp_path: Path) -> None:
    with launched(tmp_path) as run:
        assert run.end() == 0 and "finished 8 of 8 steps" in run.said
    finished = status(tmp_path)
    assert (finished["status"], finished["step"], finished["attempt"]) == ("finished", 8, 1)
    with launched(tmp_path, "data.path=nowhere") as mistyped:
        assert mistyped.end() == 2 and len(mistyped.errors()) == 1
    with launched(tmp_path, "train.steps=5") as fewer:
        assert fewer.end() == 0
        assert (
            "nothing to do: the run is at step 8 and train asks for 5; raise train.steps or train.tokens" in fewer.said
        )
        assert "bd3: finished" not in fewer.said
    assert status(tmp_path) == finished
    with launched(tmp_path, "train.steps=9") as more:
        assert more.end() == 0, more.said
    assert told(tmp_path, "status", "step", "attempt") == ("finished", 9, 2)


def test_a_mistake_after_steps_is_recorded_with_its_class(tmp_path: Path) -> None:
    with launched(tmp_path, "train.steps=2") as run:
        assert run.end() == 0
    for file in (tmp_path / "run/checkpoints").rglob("*.pt"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    status_file = tmp_path / "run/status.json"
    status_file.write_text(status_file.read_text().replace("finished", "stopped"))
    with launched(tmp_path) as run:
        assert run.end() == 2
        assert len(run.errors()) == 1 and "Traceback" not in run.said
    assert told(tmp_path, "status", "error", "exit_code", "step", "attempt") == ("failed", "CheckpointError", 2, 2, 2)
    assert not (tmp_path / "run/lease.json").exists()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["data.path=null", "data.text=[missing.txt]"], "missing.txt"),
        (["data.path=nowhere"], "nowhere"),
        (["model.vocab_size=20"], "model.vocab_size=20 is smaller than the tokenizer's"),
    ],
)
def test_bad_input_found_by_the_ranks_is_one_line_once(tmp_path: Path, overrides: list[str], sentence: str) -> None:
    with launched(tmp_path, "parallel.tp=2", "log.profile_steps=[10000]", *overrides, ranks=2) as run:
        assert run.end() == 2
    assert len(run.errors()) == 1 and sentence in run.errors()[0], run.said
    # legal, but never without a word: said before data is read
    assert run.said.count("bd3: warning: log.profile_steps=[10000] is not reached in a run of") == 1, run.said
    assert "Traceback" not in run.said and not (tmp_path / "run/checkpoints").exists()


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Inside, no process that is started can write a larger file: the error of a full disk, from the system itself."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("num_bytes", "file"), [(30_000, "/.tmp_step_00000008/deepspe"), (3_000, "metrics.jsonl")])
def test_a_full_disk_is_said_with_its_remedy_and_ends_what_cannot_go_on(
    num_bytes: int, file: str, tmp_path: Path
) -> None:
    prepared(tmp_path)
    with largest_file(num_bytes), launched(tmp_path, "log.every_steps=1") as run:
        assert run.end() == 2, run.said
    [error] = run.errors()
    assert file in error and "(File too large); free some space" in error and "Traceback" not in run.said
    assert told(tmp_path, "status", "exit_code") == ("failed", 2)
    assert not list((tmp_path / "run/checkpoints").glob("step_*"))


def test_a_crash_and_a_killed_rank_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash() -> None:
        raise ZeroDivisionError("planted")

    with monkeypatch.context() as patch:
        at_step(patch, 3, 1, crash)
        with launched(tmp_path, "parallel.dp=2", ranks=2) as run:
            assert run.end() == 1
    expected = ("crashed", "ZeroDivisionError: planted", "ZeroDivisionError", 1, 2)
    assert told(tmp_path, "status", "reason", "error", "exit_code", "step") == expected
    with monkeypatch.context() as patch:
        at_step(patch, 3, 1, lambda: os.kill(os.getpid(), signal.SIGKILL))
        with launched(tmp_path, "parallel.dp=2", ranks=2) as run:
            # its peer would wait for it as long as a collective may take
            assert run.end() == 1
            assert len(run.errors()) == 1 and "Traceback" not in run.said
    assert told(tmp_path, "status", "error", "exit_code", "attempt") == ("crashed", None, 1, 2)
    assert "rank 1 was killed by signal 9 (SIGKILL)" in status(tmp_path)["reason"]


def test_a_launch_killed_whole_leaves_a_run_that_died_and_the_next_one_goes_on(tmp_path: Path) -> None:
    run: Launch
    with launched(tmp_path, FOREVER, "checkpoint.every_steps=2") as run:
        run.until_step(3)
        found = read_status(tmp_path / "run")
        assert found is not None and found.status == "running"
    found = read_status(tmp_path / "run")
    assert found is not None and found.status == "died" and (tmp_path / "run/lease.json").exists()
    with launched(tmp_path, "train.steps=5") as again:
        assert again.end() == 0, again.said
        assert "which is gone: takes it over" in again.said and "resumes at step " in again.said
    assert told(tmp_path, "status", "attempt") == ("finished", 2)
