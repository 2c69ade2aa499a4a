"""A folder has one owner: who is refused, who is taken for gone, and that two never hold it at once."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from bd3_megatron import lease as lease_module
from bd3_megatron.errors import FolderHeldError, LaunchError
from bd3_megatron.files import whole
from bd3_megatron.lease import (
    PATIENCE_SECONDS,
    REQUEUED_STALE_SECONDS,
    STALE_SECONDS,
    WATCHED_SECONDS,
    Holder,
    Lease,
    Sighting,
    acquire,
    held,
    held_output,
    is_running,
    look,
    read_holder,
    start_ticks,
    this_process,
    verdict_on,
)
from tests.json_mutations import num_refused

ME = replace(this_process(), job="35", requeues=1)
ELSEWHERE = replace(ME, host="n7", machine="another boot", token="other", job=None, requeues=0)
SAME_JOB = replace(ELSEWHERE, job="35")
ENDED = 2**22 + 1
"""Above the largest process id that Linux gives."""


def never(seconds: float) -> None:
    raise AssertionError("nothing was to be waited for")


def write(folder: Path, holder: Holder, *, age: float = 0.0) -> Path:
    path = folder / "lease.json"
    path.write_text(json.dumps(asdict(holder)))
    os.utime(path, (time.time() - age,) * 2)
    return path


def seen(holder: Holder | None, age: float = 0.0) -> Sighting:
    return Sighting(holder=holder, heartbeat=1000.0, age_seconds=age)


def test_the_folder_is_held_inside_the_block_and_free_after_it(tmp_path: Path) -> None:
    with held(tmp_path / "new", name="run.dir=new") as mine:
        holder = read_holder(mine.path)
        assert holder == mine.holder and holder.process == os.getpid()
        assert mine.path == tmp_path / "new/lease.json"
    assert list((tmp_path / "new").iterdir()) == []


def test_a_second_launch_is_refused_by_host_process_and_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "35")
    monkeypatch.setenv("SLURMD_NODENAME", "n3")
    with held(tmp_path, name="run.dir=runs/x"):
        sentence = (
            rf"^run\.dir=runs/x is held by another launch \(host n3, process {os.getpid()}, SLURM job 35, started .*, "
            r"last heartbeat 0 s ago\); wait for it, stop it, or name another folder\.$"
        )
        with pytest.raises(FolderHeldError, match=sentence):
            acquire(tmp_path / "lease.json", name="run.dir=runs/x", sleep=never)
    acquire(tmp_path / "lease.json", name="run.dir=runs/x", sleep=never).release()


def test_a_launch_whose_process_is_gone_is_replaced_at_once_and_said(tmp_path: Path) -> None:
    for gone in (replace(ME, process=ENDED), replace(ME, ticks=ME.ticks + 1)):
        path, said = write(tmp_path, gone), []
        mine = acquire(path, name="run.dir=x", say=said.append, sleep=never)
        assert said == [f"run.dir=x was held by {gone.described()}, which is gone: takes it over"]
        assert read_holder(path) == mine.holder
        mine.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("found", "moved", "watched", "verdict"),
    [
        (seen(replace(ME, token="other", requeues=1)), False, 0.0, "refuse"),
        (seen(replace(ME, token="other", requeues=0)), True, 60.0, "wait"),
        (seen(replace(ME, process=ENDED), 0.0), True, 0.0, "take over"),
        (seen(ELSEWHERE), False, 0.0, "wait"),
        (seen(ELSEWHERE), True, 5.0, "refuse"),
        (seen(ELSEWHERE, STALE_SECONDS - 1), False, WATCHED_SECONDS, "wait"),
        (seen(ELSEWHERE, STALE_SECONDS), False, WATCHED_SECONDS - 1, "wait"),
        (seen(ELSEWHERE, STALE_SECONDS), False, WATCHED_SECONDS, "take over"),
        (seen(replace(SAME_JOB, requeues=1), REQUEUED_STALE_SECONDS), False, WATCHED_SECONDS, "wait"),
        (seen(replace(SAME_JOB, requeues=1)), True, 5.0, "refuse"),
        (seen(SAME_JOB, REQUEUED_STALE_SECONDS - 1), False, WATCHED_SECONDS, "wait"),
        (seen(SAME_JOB), True, WATCHED_SECONDS, "wait"),
        (seen(SAME_JOB, REQUEUED_STALE_SECONDS), False, WATCHED_SECONDS, "take over"),
        (seen(None, STALE_SECONDS), False, WATCHED_SECONDS - 1, "wait"),
        (seen(None, STALE_SECONDS - 1), False, WATCHED_SECONDS, "wait"),
        (seen(None, STALE_SECONDS), False, WATCHED_SECONDS, "take over"),
    ],
)
def test_the_verdict(found: Sighting, moved: bool, watched: float, verdict: str) -> None:
    assert verdict_on(found, ME, has_moved=moved, watched_seconds=watched) == verdict


def test_a_live_owner_elsewhere_is_refused_at_its_first_heartbeat(tmp_path: Path) -> None:
    path, waits = write(tmp_path, ELSEWHERE, age=2 * STALE_SECONDS), []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            os.utime(path)

    said: list[str] = []
    with pytest.raises(FolderHeldError, match=r"host n7, process .*, no SLURM job, started .* last heartbeat 0 s ago"):
        acquire(path, name="run.dir=x", say=said.append, sleep=sleep)
    assert len(waits) == 3 and said == [
        f"run.dir=x is held by {ELSEWHERE.described()}: waits for its end, or for a sign of life"
    ]
    assert read_holder(path) == ELSEWHERE


def test_an_owner_elsewhere_that_gives_the_folder_back_is_waited_for(tmp_path: Path) -> None:
    path = write(tmp_path, ELSEWHERE)
    mine = acquire(path, name="run.dir=x", sleep=lambda seconds: path.unlink())
    assert read_holder(path) == mine.holder
    mine.release()


def test_a_silent_owner_elsewhere_is_replaced_after_it_was_watched(tmp_path: Path) -> None:
    path, waits = write(tmp_path, ELSEWHERE, age=2 * STALE_SECONDS), []
    acquire(path, name="run.dir=x", sleep=waits.append).release()
    assert sum(waits) == pytest.approx(WATCHED_SECONDS)


def test_an_attempt_of_the_same_job_that_never_ends_is_refused_in_the_end(tmp_path: Path) -> None:
    path, waits = write(tmp_path, ELSEWHERE), []
    with pytest.raises(FolderHeldError, match="host n7"):
        acquire(path, name="run.dir=x", patience_seconds=5.0, sleep=waits.append)
    assert sum(waits) == 5.0 and PATIENCE_SECONDS > STALE_SECONDS + WATCHED_SECONDS


def test_a_damaged_lease_keeps_others_out_until_it_is_old(tmp_path: Path) -> None:
    path, waits = tmp_path / "lease.json", []
    path.write_text('{"host": "n1"')
    with pytest.raises(FolderHeldError, match=r"held by another launch \(an unnamed process, last heartbeat"):
        acquire(path, name="run.dir=x", patience_seconds=1.0, sleep=lambda s: None)
    os.utime(path, (time.time() - STALE_SECONDS,) * 2)
    acquire(path, name="run.dir=x", sleep=waits.append).release()
    assert sum(waits) == pytest.approx(WATCHED_SECONDS)


TAKER = """
import sys, time
from pathlib import Path
from bd3_megatron.errors import FolderHeldError
from bd3_megatron.lease import acquire
folder, number = Path(sys.argv[1]), sys.argv[2]
(folder / f"ready{number}").touch()
while not (folder / "go").exists():
    pass
try:
    mine = acquire(folder / "lease.json", name="x")
except FolderHeldError:
    sys.exit(4)
print("held", flush=True)
sys.stdin.read()
mine.release()
"""


@pytest.mark.parametrize("stale", [False, True], ids=["free", "stale"])
def test_of_many_launches_at_once_one_gets_the_folder(tmp_path: Path, stale: bool) -> None:
    if stale:
        write(tmp_path, replace(ME, process=ENDED))
    takers = [
        subprocess.Popen(
            [sys.executable, "-c", TAKER, str(tmp_path), str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for number in range(4)
    ]
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready*"))) < len(takers):
        assert time.monotonic() < deadline
    (tmp_path / "go").touch()
    # the others end by themselves; the one that holds the folder waits for its input's end
    losers = [t for t in takers if t.stdout is not None and not t.stdout.readline()]
    assert [t.wait(60) for t in losers] == [4] * 3
    for taker in takers:
        taker.communicate(timeout=60)
    assert {p.name for p in tmp_path.iterdir()} == {"go", *(f"ready{n}" for n in range(4))}


def test_a_faster_launchs_lease_is_put_back(tmp_path: Path) -> None:
    seen_before = Sighting(holder=replace(ME, process=ENDED), heartbeat=0.0, age_seconds=0.0)
    path = write(tmp_path, ELSEWHERE)
    lease_module._put_aside(path, seen_before, ME)
    assert read_holder(path) == ELSEWHERE and [p.name for p in tmp_path.iterdir()] == ["lease.json"]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline


def test_the_heartbeat_is_renewed_and_a_removed_lease_written_again(tmp_path: Path) -> None:
    path = write(tmp_path, ME, age=500.0)
    mine = Lease(path, ME, on_loss=never_said, beat_seconds=0.001)
    until(lambda: (look(path, ELSEWHERE) or seen(ME, 500.0)).age_seconds < 400.0)
    path.unlink()
    until(lambda: path.exists() and read_holder(path) == ME)
    mine.release()
    assert list(tmp_path.iterdir()) == []


def never_said(sentence: str) -> None:
    raise AssertionError(sentence)


def test_an_owner_whose_lease_became_anothers_is_told_and_leaves_it(tmp_path: Path) -> None:
    told: queue.Queue[str] = queue.Queue()
    path = write(tmp_path, ELSEWHERE)
    mine = Lease(path, ME, on_loss=told.put, beat_seconds=0.001)
    assert told.get(timeout=30) == f"{path} names {ELSEWHERE.described()} now; this process ends."
    mine.release()
    assert read_holder(path) == ELSEWHERE


def test_a_launch_that_lost_its_folder_ends_with_the_code_of_a_held_one(tmp_path: Path) -> None:
    lost = (
        "import sys, threading\n"
        "from pathlib import Path\n"
        "from bd3_megatron import lease\n"
        "lease.Lease.__init__.__kwdefaults__['beat_seconds'] = 0.001\n"
        "mine = lease.acquire(Path(sys.argv[1]), name='x')\n"
        "mine.path.write_text(mine.path.read_text().replace(mine.holder.token, 'other'))\n"
        "threading.Event().wait(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", lost, str(tmp_path / "lease.json")], capture_output=True, text=True)
    assert done.returncode == FolderHeldError.exit_code
    assert done.stderr.startswith(f"bd3: error: {tmp_path}/lease.json names host ") and done.stderr.count("\n") == 1


def test_a_forked_child_does_not_give_the_folder_back(tmp_path: Path) -> None:
    with held(tmp_path, name="x") as mine:
        child = os.fork()
        if child == 0:
            mine.release()
            os._exit(0)
        os.waitpid(child, 0)
        assert read_holder(mine.path) == mine.holder


def test_an_output_is_held_beside_its_place(tmp_path: Path) -> None:
    out = tmp_path / "more" / "hf"
    with held_output(out):
        assert [p.name for p in out.parent.iterdir()] == [".hf.lease.json"]
        with pytest.raises(FolderHeldError, match=rf"^out={out} is held by another launch"), held_output(out):
            raise AssertionError("two hold it")
    assert list(tmp_path.iterdir()) == [], "no output, no folders"
    with held_output(out):
        out.mkdir()
    assert [p.name for p in out.parent.iterdir()] == ["hf"]


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    out = tmp_path / "hf"
    child = os.fork()
    if child == 0:
        with held_output(out), whole(out) as staging:
            staging.mkdir()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 2
    with held_output(out):
        assert [p.name for p in tmp_path.iterdir()] == [".hf.lease.json"]


def test_only_one_of_many_holds_an_output_however_often(tmp_path: Path) -> None:
    def often() -> None:
        for _ in range(30):
            try:
                with held_output(tmp_path / "out"):
                    os.close(os.open(tmp_path / "alone", os.O_CREAT | os.O_EXCL))
                    os.unlink(tmp_path / "alone")
            except FolderHeldError:
                continue

    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                often()
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LaunchError, match=r"^run\.dir=x: '.*' cannot be written \(.*\); choose another folder\.$"):
        acquire(tmp_path / "file" / "lease.json", name="run.dir=x")


def test_a_process_is_known_by_its_number_and_its_start() -> None:
    ticks = start_ticks(os.getpid())
    assert ticks is not None and is_running(os.getpid(), ticks)
    assert is_running(os.getpid(), ticks + 1) is False and is_running(ENDED, ticks) is False
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert start_ticks(child) is None and is_running(child, ticks) is False, "a zombie has ended"
    os.waitpid(child, 0)


def test_a_changed_lease_is_a_holder_or_nobody(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"

    def read(tree: dict[str, Any]) -> None:
        path.write_text(json.dumps(tree))
        found = look(path, ME)
        assert found is not None
        verdict_on(found, ME, has_moved=False, watched_seconds=0.0)
        if found.holder is not None:
            found.holder.described()

    assert num_refused(asdict(ME), "lease", 100, read) == 0
