"""One owner of a folder: a file that names who works in it, so that a second launch is refused and a dead one replaced.

Of many launches one creates the file (`files.create`). Its modification time is the heartbeat, so that the file server's
clock alone decides how old one is. `verdict_on` says when another launch is refused and when it is
taken for gone; the owner checks at every heartbeat that the file is still its own, and ends the process if it is not.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from bd3_megatron.errors import FolderHeldError, LaunchError
from bd3_megatron.files import create, move, reason_of, remove_leftovers

LEASE_FILE = "lease.json"
HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 120.0
"""Silence after which a launch on another machine is taken for gone: longer than a file server's fail-over usually takes."""
REQUEUED_STALE_SECONDS = 30.0
"""The same for an earlier attempt of the same SLURM job, which SLURM has ended or is about to end."""
WATCHED_SECONDS = 3 * HEARTBEAT_SECONDS
"""How long a heartbeat is looked for before a lease is taken over, however old it seems: clocks may be wrong."""
PATIENCE_SECONDS = 240.0
"""Longest wait for a verdict."""
LEASE_POLL_SECONDS = 0.5
TURN_SECONDS = 60.0
"""Age at which the turn of a launch that was killed while it took a folder over is given to the next."""
TURN_POLL_SECONDS = 0.02

Verdict = Literal["refuse", "wait", "take over"]


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that holds a folder."""

    host: str
    process: int
    """Process id on that host."""
    ticks: int
    """When the process started, in clock ticks since that host's boot: ids are used again."""
    machine: str
    """Of `machine_id`."""
    job: str | None
    """SLURM's job id; None outside SLURM."""
    requeues: int
    """How often SLURM has started the job again; status.json counts the attempts of a run."""
    started: float
    """When the folder was taken, seconds since the epoch."""
    token: str
    """Random, so that no two leases are alike."""

    def is_sound(self) -> bool:
        """Whether the values could be a process's: a file may hold anything."""
        texts = isinstance(self.job, str | None) and all(
            isinstance(text, str) for text in (self.host, self.machine, self.token)
        )
        counts = (self.process, self.ticks, self.requeues)
        # ids of processes have 31 bits at most, dates end with the year 9999
        numbers = all(type(count) is int and 0 <= count < 2**63 for count in counts) and 0 < self.process < 2**31
        return texts and numbers and type(self.started) in (int, float) and 0 <= self.started < 253402300799

    def described(self) -> str:
        """Host, process, job and start, for people."""
        job = f"SLURM job {self.job}" if self.job else "no SLURM job"
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"host {self.host}, process {self.process}, {job}, started {since}"


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """A lease as it was read once."""

    holder: Holder | None
    """None where the file does not say: it is being written, or damaged."""
    heartbeat: float
    """Modification time of the file."""
    age_seconds: float
    """Since the heartbeat, by the file system's own clock."""


def node_name() -> str:
    """This machine's name as SLURM knows it, else as it calls itself."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def machine_id() -> str:
    """A text that two processes share only if each can look the other up by its process id."""
    # a machine keeps its name over a reboot, and containers of one name have process ids of their own
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def start_ticks(process: int) -> int | None:
    """Clock ticks from boot to the start of a process of this machine; None where it has ended or cannot be seen."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # the second field is a name in brackets, which may hold blanks and brackets itself
    state, *fields = stat.rsplit(")", 1)[1].split()
    # a zombie does nothing any more, it only waits to be reaped
    return None if state in "ZX" else int(fields[18])


def is_running(process: int, ticks: int) -> bool | None:
    """Whether the process that started at `ticks` runs on this machine; None where the system does not let us know."""
    found = start_ticks(process)
    if found is not None:
        return found == ticks
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        # /proc may hide other users' processes (hidepid)
        return None
    # it is there, but as a zombie
    return False


def this_process() -> Holder:
    """The calling process as a holder."""
    process = os.getpid()
    ticks = start_ticks(process)
    assert ticks is not None, "a process sees itself in /proc"
    return Holder(
        host=node_name(),
        process=process,
        ticks=ticks,
        machine=machine_id(),
        job=os.environ.get("SLURM_JOB_ID"),
        requeues=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        started=time.time(),
        token=secrets.token_hex(8),
    )


def verdict_on(found: Sighting, mine: Holder, *, has_moved: bool, watched_seconds: float) -> Verdict:
    """Whether a lease keeps `mine` out.

    Args:
        found: the lease as last read.
        mine: who asks.
        has_moved: the heartbeat has changed since it was first looked at.
        watched_seconds: how long it has been looked at.
    """
    holder = found.holder
    if holder is None:
        return "wait" if found.age_seconds < STALE_SECONDS or watched_seconds < WATCHED_SECONDS else "take over"
    requeued = holder.job is not None and holder.job == mine.job and holder.requeues < mine.requeues
    runs = is_running(holder.process, holder.ticks) if holder.machine == mine.machine else None
    # on one machine the process table is certain: a dead owner's lease is replaced at once
    if runs is False:
        return "take over"
    if (runs or has_moved) and not requeued:
        return "refuse"
    # an earlier attempt of this job is ending; it may have to save first
    limit = REQUEUED_STALE_SECONDS if requeued else STALE_SECONDS
    silent = found.age_seconds >= limit and watched_seconds >= WATCHED_SECONDS and not runs
    return "take over" if silent else "wait"


class Lease:
    """A folder that this process holds until `release`; made by `acquire`.

    Args:
        path: the lease's file, which is ours.
        holder: this process.
        on_loss: called from the heartbeat's thread, with a sentence, when the file has become another's.
        beat_seconds: between two heartbeats.
    """

    def __init__(
        self, path: Path, holder: Holder, on_loss: Callable[[str], None], *, beat_seconds: float = HEARTBEAT_SECONDS
    ) -> None:
        self.path, self.holder, self._on_loss, self._beat_seconds = path, holder, on_loss, beat_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat_until_end, name="lease", daemon=True)
        self._thread.start()

    def beat(self) -> Holder | None:
        """Renew the heartbeat; returns who else the file names, where it has become another's."""
        found = read_holder(self.path)
        if found is not None and found.token != self.holder.token:
            return found
        if found is None:
            # Somebody removed the file by hand: who is first to write it again holds the folder. A folder that is gone was
            # given up by its holder and does not come back.
            _create(self.path, self.holder)
        else:
            os.utime(self.path)
        return None

    def release(self) -> None:
        """Give the folder back; nothing happens where it has become another's, or in a forked child."""
        if os.getpid() != self.holder.process:
            return
        self._ended.set()
        self._thread.join()
        found = read_holder(self.path)
        if found is not None and found.token == self.holder.token:
            self.path.unlink(missing_ok=True)

    def _beat_until_end(self) -> None:
        while not self._ended.wait(self._beat_seconds):
            # a file server that does not answer for a while is no reason to stop; another holder is
            with contextlib.suppress(OSError):
                successor = self.beat()
                if successor is not None:
                    self._on_loss(f"{self.path} names {successor.described()} now; this process ends.")
                    return


@contextlib.contextmanager
def held(folder: Path, *, name: str, say: Callable[[str], None] = lambda said: None) -> Iterator[Lease]:
    """Hold a folder inside the block: as `acquire`, then `release`."""
    lease = acquire(folder / LEASE_FILE, name=name, say=say)
    try:
        yield lease
    finally:
        lease.release()


@contextlib.contextmanager
def held_output(out: Path) -> Iterator[None]:
    """Hold a file or folder that appears only when it is complete; the lease lies beside it until then.

    What killed writers left beside it is removed.

    Args:
        out: the file or folder; need not exist.

    Raises:
        FolderHeldError, LaunchError: as `acquire`.
    """
    out = out.absolute()
    made = [folder for folder in out.parents if not folder.exists()]
    lease = acquire(out.with_name(f".{out.name}.{LEASE_FILE}"), name=f"out={out}")
    try:
        remove_leftovers(out.parent)
        yield
    finally:
        lease.release()
        # where nothing came of it, nothing is left behind
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


def acquire(
    path: Path,
    *,
    name: str,
    say: Callable[[str], None] = lambda said: None,
    patience_seconds: float = PATIENCE_SECONDS,
    sleep: Callable[[float], None] = time.sleep,
) -> Lease:
    """Take a folder, after waiting where it must first be seen whether its owner is gone.

    Args:
        path: the lease's file; its folder is made.
        name: what is held, as the user named it ("run.dir=runs/x").
        say: told what is waited for and what is taken over.
        patience_seconds: longest wait; after it the folder counts as held.
        sleep: passes time between two looks.

    Raises:
        FolderHeldError: another launch holds it; names host, process and SLURM job.
        LaunchError: the file cannot be written.
    """
    mine = this_process()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # creating the file is what decides: of many launches one succeeds
        while not _create(path, mine):
            first = look(path, mine)
            if first is None or _settled(path, mine, first, _Wait(name, say, patience_seconds, sleep)):
                continue
    except OSError as error:
        raise LaunchError(f"{name}: '{path}' cannot be written ({reason_of(error)}); choose another folder.") from error
    return Lease(path, mine, _end_process)


@dataclass(frozen=True)
class _Wait:
    """How a verdict is waited for: as `acquire`."""

    name: str
    say: Callable[[str], None]
    patience_seconds: float
    sleep: Callable[[float], None]


def _settled(path: Path, mine: Holder, first: Sighting, wait: _Wait) -> bool:
    """Look at a lease until it is gone or was put aside.

    Raises:
        FolderHeldError: it stands.
    """
    found: Sighting | None = first
    looks = 0
    while found is not None:
        watched = looks * LEASE_POLL_SECONDS
        verdict = verdict_on(found, mine, has_moved=found.heartbeat != first.heartbeat, watched_seconds=watched)
        if verdict == "take over":
            if _put_aside(path, found, mine):
                wait.say(f"{wait.name} was held by {_who(found)}, which is gone: takes it over")
            return True
        if verdict == "refuse" or watched >= wait.patience_seconds:
            raise FolderHeldError(
                f"{wait.name} is held by another launch ({_who(found)}, last heartbeat {found.age_seconds:.0f} s ago); "
                "wait for it, stop it, or name another folder."
            )
        if looks == 0:
            wait.say(f"{wait.name} is held by {_who(found)}: waits for its end, or for a sign of life")
        wait.sleep(LEASE_POLL_SECONDS)
        looks += 1
        found = look(path, mine)
    return True


def _who(found: Sighting) -> str:
    return "an unnamed process" if found.holder is None else found.holder.described()


def look(path: Path, mine: Holder) -> Sighting | None:
    """A lease as it is now; None where there is none."""
    clock = path.with_name(f".{path.name}.{mine.token}")
    try:
        # opening asks the server; a mere stat may be answered from this client's cache
        with path.open("rb") as file:
            content, heartbeat = file.read(), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
    # a new file's time is the file server's clock, against which the heartbeat is measured
    clock.touch()
    now = clock.stat().st_mtime
    clock.unlink()
    return Sighting(holder=_parsed(content), heartbeat=heartbeat, age_seconds=max(0.0, now - heartbeat))


def is_held(path: Path) -> bool:
    """Whether a folder seems to be held, by one look that writes nothing: for reports."""
    try:
        holder = read_holder(path)
    except OSError:
        # a folder of that name, or a file that is not ours to read
        return False
    if holder is None:
        return False
    runs = is_running(holder.process, holder.ticks) if holder.machine == machine_id() else None
    try:
        # this machine's clock, because a look that writes nothing cannot ask the server's
        age_seconds = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return False
    return age_seconds < STALE_SECONDS if runs is None else runs


def read_holder(path: Path) -> Holder | None:
    """Who holds a folder by its lease's file; None where nobody does or the file does not say."""
    try:
        return _parsed(path.read_bytes())
    except FileNotFoundError:
        return None


def _parsed(content: bytes) -> Holder | None:
    try:
        found = Holder(**json.loads(content))
    # half written, or not ours at all
    except (ValueError, TypeError, RecursionError):
        return None
    return found if found.is_sound() else None


def _create(path: Path, holder: Holder) -> bool:
    """Write a lease where there is none; False where there is one."""
    return create(path, json.dumps(asdict(holder)) + "\n")


def _put_aside(path: Path, found: Sighting, mine: Holder, *, sleep: Callable[[float], None] = time.sleep) -> bool:
    """Remove the lease that was examined, and only that one; False where it was another's by then."""
    turn = path.with_name(f".{path.name}.turn")
    # one launch at a time: between one's look and its removal another could take the folder, and a third one the name
    while not create(turn, mine.token):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - turn.stat().st_mtime >= TURN_SECONDS:
                turn.unlink()
        sleep(TURN_POLL_SECONDS)
    try:
        return _moved_away(path, found, path.with_name(f".{path.name}.{mine.token}.old"))
    finally:
        turn.unlink(missing_ok=True)


def _moved_away(path: Path, found: Sighting, aside: Path) -> bool:
    if read_holder(path) != found.holder:
        return False
    try:
        # renamed before it is compared: since the last look another launch may have replaced it
        move(path, aside)
    except FileNotFoundError:
        return False
    same = read_holder(aside) == found.holder
    if not same:
        # its owner came back to life and gave it up, and this is a successor's: put it back
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink()
    return same


def _end_process(sentence: str) -> None:
    print(f"bd3: error: {sentence}", file=sys.stderr, flush=True)
    # whatever this process still writes would be mixed with the new owner's
    os._exit(FolderHeldError.exit_code)
