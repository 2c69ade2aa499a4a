"""Which device a rank trains on, and the few device calls that have no device-neutral form.

Decides: CUDA when it is there, else CPU with gloo. Refuses devices that are named and not there. The rest of the package
speaks `torch.device`.
"""

from __future__ import annotations

import ctypes
import os
import resource

import torch

from bd3_megatron.errors import BackendError, shown

# glibc's malloc.h: from how many bytes on a block is mapped by itself, and how many free ones may lie at the heap's end
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1


def cuda_is_there() -> bool:
    """True when this process can use a CUDA device."""
    return torch.cuda.is_available()


def rank_device(local_rank: int) -> torch.device:
    """The device of a rank: its own GPU (made current), or the CPU."""
    if not cuda_is_there():
        return torch.device("cpu")
    # srun with --gpus-per-task shows each task one device, numbered 0
    index = local_rank % torch.cuda.device_count()
    # calls that name no device use the current one
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def named_device(name: str | None) -> torch.device:
    """The device that a person names for one process; None: an accelerator where there is one, else the CPU.

    Raises:
        BackendError: torch knows no such device, or it is not there.
    """
    accelerator = torch.accelerator.current_accelerator()
    if name is None:
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BackendError(f"device={shown(name)} is not known; use cpu, cuda or cuda:NUMBER.") from None
    if device.type == "cpu":
        return torch.device("cpu")
    there = torch.accelerator.device_count() if accelerator is not None and device.type == accelerator.type else 0
    if (device.index or 0) >= there:
        have = f"cpu or {device.type}:0 to {device.type}:{there - 1}" if there else "cpu"
        raise BackendError(f"device={shown(name)} is not visible to this process; use {have}.")
    return device


def raise_open_files_limit(wanted: int = 65_536) -> int:
    """Let this process and its children open as many files as the hard limit allows; returns the soft limit in force.

    Args:
        wanted: enough; a higher or unlimited hard limit is not used up.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # 1,024 is a usual soft limit, and sockets to 1,023 peers, data shards and checkpoint files together exceed it
    possible = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft == resource.RLIM_INFINITY or soft >= possible:
        return soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))
    return possible


def collective_backend(device: torch.device) -> str:
    """NCCL on GPU, gloo on CPU."""
    return "nccl" if device.type == "cuda" else "gloo"


def training_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Of parameters and activations: bf16 where asked, or by default on a GPU; else fp32.

    Args:
        precision: auto, fp32 or bf16.
        device: of the rank.
    """
    chosen = ("bf16" if device.type == "cuda" else "fp32") if precision == "auto" else precision
    return torch.bfloat16 if chosen == "bf16" else torch.float32


def device_name(device: torch.device) -> str:
    """The name the peak table is looked up by; 'cpu' on CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_memory_bytes(device: torch.device) -> int:
    """Largest allocation so far on a GPU; on CPU the largest resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux gives kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def limit_cpu_threads() -> None:
    """One intra-op thread a rank unless OMP_NUM_THREADS says otherwise: ranks on one CPU must not fight for its cores."""
    if not cuda_is_there():
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def keep_freed_memory() -> None:
    """On CPU, let malloc keep what a step frees for the next one.

    By default glibc returns large blocks to the kernel at once and takes them back as fresh pages, which it must fill with
    zeros: Adam's temporaries of 33 MB made the optimizer 2.4 times as slow (tools/bench/results/plan.md, case `wide`).
    """
    if cuda_is_there():
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            libc.mallopt(parameter, 2**31 - 1)


def use_device(device: torch.device) -> None:
    """Make a rank's GPU the current one of this thread; nothing on CPU."""
    # a new thread begins with device 0, and what it pins or allocates there would be another rank's memory
    if device.type == "cuda":
        torch.cuda.set_device(device)


class HostCopy:
    """Numbers on their way from a device to the host; nobody waits until they are read.

    Args:
        values: on the device; may be overwritten as soon as this returns.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self._event: torch.Event | None = None
        if values.device.type == "cpu":
            self._values = values.clone()
            return
        self._values = torch.empty_like(values, device="cpu", pin_memory=True)
        self._values.copy_(values, non_blocking=True)
        # read after this point of the stream: `.item()` would wait for everything that was queued behind it as well
        self._event = torch.Event(device=values.device)
        self._event.record()

    def read(self) -> torch.Tensor:
        """The numbers, on the host; waits until the device has passed the copy."""
        if self._event is not None:
            self._event.synchronize()
        return self._values


def occupied_fraction(device: torch.device) -> float:
    """Part of a GPU's memory that is in use, by whomever, 0 to 1; on CPU 0, for memory there is shared by design."""
    if device.type != "cuda":
        return 0.0
    free, total = torch.cuda.mem_get_info(device)
    return 1.0 - free / total


def release_memory(device: torch.device) -> None:
    """Give unused cached memory of a GPU back, and count its peak anew; nothing on CPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
