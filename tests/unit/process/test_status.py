"""status.json tells the truth at every moment, in one line that bash can read."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from bd3_megatron.errors import CheckpointError, NodeFailure, NonFiniteError
from bd3_megatron.lease import held
from bd3_megatron.process.status import (
    REASON_CHARACTERS,
    RunStatus,
    begin_attempt,
    read_status,
    record_death,
    record_error,
    record_steps,
    write_status,
)
from tests.json_mutations import num_refused

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The attempt's own folder under SLURM, which the batch script reads."""
    monkeypatch.setenv("BD3_LOGS", str(tmp_path / "logs"))
    return tmp_path / "logs"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def said(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())


def test_an_attempt_is_counted_and_runs(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "35")
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    before = time.time()
    began = begin_attempt(run)
    assert [p.name for p in run.iterdir()] == ["status.json"]
    found = said(run)
    assert before <= found["started"] <= found["time"]
    ended = {"reason": "", "error": None, "exit_code": 0}
    here = {"job": "35", "host": "n2", "started": found["started"], "time": found["time"]}
    assert found == {"status": "running", "attempt": 1, "step": 0} | ended | here
    record_steps(run, began, step=40)
    write_status(run, "stopped", reason="signal", step=60)
    again = said(run)
    assert (again["status"], again["reason"], again["step"], again["attempt"]) == ("stopped", "signal", 60, 1)
    begin_attempt(run)
    assert (said(run)["status"], said(run)["step"], said(run)["attempt"]) == ("running", 60, 2)


def test_a_finished_run_stays_finished_until_a_step_is_made(run: Path, logs: Path) -> None:
    begin_attempt(run)
    write_status(run, "finished", reason="finished", step=30)
    began = begin_attempt(run)
    record_error(run, CheckpointError("no such thing."))
    assert (said(run)["status"], said(run)["step"], said(run)["attempt"]) == ("finished", 30, 1)
    assert said(logs)["status"] == "failed", "the batch script knows"
    (logs / "status.json").unlink()
    began = begin_attempt(run)
    record_steps(run, began, step=30)
    assert (said(run)["status"], said(run)["attempt"]) == ("running", 2)


@pytest.mark.parametrize(
    ("error", "fields"),
    [
        (NonFiniteError("ten in a row."), ("failed", "ten in a row.", "NonFiniteError", 5)),
        (NodeFailure("n1 is slow."), ("failed", "n1 is slow.", "NodeFailure", 1)),
        (ZeroDivisionError("by 0"), ("crashed", "ZeroDivisionError: by 0", "ZeroDivisionError", 1)),
        (KeyboardInterrupt(), ("crashed", "KeyboardInterrupt: ", "KeyboardInterrupt", 1)),
    ],
)
def test_an_error_is_recorded_with_its_class_and_code(run: Path, error: BaseException, fields: tuple[Any, ...]) -> None:
    began = begin_attempt(run)
    record_steps(run, began, step=7)
    record_error(run, error, step=9)
    found = said(run)
    assert (found["status"], found["reason"], found["error"], found["exit_code"]) == tuple(
        f.strip() if isinstance(f, str) else f for f in fields
    )
    assert (found["step"], found["attempt"]) == (9, 1)


def test_the_first_cause_stays(run: Path, logs: Path) -> None:
    begin_attempt(run)
    record_error(run, ZeroDivisionError("the cause"))
    record_error(run, RuntimeError("connection closed by peer"))
    write_status(run, "hung", reason="nobody answers", step=3)
    assert said(run)["reason"] == said(logs)["reason"] == "ZeroDivisionError: the cause"


def test_an_error_keeps_the_step_it_does_not_know(run: Path) -> None:
    record_steps(run, begin_attempt(run), step=12)
    record_error(run, CheckpointError("torn."))
    assert said(run)["step"] == 12


def test_a_launch_without_the_folder_tells_the_batch_script_alone(run: Path, logs: Path) -> None:
    record_error(None, CheckpointError("no."))
    assert said(logs)["status"] == "failed" and not run.exists()


def test_without_a_batch_script_there_is_no_copy(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BD3_LOGS", raising=False)
    begin_attempt(run)
    record_error(None, CheckpointError("no."))
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_rank_that_was_killed_is_the_cause_whatever_its_peers_say(run: Path) -> None:
    launched = time.time()
    begin_attempt(run)
    record_error(run, RuntimeError("connection closed by peer"))
    record_death(run, "rank 1 was killed by signal 9 (SIGKILL).", launched=launched)
    found = said(run)
    assert (found["status"], found["error"]) == ("crashed", None)
    assert found["reason"] == "rank 1 was killed by signal 9 (SIGKILL)."


def test_a_death_changes_neither_an_end_nor_another_launchs_status(run: Path) -> None:
    record_death(run, "killed", launched=0.0)
    assert not run.exists()
    begin_attempt(run)
    record_death(run, "killed", launched=time.time() + 60)
    assert said(run)["status"] == "running"
    write_status(run, "finished", reason="finished", step=1)
    record_death(run, "killed", launched=0.0)
    assert said(run)["status"] == "finished"


def test_a_run_that_nobody_holds_has_died(run: Path) -> None:
    assert read_status(run) is None
    with held(run, name="run"):
        began = begin_attempt(run)
        assert read_status(run) == began
    died = read_status(run)
    assert died is not None and died == dataclasses.replace(began, status="died", reason=died.reason) and died.reason
    # nobody holds a folder by what is no file
    (run / "lease.json").mkdir()
    assert read_status(run) == died
    write_status(run, "stopped", reason="file", step=2)
    assert read_status(run) == RunStatus(**said(run))


def test_a_status_of_an_older_version_is_read(run: Path) -> None:
    run.mkdir()
    (run / "status.json").write_text('{"status": "finished", "reason": "finished", "step": 9, "other": 1}\n')
    found = read_status(run)
    assert found is not None and (found.status, found.step, found.attempt) == ("finished", 9, 1)
    for damaged in ("", "{", "[]", "3", '{"step": 3}'):
        (run / "status.json").write_text(damaged)
        assert read_status(run) is None


def test_the_batch_script_reads_every_value_whatever_the_reason_says(run: Path) -> None:
    reason = 'a "quoted" path, {braces}: 5 of 7\nand a second line'
    begin_attempt(run)
    write_status(run, "failed", reason=reason, step=12, exit_code=2)
    body = (ROOT / "launch/templates/job.sh").read_text()
    function = body[body.index("value_of() {") : body.index("}\n", body.index("value_of() {")) + 2]
    keys = "status step exit_code error job nothing reason"
    script = f"{function}\nfor key in {keys}; do value_of $key {run}/status.json; done"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["failed", "12", "2", "a 'quoted' path, {braces}: 5 of 7 and a second line"]


def test_a_reason_of_pages_is_cut(run: Path) -> None:
    begin_attempt(run)
    record_error(run, RuntimeError("x" * 10_000))
    assert len(said(run)["reason"]) == REASON_CHARACTERS


def test_two_ranks_write_at_once_and_the_file_is_whole(run: Path) -> None:
    begin_attempt(run)
    children = []
    for rank in range(4):
        child = os.fork()
        if child == 0:
            record_error(run, RuntimeError(f"rank {rank} " + "x" * 500))
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert re.match(r"RuntimeError: rank \d x+$", said(run)["reason"])
    assert [p.name for p in run.iterdir()] == ["status.json"]


def test_the_readme_describes_every_field_and_state() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    part = text[text.index("### status.json") :].partition("\n## ")[0]
    assert [f.name for f in dataclasses.fields(RunStatus) if f"`{f.name}`" not in part] == []
    states = ("running", "finished", "stopped", "failed", "crashed", "hung", "died")
    assert [state for state in states if f"`{state}`" not in part] == []


def test_a_changed_report_is_read_or_counts_as_none(run: Path) -> None:
    began = dataclasses.asdict(begin_attempt(run))

    def read(tree: dict[str, Any]) -> None:
        (run / "status.json").write_text(json.dumps(tree))
        read_status(run)
        record_steps(run, begin_attempt(run), step=3)
        record_death(run, "rank 1 died", launched=0.0)

    assert num_refused(began, "status", 60, read) == 0
