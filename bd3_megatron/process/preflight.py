"""Before the first step: do all ranks run the same versions on healthy devices, can they add, and do they share the folder?

Decides: what stops a run here (other versions, wrong products or sums, memory held by leftover processes, a run folder
that is not one folder) and what is only said (a slow device, clocks apart). Where the batch script gives a file for bad
nodes (BD3_BAD_NODES), a slow node stops the run as well, and is written there, so that the next attempt goes without it.
Refuses: too little free space for one checkpoint. Does not know: how fast a device ought to be; it compares ranks.
Costs: a few tenths of a second, collective; watch.preflight=false leaves it out.
"""

from __future__ import annotations

import enum
import importlib.metadata
import os
import platform
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bd3_megatron import __version__
from bd3_megatron.compat.device import device_name, occupied_fraction, release_memory
from bd3_megatron.config.schema import Config
from bd3_megatron.cost.parameters import parameter_count
from bd3_megatron.errors import LaunchError, NodeFailure, counted
from bd3_megatron.files import append_line
from bd3_megatron.lease import node_name
from bd3_megatron.parallel.topology import Topology

COMPARED_PACKAGES = ("torch", "megatron-core", "deepspeed", "numpy")
PRODUCT_SIZE = {"cpu": 256, "cuda": 4096}
PRODUCT_REPEATS = 5
PRODUCT_TOLERANCE = 1e-9
"""Relative, in fp64: (A B) r against A (B r); a wrong bit in a product is many orders larger."""
SLOW_FACTOR = {"cpu": 4.0, "cuda": 1.25}
"""Against the median of the node's ranks; on CPU neighbours' caches alone make products twice as slow."""
SUM_NUMBERS = {"cpu": 2**17, "cuda": 2**25}
"""fp32 numbers of the timed all-reduce: large enough that its bandwidth, not its latency, is measured."""
OCCUPIED_LIMIT = 0.15
"""Of a device's memory: a context and communication buffers take less, somebody's process more."""
CLOCK_SECONDS = 30.0
"""Deadlines and file times are compared across nodes."""
FOLDER_SECONDS = 20.0
"""Network file systems may show another node's new file only after their cache's time."""
CHECKPOINT_BYTES_PER_PARAMETER = 16
"""fp32 weights, two moments and the average."""


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What one rank found about itself and its neighbours."""

    rank: int
    node: str
    versions: dict[str, str]
    product_seconds: float
    product_is_right: bool = True
    wrong_axes: tuple[str, ...] = ()
    """Axes over which the all-reduce gave a wrong sum."""
    occupied: float = 0.0
    """Part of the device's memory that is in use before training."""
    clock: float = 0.0
    unseen_ranks: tuple[int, ...] = ()
    """Ranks whose file in the run folder this rank does not see: rank 0 looks for all, the others for rank 0's."""
    bandwidth: dict[str, float] = field(default_factory=dict)
    """Axis -> bytes/s of its all-reduce."""


class Severity(enum.Enum):
    """What a remark on a node means for the run."""

    FAULT = "stops the run"
    SLOW = "stops it where slow nodes can be left out"
    NOTE = "is said"


@dataclass(frozen=True, kw_only=True)
class NodeRemark:
    """Something wrong about a node."""

    node: str
    sentence: str
    severity: Severity


def preflight(config: Config, topology: Topology, say: Callable[[str], None]) -> None:
    """Examine all ranks; every rank comes to the same verdict. Collective.

    Args:
        config: with the run's folder.
        topology: this rank's coordinates and groups.
        say: prints a line on rank 0.

    Raises:
        NodeFailure: names the nodes at fault.
        LaunchError: too little free space.
    """
    started = time.perf_counter()
    bad_nodes = os.environ.get("BD3_BAD_NODES")
    is_first = topology.rank == 0
    # All reports go to one rank and its findings to all: every rank with every report would be a million reports on 1,000.
    reports: list[Any] | None = [None] * topology.world_size if is_first else None
    dist.gather_object(examine(Path(config.run.dir), topology), reports)
    box: list[Any] = [remarks_on(reports, device_type=topology.device.type) if reports else []]
    dist.broadcast_object_list(box, src=0, device=topology.device)
    findings: list[NodeRemark] = box[0]
    # a slow node ends the run only where the next attempt can go without it
    stopping = (Severity.FAULT, Severity.SLOW) if bad_nodes else (Severity.FAULT,)
    stops = [f for f in findings if f.severity in stopping]
    for finding in findings:
        say(f"preflight: {finding.sentence}")
    if stops:
        if is_first and bad_nodes:
            for node in sorted({f.node for f in stops}):
                append_line(Path(bad_nodes), node)
        raise NodeFailure(
            f"preflight: {'; '.join(f.sentence for f in stops)}: leave out node {', '.join(sorted({f.node for f in stops}))} "
            "(cluster.exclude, or submit with --exclude-bad), or set watch.preflight=false to run all the same."
        )
    _check_space(config, topology)
    if reports:
        say(summary(reports, time.perf_counter() - started))


def examine(run_dir: Path, topology: Topology) -> RankReport:
    """Look at this rank. Collective: sums and files are met by all."""
    device = topology.device
    occupied = occupied_fraction(device)
    seconds, right = time_product(device)
    wrong, bandwidth = check_sums(topology)
    unseen = meet_in_folder(run_dir, topology)
    # training's peak of memory must not be this examination's
    release_memory(device)
    dist.barrier()
    return RankReport(
        rank=topology.rank,
        node=node_name(),
        versions={
            "python": platform.python_version(),
            "bd3_megatron": __version__,
            "device": device_name(device),
            **{name: importlib.metadata.version(name) for name in COMPARED_PACKAGES},
        },
        product_seconds=seconds,
        product_is_right=right,
        wrong_axes=wrong,
        occupied=occupied,
        clock=time.time(),
        unseen_ranks=unseen,
        bandwidth=bandwidth,
    )


def time_product(device: torch.device) -> tuple[float, bool]:
    """Seconds of a matrix product on this device (its best of a few), and whether it is right.

    On CPU the time is the processor's: the clock's would measure what else runs there.
    """
    size = PRODUCT_SIZE.get(device.type, PRODUCT_SIZE["cpu"])
    number = torch.arange(size, dtype=torch.float32, device=device)
    # small whole numbers: each partial sum is exact in fp32 and TF32, so a difference is a fault, not rounding
    a = (number[:, None] * 7 + number[None, :] * 3).remainder(11) - 5
    b = (number[:, None] * 5 + number[None, :] * 2).remainder(13) - 6
    product = a @ b
    # (A B) r against A (B r): the check costs n^2, not n^3
    vector = number.double().remainder(17) - 8
    expected = a.double() @ (b.double() @ vector)
    error = (product.double() @ vector - expected).abs().max() / expected.abs().max()
    right = bool(error < PRODUCT_TOLERANCE)
    # on a GPU training multiplies in bf16, so that is what is timed
    timed = (a.bfloat16(), b.bfloat16()) if device.type == "cuda" else (a, b)
    return min(_seconds_of_product(*timed) for _ in range(PRODUCT_REPEATS)), right


def _seconds_of_product(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.device.type == "cpu":
        started = time.process_time()
        a @ b
        return time.process_time() - started
    torch.accelerator.synchronize()
    started = time.perf_counter()
    a @ b
    torch.accelerator.synchronize()
    return time.perf_counter() - started


def check_sums(topology: Topology) -> tuple[tuple[str, ...], dict[str, float]]:
    """All-reduce over every axis longer than one: axes whose sum is wrong, and bytes/s of those axes. Collective."""
    groups = {"tp": topology.groups.tp, "cp": topology.groups.cp, "pp": topology.groups.pp, "dp": topology.groups.dp}
    wrong, bandwidth = [], {}
    numbers = SUM_NUMBERS.get(topology.device.type, SUM_NUMBERS["cpu"])
    for axis, group in groups.items():
        members = dist.get_process_group_ranks(group)
        if len(members) == 1:
            continue
        # rank + 1: a rank that is left out changes the sum, rank 0 as well
        values = torch.full((numbers,), topology.rank + 1.0, device=topology.device)
        dist.all_reduce(values, group=group)
        if not bool((values == float(sum(members) + len(members))).all()):
            wrong.append(axis)
        # the first all-reduce has set up the connections; only the second is timed
        started = time.perf_counter()
        dist.all_reduce(values, group=group)
        if topology.device.type != "cpu":
            torch.accelerator.synchronize()
        # bytes that a ring puts on each rank's link
        travelled = 2 * (len(members) - 1) / len(members) * values.numel() * values.element_size()
        bandwidth[axis] = travelled / (time.perf_counter() - started)
    return tuple(wrong), bandwidth


def meet_in_folder(run_dir: Path, topology: Topology) -> tuple[int, ...]:
    """Rank 0 makes a folder in the run's; all write a file there and look for rank 0's, rank 0 for everyone's. Collective.

    Returns:
        Ranks whose file this rank does not see; rank 0 also where this rank could not write.
    """
    # a name of this launch alone: files that an earlier attempt left must not count
    names: list[Any] = [f".preflight.{os.getpid()}.{time.time_ns()}"]
    dist.broadcast_object_list(names, src=0, device=topology.device)
    folder = run_dir / names[0]
    if topology.rank == 0:
        _write_into(folder, 0)
    dist.barrier()
    unseen = _unseen(folder, [0])
    if topology.rank != 0 and not unseen and not _write_into(folder, topology.rank):
        unseen = [0]
    dist.barrier()
    if topology.rank == 0:
        # one that could not write says so itself
        unseen = unseen or _unseen(folder, range(topology.world_size))
        shutil.rmtree(folder, ignore_errors=True)
    return tuple(unseen)


def _write_into(folder: Path, rank: int) -> bool:
    try:
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
        (folder / str(rank)).touch()
    except OSError:
        return False
    return True


def _unseen(folder: Path, wanted: Sequence[int]) -> list[int]:
    deadline = time.monotonic() + FOLDER_SECONDS
    while True:
        present = set(os.listdir(folder)) if folder.is_dir() else set()
        unseen = [rank for rank in wanted if str(rank) not in present]
        if not unseen or time.monotonic() > deadline:
            return unseen
        time.sleep(0.2)


def remarks_on(reports: Sequence[RankReport], *, device_type: str) -> list[NodeRemark]:
    """What is wrong, by node; pure.

    Args:
        reports: of all ranks, in rank order.
        device_type: "cpu" or "cuda".
    """
    findings = [*_odd_versions(reports), *_slow(reports, SLOW_FACTOR.get(device_type, SLOW_FACTOR["cpu"]))]
    clock = statistics.median(r.clock for r in reports)
    unseen = {s for r in reports if r.unseen_ranks for s in (r.unseen_ranks if r.rank == 0 else (r.rank,))}
    for r in reports:
        where = f"rank {r.rank} on node {r.node}"
        faults = []
        if not r.product_is_right:
            faults.append("computes a wrong matrix product")
        faults += [f"gets a wrong sum from the all-reduce over {axis}" for axis in r.wrong_axes]
        if r.rank in unseen:
            faults.append("does not share the run folder with rank 0, or cannot write there")
        if r.occupied > OCCUPIED_LIMIT:
            faults.append(f"finds {100 * r.occupied:.0f} % of its device's memory in use before training")
        findings += [NodeRemark(node=r.node, sentence=f"{where} {fault}", severity=Severity.FAULT) for fault in faults]
        if abs(r.clock - clock) > CLOCK_SECONDS:
            late = f"{where} has a clock {r.clock - clock:+.0f} s from the others'"
            findings.append(NodeRemark(node=r.node, sentence=late, severity=Severity.NOTE))
    return findings


def _odd_versions(reports: Sequence[RankReport]) -> list[NodeRemark]:
    found = []
    for name in reports[0].versions:
        # the most common version is taken for right; of equally common ones the lowest rank's
        usual = Counter(r.versions.get(name) for r in reports).most_common(1)[0][0]
        found += [
            NodeRemark(
                node=r.node,
                sentence=f"rank {r.rank} on node {r.node} has {name} {r.versions.get(name)}, others {usual}",
                severity=Severity.FAULT,
            )
            for r in reports
            if r.versions.get(name) != usual
        ]
    return found


def _slow(reports: Sequence[RankReport], factor: float) -> list[NodeRemark]:
    found = []
    by_node: dict[str, list[float]] = {}
    for r in reports:
        by_node.setdefault(r.node, []).append(r.product_seconds)
    # the node's median finds one slow device in a box, the job's a box that is slow as a whole
    medians = {node: statistics.median_low(seconds) for node, seconds in by_node.items()}
    whole = statistics.median_low([r.product_seconds for r in reports])
    for r in reports:
        usual = min(medians[r.node], whole)
        if r.product_seconds > factor * usual:
            times = f"{1e3 * r.product_seconds:.1f} ms against {1e3 * usual:.1f} ms"
            sentence = f"rank {r.rank} on node {r.node} is slow: a matrix product takes {times}"
            found.append(NodeRemark(node=r.node, sentence=sentence, severity=Severity.SLOW))
    return found


def summary(reports: Sequence[RankReport], seconds: float) -> str:
    """One line for the console."""
    nodes = len({r.node for r in reports})
    product = 1e3 * statistics.median(r.product_seconds for r in reports)
    axes = "".join(f", all-reduce {axis} {speed / 1e9:.2f} GB/s" for axis, speed in reports[0].bandwidth.items())
    ranks = f"{counted(len(reports), 'rank')} on {counted(nodes, 'node')}"
    return f"preflight: {ranks}, matrix product {product:.2f} ms{axes}; {seconds:.1f} s"


def _check_space(config: Config, topology: Topology) -> None:
    needed = 0
    if config.model.vocab_size is not None:
        needed = parameter_count(config) * CHECKPOINT_BYTES_PER_PARAMETER
    # rank 0 looks, so that all come to one verdict
    free: list[Any] = [shutil.disk_usage(config.run.dir).free if topology.rank == 0 else None]
    dist.broadcast_object_list(free, src=0, device=topology.device)
    if free[0] < needed:
        raise LaunchError(
            f"run.dir={config.run.dir} has {free[0] / 2**30:.1f} GiB free but a checkpoint takes about "
            f"{needed / 2**30:.1f} GiB; free space or choose another run.dir."
        )
