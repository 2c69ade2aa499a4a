"""The environment of ranks: one table of settings with reasons, the rendezvous, and which devices are there.

Decides: what a rank finds in os.environ before torch is imported, however it was started. What the user exported wins
over the table. Refuses: nothing. Imports no torch: devices are counted from what the driver shows, and torch's build
is told from its files.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bd3_megatron.errors import LaunchError

Place = Literal["everywhere", "cpu", "gpu", "local", "cluster"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One environment variable of a rank: where it applies, and why."""

    name: str
    value: str
    place: Place
    reason: str


SETTINGS: tuple[Setting, ...] = (
    Setting(
        name="OMP_NUM_THREADS",
        value="1",
        place="everywhere",
        reason="ranks share the cores of a node; more threads a rank than cores a rank makes all of them slower",
    ),
    Setting(
        name="PYTHONFAULTHANDLER",
        value="1",
        place="everywhere",
        reason="a rank that dies in native code (SIGSEGV, SIGBUS, SIGABRT) prints the Python stack it died in",
    ),
    Setting(
        name="TOKENIZERS_PARALLELISM",
        value="false",
        place="everywhere",
        reason="the tokenizers library keeps threads that deadlock in forked loader processes",
    ),
    Setting(
        name="DS_ACCELERATOR",
        value="cpu",
        place="cpu",
        reason="DeepSpeed otherwise guesses its accelerator from the packages that are installed",
    ),
    Setting(
        name="GLOO_SOCKET_IFNAME",
        value="lo",
        place="local",
        reason="gloo resolves the host name otherwise, which fails on machines without a network",
    ),
    Setting(
        name="TORCH_NCCL_ASYNC_ERROR_HANDLING",
        value="1",
        place="gpu",
        reason="a collective that failed or timed out ends its process instead of blocking the others for ever",
    ),
    Setting(
        name="TORCH_NCCL_DUMP_ON_TIMEOUT",
        value="1",
        place="gpu",
        reason="on a time-out the flight recorder's last collectives are written, which name the rank that did not come",
    ),
    Setting(
        name="TORCH_NCCL_TRACE_BUFFER_SIZE",
        value="2000",
        place="gpu",
        reason="entries of that flight recorder; 0, the default, records nothing",
    ),
    Setting(
        name="TORCH_NCCL_AVOID_RECORD_STREAMS",
        value="1",
        place="gpu",
        reason="keeps tensors of pending collectives alive by reference, so that their memory is reused at once",
    ),
    Setting(
        name="CUDA_DEVICE_MAX_CONNECTIONS",
        value="1",
        place="gpu",
        reason="megatron-core's overlap of tensor-parallel communication relies on kernels starting in launch order",
    ),
    Setting(
        name="PYTORCH_CUDA_ALLOC_CONF",
        value="expandable_segments:True",
        place="gpu",
        reason="evaluation and training have other shapes; segments that grow lose less memory to fragmentation",
    ),
    Setting(
        name="NCCL_SOCKET_FAMILY",
        value="AF_INET",
        place="cluster",
        reason="nodes with half-configured IPv6 otherwise wait out a connection time-out before they use IPv4",
    ),
    Setting(
        name="NCCL_DEBUG",
        value="WARN",
        place="cluster",
        reason="NCCL then says which transport or peer failed; INFO prints hundreds of lines a rank",
    ),
)


def rank_settings(environ: Mapping[str, str], *, gpu: bool, local: bool) -> dict[str, str]:
    """The table's rows for this place that the user has not set.

    Args:
        environ: what the user exported; those names are left alone.
        gpu: ranks run on CUDA devices.
        local: all ranks run on this machine.

    Returns:
        Names and values to add to the environment.
    """
    places = {"everywhere", "gpu" if gpu else "cpu", "local" if local else "cluster"}
    return {s.name: s.value for s in SETTINGS if s.place in places and s.name not in environ}


def visible_gpus(environ: Mapping[str, str] | None = None) -> int:
    """CUDA devices a process started now could use: 0 without a driver, or where torch is a CPU build."""
    environ = os.environ if environ is None else environ
    if not torch_has_cuda():
        return 0
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    present = devices_present()
    if chosen is None or present == 0:
        return present
    # CUDA reads the list up to the first entry it does not know; "-1" and "" hide every device
    names = [name.strip() for name in chosen.split(",")]
    kept = 0
    for name in names:
        if not name or name == "-1":
            break
        kept += 1
    return kept


def devices_present() -> int:
    """NVIDIA devices the kernel shows; containers may hide /proc/driver, hence the device files as well."""
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) or len(list(Path("/dev").glob("nvidia[0-9]*")))


def torch_has_cuda() -> bool:
    """True when the installed torch is a CUDA build, told from its shared libraries without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    return (Path(spec.origin).parent / "lib" / "libtorch_cuda.so").is_file()


@dataclass(frozen=True, kw_only=True)
class Membership:
    """This process's place in a job that something else started, and the variables that torch's env:// wants."""

    rank: int
    world_size: int
    local_rank: int
    variables: Mapping[str, str]


def membership(environ: Mapping[str, str]) -> Membership | None:
    """Where this process stands, or None when nobody started it as a rank.

    torchrun (or anything else that sets its variables) wins over SLURM, because a torchrun agent is itself a SLURM task.

    Args:
        environ: the process's environment.

    Raises:
        LaunchError: half of a rendezvous is there (RANK without MASTER_ADDR, say).
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _torchrun_membership(environ)
    # a batch script sees SLURM_PROCID=0 as well; only a step of several tasks is a job of ranks
    if "SLURM_STEP_ID" in environ and int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return _slurm_membership(environ)
    return None


def _torchrun_membership(environ: Mapping[str, str]) -> Membership:
    absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environ]
    if absent:
        raise LaunchError(
            f"RANK={environ['RANK']} and WORLD_SIZE={environ['WORLD_SIZE']} are set but {absent[0]} is not; "
            "start with torchrun, or unset RANK and WORLD_SIZE to start local ranks."
        )
    return Membership(
        rank=int(environ["RANK"]),
        world_size=int(environ["WORLD_SIZE"]),
        local_rank=int(environ.get("LOCAL_RANK", "0")),
        variables={},
    )


def _slurm_membership(environ: Mapping[str, str]) -> Membership:
    rank, size = int(environ["SLURM_PROCID"]), int(environ["SLURM_STEP_NUM_TASKS"])
    local_rank = int(environ.get("SLURM_LOCALID", "0"))
    variables = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(local_rank)}
    if "MASTER_ADDR" not in environ:
        variables["MASTER_ADDR"] = _first_node(environ)
    if "MASTER_PORT" not in environ:
        variables["MASTER_PORT"] = str(slurm_port(environ))
    return Membership(rank=rank, world_size=size, local_rank=local_rank, variables=variables)


def slurm_port(environ: Mapping[str, str]) -> int:
    """A rendezvous port all tasks agree on: another one for every job, requeue and step, so that none meets a dead one's."""
    job, restarts = int(environ["SLURM_JOB_ID"]), int(environ.get("SLURM_RESTART_COUNT", "0"))
    return 20000 + (7 * job + restarts + 101 * int(environ.get("SLURM_STEP_ID", "0"))) % 12000


def _first_node(environ: Mapping[str, str]) -> str:
    if environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES")) == "1":
        return "127.0.0.1"
    nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
    # a plain name needs no expansion, hence no client program
    if "[" not in nodes:
        return nodes.split(",")[0]
    shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
    if shown.returncode != 0 or not shown.stdout.strip():
        raise LaunchError(f"scontrol cannot expand the node list {nodes}; export MASTER_ADDR in the batch script.")
    return shown.stdout.split()[0]
