"""The environment of ranks: one table of settings with reasons, the rendezvous, and which devices are there.

What the user exported wins over the table. Torch-free: devices are counted from what the driver shows, and torch's build is
told from its files.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bd3_megatron.errors import LaunchError, cut, shown

Scope = Literal["everywhere", "cpu", "gpu", "local", "cluster"]


@dataclass(frozen=True)
class Setting:
    """An environment variable of a rank."""

    name: str
    value: str
    scope: Scope
    """Ranks that get it."""


SETTINGS: tuple[Setting, ...] = (
    # ranks share the cores of a node; more threads a rank than cores a rank makes all of them slower
    Setting("OMP_NUM_THREADS", "1", "everywhere"),
    # a rank that dies in native code (SIGSEGV, SIGBUS, SIGABRT) prints the Python stack it died in
    Setting("PYTHONFAULTHANDLER", "1", "everywhere"),
    # the tokenizers library keeps threads that deadlock in forked loader processes
    Setting("TOKENIZERS_PARALLELISM", "false", "everywhere"),
    # DeepSpeed otherwise guesses its accelerator from the packages that are installed
    Setting("DS_ACCELERATOR", "cpu", "cpu"),
    # gloo resolves the host name otherwise, which fails on machines without a network
    Setting("GLOO_SOCKET_IFNAME", "lo", "local"),
    # a collective that failed or timed out ends its process instead of blocking the others for ever
    Setting("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1", "gpu"),
    # on a time-out the flight recorder's last collectives are written, which name the rank that did not come
    Setting("TORCH_NCCL_DUMP_ON_TIMEOUT", "1", "gpu"),
    # entries of that flight recorder; 0, the default, records nothing
    Setting("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000", "gpu"),
    # keeps tensors of pending collectives alive by reference, so that their memory is reused at once
    Setting("TORCH_NCCL_AVOID_RECORD_STREAMS", "1", "gpu"),
    # megatron-core's overlap of tensor-parallel communication relies on kernels starting in launch order
    Setting("CUDA_DEVICE_MAX_CONNECTIONS", "1", "gpu"),
    # evaluation and training have other shapes; segments that grow lose less memory to fragmentation
    Setting("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", "gpu"),
    # nodes with half-configured IPv6 otherwise wait out a connection time-out before they use IPv4
    Setting("NCCL_SOCKET_FAMILY", "AF_INET", "cluster"),
    # NCCL then says which transport or peer failed; INFO prints hundreds of lines a rank
    Setting("NCCL_DEBUG", "WARN", "cluster"),
)
"""Each with its reason above it."""


def rank_settings(environ: Mapping[str, str], *, gpu: bool, local: bool) -> dict[str, str]:
    """The table's rows for these ranks that the user has not set.

    Args:
        environ: what the user exported; those names are left alone.
        gpu: ranks run on CUDA devices.
        local: all ranks run on this machine.

    Returns:
        Names and values to add to the environment.
    """
    scopes = {"everywhere", "gpu" if gpu else "cpu", "local" if local else "cluster"}
    return {s.name: s.value for s in SETTINGS if s.scope in scopes and s.name not in environ}


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
    """This process's rank in a job that something else started, and the variables that torch's env:// wants."""

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
    if "SLURM_STEP_ID" in environ and _whole(environ, "SLURM_STEP_NUM_TASKS", default=1) > 1:
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
        rank=_whole(environ, "RANK"),
        world_size=_whole(environ, "WORLD_SIZE"),
        # mpirun and others start one process a node without it
        local_rank=_whole(environ, "LOCAL_RANK", default=0),
        variables={},
    )


def _slurm_membership(environ: Mapping[str, str]) -> Membership:
    rank, size = _whole(environ, "SLURM_PROCID"), _whole(environ, "SLURM_STEP_NUM_TASKS")
    local_rank = _whole(environ, "SLURM_LOCALID", default=0)
    variables = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(local_rank)}
    if "MASTER_ADDR" not in environ:
        variables["MASTER_ADDR"] = _first_node(environ)
    if "MASTER_PORT" not in environ:
        variables["MASTER_PORT"] = str(slurm_port(environ))
    return Membership(rank=rank, world_size=size, local_rank=local_rank, variables=variables)


FIRST_PORT, NUM_PORTS, PORTS_A_JOB = 20_000, 12_000, 7
"""Rendezvous ports under SLURM, below 32768, where Linux begins to hand out ports by itself; attempts of a job take several."""


def slurm_port(environ: Mapping[str, str]) -> int:
    """A rendezvous port all tasks agree on: another one for every job, requeue and step, so that none meets a dead one's."""
    job, restarts = _whole(environ, "SLURM_JOB_ID"), _whole(environ, "SLURM_RESTART_COUNT", default=0)
    step = _whole(environ, "SLURM_STEP_ID", default=0)
    return FIRST_PORT + (PORTS_A_JOB * job + restarts + 101 * step) % NUM_PORTS


def _whole(environ: Mapping[str, str], name: str, *, default: int | None = None) -> int:
    """A number that torchrun or SLURM has set."""
    text = environ.get(name)
    if text is None:
        if default is None:
            raise LaunchError(f"{name} is not set; start with torchrun or srun, which set it.")
        return default
    if not text.isascii() or not text.isdigit():
        raise LaunchError(f"{name}={shown(text)} is not a whole number; start with torchrun or srun, or unset it.")
    return int(text)


def _first_node(environ: Mapping[str, str]) -> str:
    if environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES")) == "1":
        return "127.0.0.1"
    nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
    # a plain name needs no expansion, hence no client program
    if "[" not in nodes:
        return nodes.split(",")[0]
    done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
    if done.returncode != 0 or not done.stdout.strip():
        raise LaunchError(f"scontrol cannot expand the node list {cut(nodes)}; export MASTER_ADDR in the batch script.")
    return done.stdout.split()[0]
