"""Local ranks: they die with their parent, a signal reaches all, and the first failure is named once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from bd3_megatron.process.supervisor import SAME_SIGNAL_SECONDS

PARENT = """
import os, signal, sys, time
from pathlib import Path
from bd3_megatron.errors import ConfigError
from bd3_megatron.process import supervisor
from bd3_megatron.process.ranks import fork_ranks

folder = Path(sys.argv[1])

def stop_gracefully(*_):
    (folder / f"stopped{os.environ['RANK']}").touch()
    os._exit(0)

def mark(rank):
    (folder / f"pid{rank}.new").write_text(str(os.getpid()))
    (folder / f"pid{rank}.new").rename(folder / f"pid{rank}")

def wait_for(name):
    while not (folder / name).exists():
        time.sleep(0.005)

def run(rank):
%s

supervisor.SAME_SIGNAL_SECONDS = float(sys.argv[3])
sys.exit(fork_ranks(run, int(sys.argv[2]), {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}))
"""


class Job:
    """A holder with its ranks, started in a process group of its own."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.environment = environment
        self.process: subprocess.Popen[str] | None = None

    def start(
        self, body: str, ranks: int = 3, *, same_signal_seconds: float = SAME_SIGNAL_SECONDS
    ) -> subprocess.Popen[str]:
        script = self.folder / "parent.py"
        script.write_text(PARENT % "\n".join(f"    {line}" for line in body.strip().splitlines()))
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(self.folder), str(ranks), str(same_signal_seconds)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=dict(self.environment),
            start_new_session=True,
        )
        return self.process

    def end(self, timeout: float = 60.0) -> tuple[int, str]:
        assert self.process is not None
        _, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, err

    def rank_pids(self, ranks: int) -> list[int]:
        files = [self.folder / f"pid{r}" for r in range(ranks)]
        self.until(lambda: all(f.exists() for f in files))
        return [int(f.read_text()) for f in files]

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, "it did not come"
            time.sleep(0.005)

    def let_the_holder_look(self, last_pid: int) -> None:
        """Have the last rank end well; when its holder has noticed that, it has noticed all earlier signals."""
        (self.folder / "end_the_last").touch()
        self.until(lambda: not Path(f"/proc/{last_pid}").exists())


@pytest.fixture
def job(tmp_path: Path, clean_environment: Mapping[str, str]) -> Iterator[Job]:
    job = Job(tmp_path, clean_environment)
    yield job
    if job.process is not None:
        if job.process.poll() is None:
            job.process.kill()
        job.process.communicate()


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until_dead(pids: list[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(is_alive(p) for p in pids):
        assert time.monotonic() < deadline, "ranks outlived their parent"
        time.sleep(0.01)


def test_all_ranks_end_well_is_exit_0_and_silence(job: Job) -> None:
    job.start("return 0")
    assert job.end() == (0, "")


def test_every_rank_finds_its_place_in_the_environment(job: Job) -> None:
    job.start(
        """
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
(folder / f"env{rank}").write_text(" ".join(os.environ[n] for n in names))
return 0
""",
        ranks=2,
    )
    assert job.end()[0] == 0
    assert (job.folder / "env1").read_text() == "1 1 2 2 127.0.0.1 1"


def test_ranks_die_when_their_parent_is_killed(job: Job) -> None:
    process = job.start("mark(rank)\ntime.sleep(60)\nreturn 0")
    pids = job.rank_pids(3)
    assert {os.getpgid(p) for p in pids} == {process.pid}, "ranks must stay in the launcher's process group"
    process.kill()
    wait_until_dead(pids, seconds=60)


def test_a_killed_rank_is_named_and_the_others_are_ended(job: Job) -> None:
    job.start("mark(rank)\ntime.sleep(60)\nreturn 0")
    pids = job.rank_pids(3)
    os.kill(pids[1], signal.SIGKILL)
    code, err = job.end()
    assert code == 1
    assert err.strip() == (
        "bd3: error: rank 1 was killed by signal 9 (SIGKILL); the kernel does that when memory runs out; "
        "the others were ended."
    )
    wait_until_dead(pids, seconds=60)


def test_a_signal_death_is_the_cause_even_when_peers_report_first(job: Job) -> None:
    job.start(
        """
if rank == 2:
    os.kill(os.getpid(), signal.SIGSEGV)
raise RuntimeError("connection reset by peer")
"""
    )
    code, err = job.end()
    assert code == 1 and "rank 2 was killed by signal 11 (SIGSEGV)" in err and "connection reset" not in err


def test_one_mistake_found_by_all_ranks_is_one_line(job: Job) -> None:
    job.start('raise ConfigError("width 3 is odd; use 4.")')
    assert job.end() == (2, "bd3: error: width 3 is odd; use 4.\n")


def test_a_programming_error_shows_its_traceback_once(job: Job) -> None:
    job.start("raise ZeroDivisionError(f'in rank {rank}')")
    code, err = job.end()
    assert code == 1
    assert err.count("Traceback") == 1 and err.count("ZeroDivisionError: in rank") == 1
    assert "failed (traceback above); the others were ended." in err.splitlines()[-1]


def test_a_silent_exit_code_is_named(job: Job) -> None:
    job.start("mark(rank)\nif rank == 1:\n    os._exit(7)\ntime.sleep(60)\nreturn 0", ranks=2)
    assert job.end() == (7, "bd3: error: rank 1 ended with exit code 7; the others were ended.\n")


@pytest.mark.parametrize(("name", "seen"), [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGTERM"), ("SIGUSR1", "SIGUSR1")])
def test_the_first_signal_is_passed_on_and_the_ranks_stop_by_themselves(job: Job, name: str, seen: str) -> None:
    number = getattr(signal, name)
    process = job.start(f"signal.signal(signal.{seen}, stop_gracefully)\nmark(rank)\ntime.sleep(60)\nreturn 1")
    job.rank_pids(3)
    process.send_signal(number)
    assert job.end() == (0, "")
    assert all((job.folder / f"stopped{r}").exists() for r in range(3))


COUNTING = """
def count(*_):
    with open(folder / f"count{rank}", "a") as file:
        file.write("x")
signal.signal(signal.SIGTERM, count)
mark(rank)
wait_for("end_the_last" if rank == 2 else "end")
return 0
"""
"""Ranks that count the stop signals they get."""


def counts(job: Job) -> list[str]:
    files = [job.folder / f"count{r}" for r in range(3)]
    job.until(lambda: all(f.exists() and f.read_text() for f in files))
    return [f.read_text() for f in files]


def test_a_ctrl_c_at_the_terminal_stops_the_ranks_once(job: Job) -> None:
    process = job.start(COUNTING)
    pids = job.rank_pids(3)
    os.killpg(process.pid, signal.SIGINT)
    assert counts(job) == ["x"] * 3
    job.let_the_holder_look(pids[2])
    (job.folder / "end").touch()
    assert job.end() == (0, "")
    assert counts(job) == ["x"] * 3


def test_a_second_signal_ends_at_once(job: Job) -> None:
    process = job.start(COUNTING, same_signal_seconds=0.0)
    pids = job.rank_pids(3)
    process.send_signal(signal.SIGTERM)
    assert counts(job) == ["x"] * 3
    process.send_signal(signal.SIGTERM)
    code, err = job.end()
    assert code == 128 + signal.SIGTERM and err == "bd3: stopped by SIGTERM at once, at the second signal.\n"
    assert not any(is_alive(pid) for pid in pids)


def test_one_signal_delivered_twice_is_one_signal(job: Job) -> None:
    process = job.start(COUNTING, same_signal_seconds=1e9)
    pids = job.rank_pids(3)
    process.send_signal(signal.SIGTERM)
    assert counts(job) == ["x"] * 3
    process.send_signal(signal.SIGTERM)
    job.let_the_holder_look(pids[2])
    (job.folder / "end").touch()
    assert job.end() == (0, "")
    assert counts(job) == ["x"] * 3


def test_a_signal_before_the_ranks_can_save_is_said(job: Job) -> None:
    process = job.start("mark(rank)\ntime.sleep(60)\nreturn 0")
    job.rank_pids(3)
    process.send_signal(signal.SIGTERM)
    code, err = job.end()
    assert code == 128 + signal.SIGTERM and err == "bd3: stopped by SIGTERM before training could save.\n"


def test_the_reserved_port_is_free_for_rank_0_and_for_nobody_else() -> None:
    torch_distributed = pytest.importorskip("torch.distributed")
    from bd3_megatron.process.ranks import reserve_port

    with reserve_port() as holder:
        port = holder.getsockname()[1]
        store = torch_distributed.TCPStore("127.0.0.1", port, 1, is_master=True, wait_for_workers=False)
        store.set("key", "value")
        assert store.get("key") == b"value"
