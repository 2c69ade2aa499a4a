"""Machines a planner knows: memory, bandwidths and links of one device, and how devices are wired into a cluster.

Decides nothing about speed of arithmetic: peaks stand in train/throughput with their sources and are handed in. A
cluster file overrides any number here. Link speeds are those of the usual node built around a device (NVLink inside, one
network card a GPU between nodes); they are assumptions to be corrected for a real cluster, and every plan prints them.
Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

from bd3_megatron.config.load import build
from bd3_megatron.config.ranges import Range
from bd3_megatron.config.yaml_file import read_yaml
from bd3_megatron.errors import ConfigError, either

GIB = 2**30
GB = 1e9


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


@dataclass(frozen=True, kw_only=True)
class ClusterFile:
    """Keys of a cluster file; each replaces the number assumed for the device."""

    gpus_per_node: Annotated[int, Range(1, 1000)] | None = None
    """Devices that share fast links."""
    intra_node_gb_per_second: Annotated[float, Range(0, 1e6, open_lower=True)] | None = None
    """Between devices of a node, each direction, per device, 1e9 bytes."""
    inter_node_gb_per_second: Annotated[float, Range(0, 1e6, open_lower=True)] | None = None
    """Between nodes, each direction, per device (a card of 400 Gb/s for each GPU is 50)."""
    intra_node_latency_us: Annotated[float, Range(0, 1e9)] | None = None
    """Of one message inside a node."""
    inter_node_latency_us: Annotated[float, Range(0, 1e9)] | None = None
    """Of one message between nodes."""
    memory_gib: Annotated[float, Range(0, 1e6, open_lower=True)] | None = None
    """Of one device."""
    reserve_gib: Annotated[float, Range(0, 1e6)] | None = None
    """Kept free on each device."""
    peak_tflops: Annotated[float, Range(0, 1e9, open_lower=True)] | None = None
    """Of one device at the training precision; needed for a device without a known peak."""
    cores: Annotated[int, Range(1, 1e6)] | None = None
    """For CPU runs: cores of the host that all ranks share."""


@dataclass(frozen=True)
class _Known:
    device_name: str
    memory_gib: float
    memory_gb_s: float
    intra_gb_s: float
    inter_gb_s: float
    gpus_per_node: int = 8
    intra_us: float = 5
    inter_us: float = 15


KNOWN: Mapping[str, _Known] = MappingProxyType(
    {
        "a100-40g": _Known("NVIDIA A100-SXM4-40GB", 40, 1555, 300, 25),
        "a100-80g": _Known("NVIDIA A100-SXM4-80GB", 80, 2039, 300, 25),
        "h100-sxm": _Known("NVIDIA H100 80GB HBM3", 80, 3350, 450, 50),
        "h100-pcie": _Known("NVIDIA H100 PCIe", 80, 2000, 50, 25),
        "h100-nvl": _Known("NVIDIA H100 NVL", 94, 3900, 50, 25),
        "h200": _Known("NVIDIA H200", 141, 4800, 450, 50),
        "h200-nvl": _Known("NVIDIA H200 NVL", 141, 4800, 50, 25),
        "b200": _Known("NVIDIA B200", 180, 7700, 900, 50),
        "gb200": _Known("NVIDIA GB200", 186, 8000, 900, 50, 72),
        "l40s": _Known("NVIDIA L40S", 48, 864, 25, 12.5),
        "rtx3090": _Known("NVIDIA GeForce RTX 3090", 24, 936, 12, 1.25),
        "rtx4090": _Known("NVIDIA GeForce RTX 4090", 24, 1008, 12, 1.25),
        "rtx5090": _Known("NVIDIA GeForce RTX 5090", 32, 1792, 25, 1.25),
        "a5000": _Known("NVIDIA RTX A5000", 24, 768, 12, 1.25),
        "a6000": _Known("NVIDIA RTX A6000", 48, 768, 12, 1.25),
        "mi300x": _Known("AMD Instinct MI300X", 192, 5300, 448, 50),
        # gloo on loopback, two ranks: a tensor's all-reduce takes 1.5 ms and 0.8 ms a MB, that of one number 0.3 ms
        "cpu": _Known("cpu", 64, 10, 2, 1, 1024, intra_us=750, inter_us=300),
    }
)


def device_name_of(gpu: str) -> str:
    """Driver's name of a planner's device.

    Raises:
        ConfigError: the device is not known.
    """
    if gpu not in KNOWN:
        raise ConfigError(f"gpu '{gpu}' is not known; use {either(sorted(KNOWN))}.")
    return KNOWN[gpu].device_name


def machine_of(gpu: str, *, peak_tflops: float | None, cluster: ClusterFile | None = None) -> Machine:
    """A device with its usual node, corrected by a cluster file.

    Args:
        gpu: key of KNOWN.
        peak_tflops: from the peak table; None where that has none.
        cluster: replaces single numbers.

    Raises:
        ConfigError: unknown device, or no peak given for it.
    """
    device_name_of(gpu)
    known, given = KNOWN[gpu], cluster or ClusterFile()
    peak = given.peak_tflops or peak_tflops
    if peak is None:
        raise ConfigError(f"gpu '{gpu}' has no known peak at this precision; give peak_tflops in a cluster file.")
    machine = Machine(
        name=gpu,
        device_name=known.device_name,
        peak_tflops=peak,
        memory_bytes=(given.memory_gib or known.memory_gib) * GIB,
        memory_bytes_per_second=known.memory_gb_s * GB,
        gpus_per_node=given.gpus_per_node or known.gpus_per_node,
        intra_node_bytes_per_second=(given.intra_node_gb_per_second or known.intra_gb_s) * GB,
        intra_node_latency_seconds=known.intra_us * 1e-6,
        inter_node_bytes_per_second=(given.inter_node_gb_per_second or known.inter_gb_s) * GB,
        inter_node_latency_seconds=known.inter_us * 1e-6,
        cores=given.cores or (1 if gpu == "cpu" else 0),
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


def read_cluster(path: Path) -> ClusterFile:
    """A cluster file: YAML with the keys of ClusterFile.

    Raises:
        ConfigError: missing file, YAML that does not parse, unknown key, wrong type.
    """
    tree = read_yaml(path, "cluster file", "a YAML file with keys such as gpus_per_node")
    cluster = build(ClusterFile, tree, where="")
    return cluster if isinstance(cluster, ClusterFile) else ClusterFile()


def assumptions(machine: Machine) -> list[str]:
    """What a plan takes for granted about the machine, one line each."""
    lines = [
        f"device {machine.device_name}: {machine.peak_tflops:g} TFLOP/s peak at the training precision, "
        f"{machine.memory_bytes / GIB:g} GiB ({machine.reserve_bytes / GIB:g} kept free), "
        f"{machine.memory_bytes_per_second / GB:g} GB/s memory",
        f"{machine.gpus_per_node} devices a node; {machine.intra_node_bytes_per_second / GB:g} GB/s and "
        f"{machine.intra_node_latency_seconds * 1e6:g} us inside it, {machine.inter_node_bytes_per_second / GB:g} GB/s and "
        f"{machine.inter_node_latency_seconds * 1e6:g} us between nodes (per device, each direction)",
    ]
    return lines + ([f"all ranks share {machine.cores} cores of one host"] if machine.cores else [])
