"""Machines a planner knows: memory, bandwidths and links of one device, and how devices are wired into a cluster.

Peaks of arithmetic are in `peaks.py` with their sources and are handed in. A cluster profile overrides any number here.
Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Annotated

from bd3_megatron.config.ranges import Range
from bd3_megatron.errors import ConfigError, counted, either, shown

GIB = 2**30
GB = 1e9
CPU_DEVICE = "cpu"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One device and its surroundings. Rates are bytes a second and device, in one direction."""

    name: str
    device_name: str
    """As the driver reports it: the key of the peak table."""
    peak_tflops: float
    """Dense, at the training precision; of one core where `cores` is given."""
    memory_bytes: float
    reserve_bytes: float = 4 * GIB
    """Kept free for the context, the allocator's fragmentation, kernels' workspaces and communication buffers."""
    memory_bytes_per_second: float
    gpus_per_node: int = 8
    intra_node_bytes_per_second: float
    intra_node_latency_seconds: float
    inter_node_bytes_per_second: float
    inter_node_latency_seconds: float
    cores: int = 0
    """Ranks share this many cores of one host (CPU runs); 0: every rank has its own device."""

    @property
    def device_type(self) -> str:
        """As torch calls it."""
        return "cpu" if self.cores else "cuda"


@dataclass(frozen=True, kw_only=True)
class ClusterFile:
    """The `planner` section of a cluster profile; each key replaces the number assumed for the device."""

    gpus_per_node: Annotated[int, Range(1, 1000)] | None = None
    """Devices that share fast links."""
    intra_node_gb_per_second: Annotated[float, Range(1e-6, 1e6)] | None = None
    """Between devices of a node, each direction, per device, 1e9 bytes."""
    inter_node_gb_per_second: Annotated[float, Range(1e-6, 1e6)] | None = None
    """Between nodes, each direction, per device (a card of 400 Gb/s for each GPU is 50)."""
    intra_node_latency_us: Annotated[float, Range(0, 1e9)] | None = None
    """Of one message inside a node."""
    inter_node_latency_us: Annotated[float, Range(0, 1e9)] | None = None
    """Of one message between nodes."""
    memory_gib: Annotated[float, Range(1e-6, 1e6)] | None = None
    """Of one device."""
    reserve_gib: Annotated[float, Range(0, 1e6)] | None = None
    """Kept free on each device."""
    peak_tflops: Annotated[float, Range(1e-6, 1e9)] | None = None
    """Of one device at the training precision; needed for a device without a known peak."""
    cores: Annotated[int, Range(1, 1e6)] | None = None
    """For CPU runs: cores of the host that all ranks share."""


@dataclass(frozen=True)
class _Device:
    device_name: str
    memory_gib: float
    memory_gb_s: float
    intra_gb_s: float
    inter_gb_s: float
    gpus_per_node: int = 8
    intra_us: float = 5
    inter_us: float = 15


# Memory in GiB and its rate in GB/s are from the makers' data sheets. Then follow the links in GB/s and one direction:
# inside a node NVLink or PCIe, between nodes one network card a device (400 Gb/s is 50, 10 Gb/s is 1.25). Links are
# assumptions to be corrected for a real cluster, and every plan prints them.
DEVICES: Mapping[str, _Device] = MappingProxyType(
    {
        "a100-40g": _Device("NVIDIA A100-SXM4-40GB", 40, 1555, 300, 25),
        "a100-80g": _Device("NVIDIA A100-SXM4-80GB", 80, 2039, 300, 25),
        "h100-sxm": _Device("NVIDIA H100 80GB HBM3", 80, 3350, 450, 50),
        "h100-pcie": _Device("NVIDIA H100 PCIe", 80, 2000, 50, 25),
        "h100-nvl": _Device("NVIDIA H100 NVL", 94, 3900, 50, 25),
        "h200": _Device("NVIDIA H200", 141, 4800, 450, 50),
        "h200-nvl": _Device("NVIDIA H200 NVL", 141, 4800, 50, 25),
        "b200": _Device("NVIDIA B200", 180, 7700, 900, 50),
        "gb200": _Device("NVIDIA GB200", 186, 8000, 900, 50, 72),
        "l40s": _Device("NVIDIA L40S", 48, 864, 25, 12.5),
        "rtx3090": _Device("NVIDIA GeForce RTX 3090", 24, 936, 12, 1.25),
        "rtx4090": _Device("NVIDIA GeForce RTX 4090", 24, 1008, 12, 1.25),
        "rtx5090": _Device("NVIDIA GeForce RTX 5090", 32, 1792, 25, 1.25),
        "a5000": _Device("NVIDIA RTX A5000", 24, 768, 12, 1.25),
        "a6000": _Device("NVIDIA RTX A6000", 48, 768, 12, 1.25),
        "mi300x": _Device("AMD Instinct MI300X", 192, 5300, 448, 50),
        # gloo on loopback, two ranks: a tensor's all-reduce takes 1.5 ms and 0.8 ms a MB, that of one number 0.3 ms
        "cpu": _Device(CPU_DEVICE, 64, 10, 2, 1, 1024, intra_us=750, inter_us=300),
    }
)


ALIASES: Mapping[str, str] = MappingProxyType({"a100": "a100-80g", "h100": "h100-sxm"})
"""Names people use for the usual form of a device; plans print the full name."""


def full_name(gpu: str) -> str:
    """The key of DEVICES for a device or its alias.

    Raises:
        ConfigError: the device is not known.
    """
    name = ALIASES.get(gpu, gpu)
    if name not in DEVICES:
        raise ConfigError(f"gpu {shown(gpu)} is not known; use {either(sorted([*DEVICES, *ALIASES]))}.")
    return name


def device_name_of(gpu: str) -> str:
    """Driver's name of a planner's device.

    Raises:
        ConfigError: the device is not known.
    """
    return DEVICES[full_name(gpu)].device_name


def machine_of(gpu: str, *, peak_tflops: float | None, cluster: ClusterFile | None = None) -> Machine:
    """A device with its usual node, corrected by a cluster file.

    Args:
        gpu: key of DEVICES or ALIASES.
        peak_tflops: from the peak table; None where that has none.
        cluster: replaces single numbers.

    Raises:
        ConfigError: unknown device, or no peak given for it.
    """
    name = full_name(gpu)
    known, given = DEVICES[name], cluster or ClusterFile()
    # a site's own number wins, for example of a card with a lowered power limit
    peak = given.peak_tflops or peak_tflops
    if peak is None:
        raise ConfigError(
            f"gpu '{gpu}' has no known peak at this precision; give planner.peak_tflops in a cluster profile."
        )
    machine = Machine(
        name=name,
        device_name=known.device_name,
        peak_tflops=peak,
        memory_bytes=(given.memory_gib or known.memory_gib) * GIB,
        memory_bytes_per_second=known.memory_gb_s * GB,
        gpus_per_node=given.gpus_per_node or known.gpus_per_node,
        intra_node_bytes_per_second=(given.intra_node_gb_per_second or known.intra_gb_s) * GB,
        intra_node_latency_seconds=known.intra_us * 1e-6,
        inter_node_bytes_per_second=(given.inter_node_gb_per_second or known.inter_gb_s) * GB,
        inter_node_latency_seconds=known.inter_us * 1e-6,
        # one core as the least of a host; a planner of CPU runs gives the real number
        cores=given.cores or (1 if known.device_name == CPU_DEVICE else 0),
    )
    return _with_small_numbers(machine, given)


def _with_small_numbers(machine: Machine, given: ClusterFile) -> Machine:
    # zero is a legal latency and a legal reserve
    if given.intra_node_latency_us is not None:
        machine = replace(machine, intra_node_latency_seconds=given.intra_node_latency_us * 1e-6)
    if given.inter_node_latency_us is not None:
        machine = replace(machine, inter_node_latency_seconds=given.inter_node_latency_us * 1e-6)
    if given.reserve_gib is not None:
        machine = replace(machine, reserve_bytes=given.reserve_gib * GIB)
    return machine


def assumptions(machine: Machine) -> list[str]:
    """What a plan takes for granted about the machine, one line each."""
    # rates in the units of data sheets, so that a reader can compare them at a glance
    lines = [
        f"device {machine.device_name}: {machine.peak_tflops:g} TFLOP/s peak at the training precision, "
        f"{machine.memory_bytes / GIB:g} GiB ({machine.reserve_bytes / GIB:g} kept free), "
        f"{machine.memory_bytes_per_second / GB:g} GB/s memory",
        f"{counted(machine.gpus_per_node, 'device')} a node; {machine.intra_node_bytes_per_second / GB:g} GB/s and "
        f"{machine.intra_node_latency_seconds * 1e6:g} us inside it, {machine.inter_node_bytes_per_second / GB:g} GB/s and "
        f"{machine.inter_node_latency_seconds * 1e6:g} us between nodes (per device, each direction)",
    ]
    return lines + ([f"all ranks share {machine.cores} cores of one host"] if machine.cores else [])
