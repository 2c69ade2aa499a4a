"""Weak and strong scaling of real training over the ranks of one machine, and what communication takes of a step.

    python -m tools.bench.scaling                                    # CPU: 1, 2 and 4 ranks, data parallel
    python -m tools.bench.scaling --axis tp --ranks 1 2
    python -m tools.bench.scaling --device cuda --layers 24 --hidden 2048 --heads 16 --length 2048 --vocab 32000

weak: every rank brings `--batch` sequences; strong: all cases share one global batch, that of the largest. Efficiency is
tokens a second and device against the smallest case. Shares are rank 0's time between entering a collective of an axis and
having its result, waiting for slower ranks included.
Refuses more ranks than GPUs. Knows nothing of several machines: there `bd3 status` compares whole runs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroup, Work

# run as a script from any folder, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bd3_megatron.command import CommandParser
from bd3_megatron.config.load import config_from_tree
from bd3_megatron.config.schema import Config
from bd3_megatron.config.validate import validate
from bd3_megatron.errors import RangeError
from bd3_megatron.parallel.topology import Topology, leave
from bd3_megatron.process.quiet import drop_known_warnings
from bd3_megatron.report.run_record import RunRecord
from bd3_megatron.train.build import build_trainer, meet
from bd3_megatron.train.timeline import AXES, Timeline
from tools.bench import harness
from tools.bench.harness import Note
from tools.bench.runs import prepare_bytes, trained

COLLECTIVES = (
    *("allreduce", "allreduce_coalesced", "broadcast", "reduce", "gather", "scatter", "barrier", "alltoall"),
    *("allgather", "_allgather_base", "all_gather_single", "all_gather_single_coalesced"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single", "reduce_scatter_single_coalesced"),
)
"""Methods of a process group through which ranks communicate, but for send and receive; some are of newer torch only."""


@dataclass(frozen=True)
class ScalingCase:
    """One grid of one kind of scaling."""

    kind: str
    """weak or strong."""
    ranks: int
    global_batch: int

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.ranks}"


@dataclass(frozen=True)
class Seen:
    """What the rounds of a case showed."""

    tokens_per_second: float
    shares: Mapping[str, float]
    """Of a step, by axis."""


def cases(ranks: Sequence[int], batch: int) -> list[ScalingCase]:
    """Weak and strong cases at each number of ranks; the smallest comes first."""
    rising, most = sorted(set(ranks)), max(ranks)
    weak = [ScalingCase("weak", n, batch * n) for n in rising]
    return weak + [ScalingCase("strong", n, batch * most) for n in rising]


def scaling_case_config(options: argparse.Namespace, case: ScalingCase, data: Path, run_dir: Path) -> Config:
    """The run of a case."""
    # Every case is a short run of the trainer itself, data and optimizer included.
    config = config_from_tree(
        {
            "run": {"dir": str(run_dir)},
            "model": {
                "style": options.style,
                "num_layers": options.layers,
                "hidden_size": options.hidden,
                "num_heads": options.heads,
                "vocab_size": options.vocab,
            },
            "data": {"path": str(data), "seq_len": options.length},
            "diffusion": {"block_size": options.block},
            "parallel": {"dp": 1, options.axis: case.ranks},
            "train": {
                "steps": options.steps,
                "global_batch_size": case.global_batch,
                "micro_batch_size": options.micro_batch,
            },
            "checkpoint": {"every_steps": 0},
            "log": {"every_steps": 1},
            "throughput": {"peak_tflops": 1.0},
            "watch": {"preflight": False, "leak_check": False},
        }
    )
    validate(config, world_size=case.ranks)
    return config


def axis_names(topology: Topology) -> dict[str, str]:
    """{name of a process group: its axis}; groups of one rank left out."""
    groups = topology.groups
    by_axis = [("dp", topology.shard_group), ("dp", groups.dp), ("cp", groups.cp), ("tp", groups.tp)]
    by_axis += [("pp", groups.pp), ("pp", topology.embedding_group)]
    return {group.group_name: axis for axis, group in by_axis if group is not None and dist.get_world_size(group) > 1}


@contextlib.contextmanager
def communication_timed(timeline: Timeline, names: Mapping[str, str]) -> Iterator[None]:
    """Inside, collectives are spans of `timeline` by axis, and a wait for anything else is one between pipeline stages.

    Args:
        timeline: of the trainer.
        names: of `axis_names`; collectives of other groups (all ranks: loss sums, the slowest rank) have no axis.
    """
    kept = {name: getattr(ProcessGroup, name) for name in COLLECTIVES if hasattr(ProcessGroup, name)}
    wait = Work.wait

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def collective(group: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            axis = names.get(group.group_name)
            with contextlib.nullcontext() if axis is None else timeline.span(f"communication_{axis}"):
                work = call(group, *args, **kwargs)
                # Waited for on the spot, so that nothing is credited to overlap.
                if work is not None:
                    wait(work)
            return work

        return collective

    def waited(work: Work, *args: Any) -> Any:
        # Nothing was waited for, so there is no span.
        if work.is_completed():
            return wait(work, *args)
        with timeline.span("communication_pp"):
            return wait(work, *args)

    for name, call in kept.items():
        setattr(ProcessGroup, name, timed(call))
    setattr(Work, "wait", waited)  # noqa: B010  (a type checker would compare it with a method)
    try:
        yield
    finally:
        for name, call in kept.items():
            setattr(ProcessGroup, name, call)
        setattr(Work, "wait", wait)  # noqa: B010


def run_observed(config: Config, rank: int) -> int:
    """One rank of a run whose record splits communication by axis."""
    topology = meet(config, rank=rank, world_size=config.parallel.world_size(), local_rank=rank)
    trainer = build_trainer(config, topology)
    with communication_timed(trainer.timeline, axis_names(trainer.topology)):
        trainer.run()
    leave()
    return 0


def run_cases(options: argparse.Namespace, folder: Path) -> dict[ScalingCase, Seen]:
    """All rounds of all cases, in turns, and the runs that are observed."""
    data, chosen = folder / "data", cases(options.ranks, options.batch)
    prepare_bytes(data, options.vocab)
    runs: dict[ScalingCase, list[RunRecord]] = {case: [] for case in chosen}
    # Cases take turns, so that a busy neighbour slows all of them alike.
    for number in range(options.repeats):
        for case in chosen:
            config = scaling_case_config(options, case, data, folder / f"{case.name}_{number}")
            runs[case].append(trained(config, folder / "log", threads=options.threads))
    seen = {}
    for case in chosen:
        # Shares come from one run more of each case: waiting on the spot would change the step's time.
        config = scaling_case_config(options, case, data, folder / f"{case.name}_observed")
        work = partial(run_observed, config)
        observed = trained(config, folder / "log", threads=options.threads, work=work)
        # The median over rounds of the run's median step.
        seconds = statistics.median(run.typical("time/step_seconds") or 0.0 for run in runs[case])
        seen[case] = Seen(case.global_batch * options.length / seconds, shares(observed))
    return seen


def shares(run: RunRecord) -> dict[str, float]:
    """Share of a step that rank 0 spent in communication, by axis."""
    split = run.time_split()
    whole = sum(split.values())
    return {axis: split.get(f"communication_{axis}", 0.0) / whole for axis in AXES}


def efficiencies(seen: Mapping[ScalingCase, Seen], devices: int | None) -> dict[ScalingCase, float]:
    """Tokens a second and device against the smallest case of the same kind.

    Args:
        seen: tokens a second of every case.
        devices: cores that ranks share; None: a rank is a device.
    """
    found = {}
    for case, figures in seen.items():
        first = min((other for other in seen if other.kind == case.kind), key=lambda other: other.ranks)
        # On CPU ranks beyond the cores are no devices.
        counts = [n if devices is None else min(n, devices) for n in (case.ranks, first.ranks)]
        found[case] = figures.tokens_per_second / seen[first].tokens_per_second * counts[1] / counts[0]
    return found


def body_of(seen: Mapping[ScalingCase, Seen], options: argparse.Namespace) -> str:
    """The table and what must be known to read it."""
    cores = os.cpu_count() if options.device == "cpu" else None
    efficiency = efficiencies(seen, None if cores is None else max(1, cores // options.threads))
    rows = [
        [
            case.kind,
            case.ranks,
            case.global_batch,
            f"{figures.tokens_per_second:,.0f}",
            f"{efficiency[case]:.0%}",
            *(f"{figures.shares[axis]:.1%}" for axis in AXES),
        ]
        for case, figures in seen.items()
    ]
    header = ["scaling", "ranks", "global batch", "data tokens/s", "efficiency", *(f"{axis} share" for axis in AXES)]
    shared = f"efficiency counts at most {cores} devices: ranks share the cores" if cores else "one rank a GPU"
    return f"{harness.table(header, rows)}\n\nscaled over {options.axis}; {shared}"


def build_parser() -> CommandParser:
    """The command line."""
    parser = harness.benchmark_parser("scaling", __doc__, repeats=3)
    parser.add_argument("--axis", choices=AXES, default="dp", help="which axis the ranks are (default dp)")
    parser.add_argument("--ranks", type=int, nargs="+", help="default: 1 2 4, or powers of two up to the GPUs")
    parser.add_argument("--style", choices=("modern", "paper"), default="modern")
    for name, value, text in (
        ("layers", 4, "transformer layers"),
        ("hidden", 256, "width D"),
        ("heads", 4, "query heads"),
        ("length", 256, "L, clean tokens"),
        ("block", 16, "S"),
        ("vocab", 2048, "ids of the model"),
        ("batch", 4, "sequences a rank (weak)"),
        ("micro-batch", 1, "sequences a forward"),
        ("steps", 6, "of every run; the first is not counted"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default {value})")
    return parser


def ranks_of(options: argparse.Namespace) -> list[int]:
    """How many ranks to run, largest last.

    Raises:
        RangeError: more ranks than GPUs.
    """
    if options.device == "cpu":
        return options.ranks or [1, 2, 4]
    gpus = torch.cuda.device_count()
    if max(options.ranks or [1]) > gpus:
        raise RangeError(f"--ranks {max(options.ranks)} exceeds the {gpus} GPUs of this machine; give at most {gpus}.")
    return options.ranks or [2**n for n in range(gpus.bit_length()) if 2**n <= gpus]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    return harness.run_benchmark(build_parser(), measure_scaling, arguments)


def measure_scaling(options: argparse.Namespace) -> Iterator[Note]:
    """Run every case and compare."""
    # asked before any rank is forked: counting GPUs the NVML way leaves CUDA untouched
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    options.ranks = ranks_of(options)
    drop_known_warnings()
    with tempfile.TemporaryDirectory() as folder:
        seen = run_cases(options, Path(folder))
    shape = f"{options.layers} layers, h{options.hidden}, L{options.length}, S{options.block}, V{options.vocab}"
    yield Note(f"{options.axis}, {shape}", body_of(seen, options))


if __name__ == "__main__":
    sys.exit(main())
