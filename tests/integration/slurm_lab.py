"""A real SLURM on one machine: munged, slurmctld and N slurmd from Debian packages, without systemd, in one directory.

Decides: the layout. `netns` gives every node its own network, host name, mounts and process ids, joined by a bridge in a
controller namespace without a route out; killing a node's first process is a power failure. `loopback` puts every slurmd
on 127.0.1.N and needs no privileges. Refuses: to start where the programs are absent. Costs: 0.3 to 1.1 s up, 0.6 s down;
every daemon is a child of this process and dies with it.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
SYSTEM_PATH = ":/usr/sbin:/sbin"

SLURM_CONF = """\
ClusterName=lab
SlurmctldHost={controller}
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits this long; 5 is the least that is heeded
AuthInfo=socket={root}/munge.sock,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# nodes claim more processors than the machine has
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=100000,bf_interval=5,batch_sched_delay=1,sched_interval=5
# a node taken down stays down, one that was lost comes back by itself
ReturnToService=1
SlurmctldTimeout=30
# how soon a dead node is noticed; less flaps on a busy machine
SlurmdTimeout=15
InactiveLimit=0
KillWait=20
UnkillableStepTimeout=30
MessageTimeout=30
BatchStartTimeout=30
MinJobAge=7200
JobRequeue=1
GresTypes=gpu
{nodes}
{partitions}
"""

PARTITIONS = ("main", "gpu", "batch", "h100")
"""Queues of the shipped cluster profiles."""

GPU_TYPES = ("a100", "h100")
GPUS = 8
CPUS = 128


def missing_programs() -> str | None:
    """Why a cluster cannot run here, with the remedy; None when it can."""
    path = os.environ.get("PATH", "") + SYSTEM_PATH
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if not absent:
        return None
    return (
        f"SLURM is not installed (no {', '.join(absent)}): "
        "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
    )


def can_make_namespaces() -> bool:
    """True where this user may make networks of its own."""
    probe = "ip link add br0 type bridge && ip link add v0 type veth peer name v1"
    command = ["unshare", "-n", "-m", "-u", "-p", "--fork", "sh", "-c", probe]
    return subprocess.run(command, capture_output=True).returncode == 0


@dataclass(frozen=True)
class Node:
    """One node: its name, its address, and (loopback) the port of its slurmd."""

    number: int
    name: str
    address: str
    port: int


class SlurmLab:
    """A running cluster; a context manager.

    Args:
        root: an empty directory for all state.
        num_nodes: slurmd to start.
        layout: "netns", "loopback", or "auto" for the first where it is allowed.
    """

    def __init__(self, root: Path, *, num_nodes: int = 4, layout: str = "auto") -> None:
        self.root = root.resolve()
        self.layout = ("netns" if can_make_namespaces() else "loopback") if layout == "auto" else layout
        self.port = 17000 + (os.getpid() * 37) % 8000
        prefix = "10.77.0" if self.layout == "netns" else "127.0.1"
        numbers = range(1, num_nodes + 1)
        self.nodes = [Node(n, f"n{n}", f"{prefix}.{n}", self.port + n) for n in numbers]
        self.environment = _environment(self.root)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._first_process: dict[str, int] = {}

    def __enter__(self) -> SlurmLab:
        try:
            self.up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.down()

    def up(self) -> None:
        """Start everything and wait until all nodes are idle."""
        self._write_files()
        root = self.root
        munge = [f"--{name}-file={root}/munge/{name}" for name in ("key", "seed")]
        munge += [f"--pid-file={root}/run/munged.pid", f"--log-file={root}/log/munged.log"]
        self._spawn("munged", ["munged", "-F", "--force", f"--socket={root}/munge.sock", *munge])
        _wait_for(lambda: (root / "munge.sock").exists(), "munged's socket")
        if self.layout == "netns":
            self._make_network()
        self.start_controller(clean=True)
        for node in self.nodes:
            self.start_node(node)
        self.wait_idle()

    def start_controller(self, *, clean: bool = False) -> None:
        """Start slurmctld; `clean` forgets every job."""
        state = ["-c"] if clean else []
        self._spawn("slurmctld", self.inside(["slurmctld", "-D", *state, "-f", f"{self.root}/slurm.conf"]))

    def stop_controller(self) -> None:
        """Stop slurmctld as a site does for maintenance: jobs go on."""
        process = self._processes.pop("slurmctld")
        process.terminate()
        process.wait(timeout=30)

    def start_node(self, node: Node) -> None:
        """Start a node's slurmd."""
        command = ["slurmd", "-D", "-N", node.name, "-f", f"{self.root}/slurm.conf"]
        if self.layout == "netns":
            self._start_machine(node, command)
        else:
            self._spawn(node.name, command)

    def crash_node(self, node: Node) -> None:
        """A power failure: all of the node's processes at once (loopback: its slurmd only)."""
        process = self._processes.pop(node.name)
        if self.layout == "netns":
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._first_process[node.name], signal.SIGKILL)
        process.kill()
        process.wait()

    def set_link(self, node: Node, *, up: bool) -> None:
        """Plug or pull a node's cable (netns only); what runs on it goes on."""
        link = ["nsenter", "-t", str(self._processes["network"].pid), "-n", "ip", "link", "set", f"v{node.number}"]
        subprocess.run([*link, "up" if up else "down"], check=True)

    def wait_idle(self, timeout: float = 60.0) -> None:
        """Wait until every node is idle."""

        def idle() -> bool:
            shown = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T", check=False).stdout.split("\n")
            states = dict(line.split() for line in shown if len(line.split()) == 2)
            return len(states) == len(self.nodes) and set(states.values()) == {"idle"}

        _wait_for(idle, "idle nodes", timeout)

    def run(
        self, *command: str | Path, check: bool = True, timeout: float = 120.0, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a client where the controller is."""
        inside = self.inside([str(word) for word in command], cwd)
        done = subprocess.run(inside, env=self.environment, text=True, capture_output=True, timeout=timeout, cwd=cwd)
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(map(str, command))} ended with {done.returncode}: {done.stderr}")
        return done

    def inside(self, command: Sequence[str], cwd: Path | None = None) -> list[str]:
        """The command as it runs in the controller's namespaces."""
        if self.layout != "netns":
            return list(command)
        controller = str(self._processes["network"].pid)
        return ["nsenter", "-t", controller, "-n", "-m", "-u", f"--wd={cwd or os.getcwd()}", "--", *command]

    def down(self) -> None:
        """Stop everything; leaves no process."""
        if "slurmctld" in self._processes:
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                self.run("scancel", "-f", "--signal=KILL", "--state=RUNNING", timeout=10)
        for first in self._first_process.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(first, signal.SIGKILL)
        for process in reversed(self._processes.values()):
            process.terminate()
        deadline = time.monotonic() + 5
        for process in reversed(self._processes.values()):
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()
        self._first_process.clear()
        self._sweep()

    def _sweep(self) -> None:
        # a slurmstepd detaches itself and outlives its slurmd; it carries this lab's SLURM_CONF
        mark = b"SLURM_CONF=" + str(self.root / "slurm.conf").encode() + b"\0"
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (folder / "environ").read_bytes() and int(folder.name) != os.getpid():
                    os.kill(int(folder.name), signal.SIGKILL)

    def _spawn(self, key: str, command: Sequence[str]) -> None:
        # should the test process be killed, nothing is left behind
        guarded = ["setpriv", "--pdeathsig", "KILL", *command]
        with (self.root / "log" / f"{key}.out").open("ab") as log:
            self._processes[key] = subprocess.Popen(
                guarded,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd="/",
            )

    def _write_files(self) -> None:
        root = self.root
        for name in ("munge", "spool", "state", "log", "run"):
            (root / name).mkdir(parents=True, exist_ok=True)
        for node in self.nodes:
            (root / "spool" / node.name).mkdir(exist_ok=True)
        (root / "munge").chmod(0o700)
        (root / "munge/key").write_bytes(os.urandom(1024))
        (root / "munge/key").chmod(0o600)
        (root / "slurm.conf").write_text(self._configuration())
        # terminals stand in for devices: SLURM only asks that the files exist
        devices = [
            f"Name=gpu Type={kind} File=/dev/tty[{8 * i}-{8 * i + GPUS - 1}]" for i, kind in enumerate(GPU_TYPES)
        ]
        names = f"n[1-{len(self.nodes)}]"
        (root / "gres.conf").write_text("".join(f"NodeName={names} {line}\n" for line in devices))
        (root / "nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\nhosts: files\n")
        hosts = ["127.0.0.1 localhost", "10.77.0.254 ctl", *(f"{n.address} {n.name}" for n in self.nodes)]
        (root / "hosts").write_text("\n".join(hosts) + "\n")

    def _configuration(self) -> str:
        host = socket.gethostname().split(".")[0]
        netns = self.layout == "netns"
        devices = ",".join(f"gpu:{kind}:{GPUS}" for kind in GPU_TYPES)
        what = f"CPUs={CPUS} RealMemory=4000 Gres={devices} Feature=ib State=UNKNOWN"
        lines = []
        for node in self.nodes:
            place = "" if netns else f"NodeHostname={host} Port={node.port} "
            lines.append(f"NodeName={node.name} NodeAddr={node.address} {place}{what}")
        queues = [f"PartitionName={p} Nodes=ALL Default={'YES' if p == 'main' else 'NO'} State=UP" for p in PARTITIONS]
        return SLURM_CONF.format(
            root=self.root,
            controller="ctl(10.77.0.254)" if netns else f"{host}(127.0.0.1)",
            port=self.port,
            user=pwd.getpwuid(os.getuid()).pw_name,
            nodes="\n".join(lines),
            partitions="\n".join(queues),
        )

    def _mounts(self) -> str:
        files = ("hosts", "nsswitch.conf")
        return "; ".join(f"mount --bind {self.root}/{name} /etc/{name}" for name in files)

    def _make_network(self) -> None:
        ready = self.root / "run/network.ready"
        setup = (
            "hostname ctl; ip link set lo up; ip link add br0 type bridge; ip addr add 10.77.0.254/24 dev br0; "
            f"ip link set br0 up; {self._mounts()}; touch {ready}; exec sleep infinity"
        )
        self._spawn("network", ["unshare", "-n", "-m", "-u", "--propagation", "private", "bash", "-ec", setup])
        _wait_for(ready.exists, "the network")

    def _start_machine(self, node: Node, command: Sequence[str]) -> None:
        # a shell is the node's first process and reaps orphans; slurmd is its child
        setup = (
            f"hostname {node.name}; ip link set lo up; {self._mounts()}; "
            "until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done; "
            f"ip addr add {node.address}/24 dev eth0; ip link set eth0 up; "
            f"{' '.join(command)} & while :; do sleep 1000 & wait $!; done"
        )
        unshare = ["unshare", "-n", "-m", "-u", "-p", "--fork", "--kill-child=KILL", "--mount-proc"]
        self._spawn(node.name, [*unshare, "--propagation", "private", "bash", "-c", setup])
        parent = self._processes[node.name].pid
        children = Path(f"/proc/{parent}/task/{parent}/children")
        _wait_for(lambda: bool(children.read_text().split()), f"{node.name}'s first process")
        first = int(children.read_text().split()[0])
        own = os.readlink("/proc/self/ns/net")
        _wait_for(lambda: os.readlink(f"/proc/{first}/ns/net") != own, f"{node.name}'s network")
        self._first_process[node.name] = first
        link = ["nsenter", "-t", str(self._processes["network"].pid), "-n", "ip", "link"]
        port = f"v{node.number}"
        subprocess.run([*link, "del", port], capture_output=True)
        pair = ["type", "veth", "peer", "name", "eth0", "netns", str(first)]
        subprocess.run([*link, "add", port, *pair], check=True)
        subprocess.run([*link, "set", port, "master", "br0", "up"], check=True)


def _environment(root: Path) -> dict[str, str]:
    # a lab inside somebody's allocation must not inherit it
    foreign = ("SLURM_", "SBATCH_", "SRUN_", "BD3_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "PYTEST_", "COVERAGE_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    kept["PATH"] = kept.get("PATH", "/usr/bin:/bin") + SYSTEM_PATH
    return kept | {"SLURM_CONF": str(root / "slurm.conf"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def _wait_for(condition: Callable[[], bool], what: str, timeout: float = 30.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come within {timeout:.0f} s")
        time.sleep(0.02)
