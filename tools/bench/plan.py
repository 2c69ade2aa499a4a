"""The planner against measurement: short real runs on this machine's cores, two to calibrate on, the others to predict.

    python -m tools.bench.plan [--cases wide dp2 ...] [--steps 8 --repeats 6]

Every case is trained by the trainer itself on forked ranks, in rounds that take turns. The planner is calibrated on the two
cases that are marked, as `tools/plan.py --calibrate` would be on their folders, and predicts the rest unseen. Memory is
never fitted. Refuses more ranks than cores: there the clock would measure the machine's scheduler.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

# run as a script from any folder, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bd3_megatron.command import CommandParser
from bd3_megatron.config.load import config_from_tree
from bd3_megatron.config.objective import objective_of
from bd3_megatron.config.schema import Config
from bd3_megatron.config.validate import validate
from bd3_megatron.cost.assumptions import engine_assumptions
from bd3_megatron.cost.memory import memory_per_device
from bd3_megatron.errors import RangeError
from bd3_megatron.files import write_text
from bd3_megatron.parallel.topology import leave
from bd3_megatron.planner.calibrate import Observation, calibrate, fitted_factors
from bd3_megatron.planner.constants import Constants
from bd3_megatron.planner.machines import ClusterFile, Machine, assumptions, machine_of
from bd3_megatron.planner.timing import StepTime, step_time
from bd3_megatron.process.quiet import drop_known_warnings
from bd3_megatron.report.run_record import RunRecord, read_run
from bd3_megatron.train.batches import StepBatches
from bd3_megatron.train.build import build_trainer, meet
from launch.env import rank_settings
from tools.bench import harness
from tools.bench.harness import MIB, Note
from tools.bench.runs import on_ranks, prepare_bytes, trained
from tools.plan import observation

# Ids of the model; the 256 bytes of the data are padded to it.
VOCABULARY = 2048
TIME_ERROR, MEMORY_ERROR = 0.15, 0.10
"""Within these of the measurement a prediction is good enough to choose a grid by."""
COUNTED_STEPS = 2
"""Steps whose memory is counted: the first makes Adam's state, the second is like all others."""
COUNTS = 3
"""Runs whose memory is counted: where a collective's own thread is the last to hold a tensor its release goes unreported,
so a count can only be too large, by up to a sixth."""


@dataclass(frozen=True)
class PlannerCase:
    """One configuration to measure; `sections` change the base of `planner_case_config`."""

    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    calibrates: bool = False


CASES: Mapping[str, PlannerCase] = {
    "base": PlannerCase(calibrates=True),
    "dp2": PlannerCase({"parallel": {"dp": 2}, "model": {"hidden_size": 128, "num_layers": 6}}, calibrates=True),
    "wide": PlannerCase({"model": {"hidden_size": 512, "num_layers": 2}, "data": {"seq_len": 128}}),
    "deep": PlannerCase({"model": {"hidden_size": 128, "num_layers": 10}, "diffusion": {"block_size": 4}}),
    "long": PlannerCase({"model": {"num_layers": 3}, "data": {"seq_len": 512}, "train": {"micro_batch_size": 1}}),
    "paper": PlannerCase({"model": {"style": "paper"}, "train": {"micro_batch_size": 4}}),
    "recompute": PlannerCase({"train": {"recompute": "full", "micro_batch_size": 4}, "diffusion": {"block_size": 64}}),
    "ar": PlannerCase({"diffusion": {"objective": "ar"}, "model": {"hidden_size": 320}}),
    "tp2": PlannerCase({"parallel": {"tp": 2}}),
    "pp2": PlannerCase({"parallel": {"pp": 2}, "train": {"micro_batch_size": 1}, "model": {"num_layers": 6}}),
    "cp2": PlannerCase({"parallel": {"cp": 2}, "model": {"num_kv_heads": 2}}),
    "tp2 sp": PlannerCase(
        {"parallel": {"tp": 2, "sequence_parallel": True}, "model": {"hidden_size": 384, "num_layers": 3}}
    ),
    "vpp2": PlannerCase({"parallel": {"pp": 2, "vpp": 2}, "train": {"micro_batch_size": 1}}),
    "zero2": PlannerCase({"parallel": {"dp": 2, "zero_stage": 2}}),
    "zero3": PlannerCase({"parallel": {"dp": 2, "zero_stage": 3}, "model": {"num_layers": 3}}),
    "tp2 paper": PlannerCase({"parallel": {"tp": 2}, "model": {"style": "paper", "num_layers": 3}}),
    "dp2 wide": PlannerCase({"parallel": {"dp": 2}, "model": {"hidden_size": 384, "num_layers": 3}}),
}


@dataclass(frozen=True)
class CaseMeasurement:
    """What a case showed."""

    run: Observation
    """Its configuration, and the seconds that a tenth of the steps of all rounds do not reach."""
    spread: float
    """(median - tenth) / tenth of the steps."""
    peak_tflops: float
    """Largest that a round measured at its start, a core."""
    peak_bytes: int
    """Of the rank that held most."""


def planner_case_config(case: PlannerCase, data: Path, run_dir: Path, *, steps: int) -> Config:
    """A run of `steps` steps of a case."""
    tree: dict[str, Any] = {
        "run": {"dir": str(run_dir)},
        "model": {"num_layers": 4, "hidden_size": 256, "num_heads": 4, "vocab_size": VOCABULARY},
        "data": {"path": str(data), "seq_len": 256},
        "diffusion": {"block_size": 16},
        "parallel": {"dp": 1},
        "train": {"steps": steps, "global_batch_size": 4, "micro_batch_size": 2},
        # Nothing between the steps that could disturb the clock.
        "checkpoint": {"every_steps": 0},
        "log": {"every_steps": 1},
        "watch": {"preflight": False, "leak_check": False},
    }
    for name, section in case.sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    config = config_from_tree(tree)
    ranks, cores = config.parallel.world_size(), os.cpu_count() or 1
    if ranks > cores:
        raise RangeError(
            f"a case of {ranks} ranks needs as many cores and this machine has {cores}; name other --cases."
        )
    validate(config, world_size=ranks)
    return config


def peak_tensor_bytes(profile: torch.profiler.profile, since_ns: int) -> int:
    """Most bytes of CPU tensors alive at once from a moment on, of those made inside the profile.

    Args:
        profile: ended, with profile_memory.
        since_ns: nanoseconds since the epoch.
    """
    if profile.profiler is None or profile.profiler.kineto_results is None:
        raise RangeError("the profile has not ended, so it holds no allocations; count memory after its block.")
    alive: dict[int, int] = {}
    total = peak = 0
    for at_ns, size, address in sorted(_allocations(profile.profiler.kineto_results.experimental_event_tree())):
        # what a collective's own thread frees is not reported; its address coming up again is the sign
        total += size - alive.pop(address, 0) if size > 0 else -alive.pop(address, 0)
        if size > 0:
            alive[address] = size
        peak = max(peak, total) if at_ns >= since_ns else peak
    return peak


def _allocations(events: Sequence[Any]) -> Iterator[tuple[int, int, int]]:
    """(nanoseconds, bytes, address) of every allocation, negative bytes for a release."""
    for event in events:
        if event.tag == torch._C._profiler._EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.alloc_size, event.extra_fields.ptr
        yield from _allocations(event.children)


def whole_step_peak(config: Config, rank: int) -> int:
    """Most bytes of CPU tensors alive at once on this rank in its second training step, its state included. Collective.

    Everything the trainer builds is counted; the first step makes Adam's state, the second is like all others.
    """
    # Counted from here: everything the trainer builds (weights, gradients, optimizer, average, activations).
    topology = meet(config, rank=rank, world_size=config.parallel.world_size(), local_rank=rank)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        trainer = build_trainer(config, topology)
        batches = StepBatches(
            trainer.data.train,
            trainer.plan,
            trainer.topology,
            first_step=0,
            mask_id=trainer.data.special.mask,
            num_workers=0,
        )
        since_ns = 0
        for step in range(COUNTED_STEPS):
            # The last step's beginning: what was alive only during the start does not count.
            since_ns = time.time_ns()
            trainer.training_step.run(trainer.plan, replace(trainer.state, step=step), batches)
    return peak_tensor_bytes(profile, since_ns)


def count_memory(config: Config, rank: int, out: Path) -> int:
    """One rank: leaves its peak in `out`/RANK."""
    write_text(out / str(rank), str(whole_step_peak(config, rank)))
    leave()
    return 0


def measure_cases(names: Sequence[str], folder: Path, *, steps: int, rounds: int) -> dict[str, CaseMeasurement]:
    """Train every case `rounds` times, taking turns, count its memory `COUNTS` times; what `folder` holds is not run again."""
    data = folder / "data"
    prepare_bytes(data, VOCABULARY)
    runs: dict[str, list[RunRecord]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names:
            run_dir = folder / f"{name.replace(' ', '_')}_{number}"
            if run_dir.exists():
                runs[name].append(read_run(run_dir))
            else:
                config = planner_case_config(CASES[name], data, run_dir, steps=steps)
                runs[name].append(trained(config, folder / "log", threads=1))
            print(f"round {number}: {name} {_seconds(runs[name][-1]):.3f} s", file=sys.stderr)
    return {name: _summary(runs[name], _peak_of(name, data, folder)) for name in names}


def _peak_of(name: str, data: Path, folder: Path) -> int:
    """Of the fullest rank, the least of `COUNTS`."""
    counts = [_count(name, data, folder / f"{name.replace(' ', '_')}_memory_{number}") for number in range(COUNTS)]
    # A count can only be too large, so the least of a rank is nearest; the fullest rank decides.
    return max(min(of_rank) for of_rank in zip(*counts, strict=True))


def _count(name: str, data: Path, out: Path) -> list[int]:
    """Peak of every rank in a run of its own; what `out` holds is not run again."""
    config = planner_case_config(CASES[name], data, out / "run", steps=COUNTED_STEPS)
    ranks = range(config.parallel.world_size())
    if not out.exists():
        out.mkdir()
        on_ranks(lambda rank: count_memory(config, rank, out), len(ranks), out / "log", threads=1)
    return [int((out / str(rank)).read_text()) for rank in ranks]


def _seconds(run: RunRecord) -> float:
    return run.typical("time/step_seconds") or 0.0


def _summary(runs: Sequence[RunRecord], peak: int) -> CaseMeasurement:
    starts = [attempt.start for run in runs for attempt in run.attempts]
    tflops = max(float(start["throughput/peak_tflops"]) for start in starts if start is not None)
    # Neighbours on a shared machine only ever add time, and single steps of one run differ by a third: the fastest
    # tenth is the machine's own.
    tenth, median = _quantiles(runs, "time/step_seconds")
    seen = replace(
        observation(runs[0]), step_seconds=tenth, optimizer_seconds=_quantiles(runs, "time/optimizer_seconds")[0]
    )
    return CaseMeasurement(seen, median / tenth - 1, tflops, peak)


def _quantiles(runs: Sequence[RunRecord], key: str) -> tuple[float, float]:
    """(first decile, median) of a key of the settled steps of all rounds."""
    deciles = statistics.quantiles([record[key] for run in runs for record in run.settled()], n=10, method="inclusive")
    return deciles[0], deciles[4]


def host_machine(measured: Sequence[CaseMeasurement]) -> Machine:
    """This host as the planner sees it: its cores, and the largest peak that the runs measured."""
    # The largest of all rounds, for the same reason.
    tflops = max(m.peak_tflops for m in measured)
    cluster = ClusterFile(peak_tflops=tflops, cores=os.cpu_count())
    return machine_of("cpu", peak_tflops=tflops, cluster=cluster)


def predict(config: Config, machine: Machine, constants: Constants) -> tuple[StepTime, int]:
    """(time of a step, peak bytes of the fullest rank)."""
    return step_time(config, machine, constants), memory_per_device(config, engine_assumptions("cpu", config)).peak


def compare_predictions(measured: Mapping[str, CaseMeasurement]) -> str:
    """The note: predictions beside measurements, how many are near enough, and what was fitted."""
    # What calibrates is left out of the errors below: it was fitted.
    known = [m for name, m in measured.items() if CASES[name].calibrates]
    machine = host_machine(list(measured.values()))
    constants = calibrate([m.run for m in known], machine)
    rows: list[Sequence[str]] = []
    errors: dict[str, tuple[float, float]] = {}
    for name, seen in measured.items():
        config, seconds = seen.run.config, seen.run.step_seconds
        step, memory = predict(config, machine, constants)
        error = step.total / seconds - 1, memory / seen.peak_bytes - 1
        if not CASES[name].calibrates:
            errors[name] = error
        rows.append(
            [
                name + (" (calibrates)" if CASES[name].calibrates else ""),
                _shape(config),
                *(f"{seconds:.3f}", f"{seen.spread:+.0%}", f"{step.total:.3f}", f"{error[0]:+.1%}"),
                *(f"{seen.peak_bytes / MIB:.1f}", f"{memory / MIB:.1f}", f"{error[1]:+.1%}"),
            ]
        )
    header = (
        "case",
        "grid and shape",
        "tenth of steps s",
        "median",
        "predicted",
        "error",
        "peak MiB",
        "predicted",
        "error",
    )
    slow = [name for name, (time_error, _) in errors.items() if abs(time_error) > TIME_ERROR]
    large = [name for name, (_, size) in errors.items() if abs(size) > MEMORY_ERROR]
    sentences = [
        f"of {len(errors)} unseen cases {len(errors) - len(slow)} are within {TIME_ERROR:.0%} in step time (outside: "
        f"{', '.join(slow) or 'none'}), {len(errors) - len(large)} within {MEMORY_ERROR:.0%} in peak memory "
        f"(outside: {', '.join(large) or 'none'})",
        f"fitted: {fitted_factors(constants)}",
        *assumptions(machine),
    ]
    return harness.table(header, rows) + "\n\n" + "\n\n".join(sentences)


def _shape(config: Config) -> str:
    m, t, p = config.model, config.train, config.parallel
    grid = " ".join(f"{axis}{size}" for axis in ("tp", "pp", "cp", "dp") if (size := vars(p)[axis] or 1) > 1)
    objective = objective_of(config)
    kind = f"S{objective.block_size}" if objective.has_noise else "AR"
    parts = [grid or "one rank", f"{m.num_layers} layers", f"h{m.hidden_size}", f"L{config.data.seq_len}", kind]
    return ", ".join([*parts, f"{t.global_batch_size} in micro-batches of {t.micro_batch_size}"])


def build_parser() -> CommandParser:
    """The command line."""
    parser = harness.benchmark_parser("plan", __doc__, repeats=6)
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), help="besides those that calibrate (default all)")
    parser.add_argument("--steps", type=int, default=8, help="of every run; the first is not counted (default 8)")
    parser.add_argument("--keep", type=Path, help="keep the runs in this folder, and do not run again what it holds")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    return harness.run_benchmark(build_parser(), measure_planner, arguments)


def measure_planner(options: argparse.Namespace) -> Iterator[Note]:
    """Train, predict, compare."""
    # before a rank asks which device it has
    os.environ.update(rank_settings(os.environ, gpu=False, local=True) | {"CUDA_VISIBLE_DEVICES": ""})
    drop_known_warnings()
    chosen = [name for name, case in CASES.items() if case.calibrates or name in (options.cases or CASES)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        measured = measure_cases(chosen, folder, steps=options.steps, rounds=options.repeats)
        yield Note(f"{len(chosen)} grids and shapes", compare_predictions(measured))


if __name__ == "__main__":
    sys.exit(main())
