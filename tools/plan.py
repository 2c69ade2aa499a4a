"""Which grid to run, before running it: memory, time and tokens a second of every legal plan on N devices.

    python tools/plan.py configs/7b.yaml --gpus 64 --gpu h100-sxm --tokens 300e9
    python tools/plan.py configs/7b.yaml --gpus 64 --gpu h100-sxm --cluster cluster.yaml --calibrate runs/a runs/b
    python tools/plan.py --weak-scaling tools/bench/results --gpu h100-sxm

A prediction with printed assumptions (bd3_megatron/planner/timing.py), not a measurement. No torch, no device.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bd3_megatron.config.load import load_config
from bd3_megatron.config.schema import Config
from bd3_megatron.cost.parameters import parameter_count
from bd3_megatron.errors import BD3Error, ConfigError
from bd3_megatron.files import write_text
from bd3_megatron.planner.calibrate import Observation, calibrate, explain
from bd3_megatron.planner.constants import Constants, constants_for
from bd3_megatron.planner.machines import GIB, KNOWN, Machine, assumptions, device_name_of, machine_of, read_cluster
from bd3_megatron.planner.peaks import PEAKS
from bd3_megatron.planner.scaling import as_markdown, curves, weak_scaling
from bd3_megatron.planner.search import Plan, Search, best_by_grid, search, why_not
from bd3_megatron.report.chart import Series, line_chart, stroke
from bd3_megatron.report.run_record import RunRecord, read_run

COLUMNS = ("plan", "GiB", "step s", "tokens/s", "tokens/s/device", "MFU", "days", "against the best")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plans; returns the exit code."""
    options = _options().parse_args(arguments)
    try:
        if options.weak_scaling is not None:
            return _weak_scaling(options)
        return _plan(options)
    except BD3Error as error:
        print(error, file=sys.stderr)
        return error.exit_code


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Predict memory and speed of every legal grid on N devices.")
    parser.add_argument("config", nargs="?", help="YAML file of the run; its parallel section is ignored")
    parser.add_argument("override", nargs="*", help="section.key=value, as for bd3 train")
    parser.add_argument("--gpus", type=int, help="number of devices N")
    parser.add_argument("--gpu", default="h100-sxm", help=f"one of {', '.join(sorted(KNOWN))}")
    parser.add_argument("--cluster", metavar="FILE", help="YAML with node size, link speeds, memory of your cluster")
    parser.add_argument("--calibrate", nargs="+", metavar="RUN", default=[], help="measured runs to fit the model to")
    parser.add_argument(
        "--tokens", type=float, default=300e9, help="clean tokens of the whole training (default 300e9)"
    )
    parser.add_argument("--top", type=int, default=5, help="plans to print in detail (default 5)")
    parser.add_argument("--vocab-size", type=int, help="number of ids, where the config leaves it to the data")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="of what is printed")
    parser.add_argument("--weak-scaling", metavar="DIR", help="write the 1.3B/7B/30B curve to DIR instead")
    return parser


def _machine(options: argparse.Namespace, precision: str) -> Machine:
    cluster = None if options.cluster is None else read_cluster(Path(options.cluster))
    peak = PEAKS.get(device_name_of(options.gpu))
    return machine_of(options.gpu, peak_tflops=None if peak is None else peak.of(precision), cluster=cluster)


def _plan(options: argparse.Namespace) -> int:
    if options.config is None or options.gpus is None:
        raise ConfigError("a plan needs a CONFIG and --gpus N; or give --weak-scaling DIR.")
    if options.gpus < 1:
        raise ConfigError(f"--gpus {options.gpus} is below 1; give the number of devices.")
    config = _with_vocabulary(load_config(options.config, options.override), options.vocab_size)
    machine = _machine(options, "fp32" if config.train.precision == "fp32" else "bf16")
    constants = _constants(options, machine)
    found = search(config, options.gpus, machine, constants)
    if options.format == "json":
        print(json.dumps(_tree(found, machine, constants, options), indent=2))
    else:
        print("\n".join(_text(config, found, machine, constants, options)))
    return 0


def _with_vocabulary(config: Config, vocab_size: int | None) -> Config:
    return config if vocab_size is None else replace(config, model=replace(config.model, vocab_size=vocab_size))


def _constants(options: argparse.Namespace, machine: Machine) -> Constants:
    if not options.calibrate:
        return constants_for(machine)
    seen = [observation(read_run(Path(folder)), options.vocab_size) for folder in options.calibrate]
    return calibrate(seen, machine)


def observation(run: RunRecord, vocab_size: int | None = None) -> Observation:
    """What calibration takes from a run: its configuration on the grid it had, and its typical step.

    Raises:
        ConfigError: no step is recorded.
    """
    seconds = run.typical("time/step_seconds")
    if seconds is None:
        raise ConfigError(f"run '{run.folder}' has no step recorded to calibrate on; give one that has run.")
    parallel = run.config.parallel
    dp = max(1, run.devices // parallel.model_ranks)
    config = replace(_with_vocabulary(run.config, vocab_size), parallel=replace(parallel, dp=dp))
    return Observation(config, seconds, run.time_split().get("optimizer"))


def _text(
    config: Config, found: Search, machine: Machine, constants: Constants, options: argparse.Namespace
) -> list[str]:
    best = found.fitting[0] if found.fitting else None
    lines = [
        f"{parameter_count(config) / 1e9:.3g}B parameters, L {config.data.seq_len}, batch "
        f"{config.train.global_batch_size}, {options.gpus} x {machine.name}, {options.tokens:.3g} tokens: "
        f"{len(found.fitting)} plans fit, {len(found.too_large)} are too large, {found.illegal} are illegal",
        "",
    ]
    if best is None:
        lines += ["nothing fits; the smallest plans are:", ""]
    chosen = list(found.fitting[: options.top]) or list(found.too_large[: options.top])
    lines += _table(chosen, best, machine, options)
    lines += ["", "Parts of the first:", *(f"  {line}" for line in _parts(chosen[0]))]
    others = [plan for plan in best_by_grid(found) if plan not in chosen]
    lines += ["", "Why the other grids lose (the best plan of each):", ""] if others else []
    lines += _table(others, best, machine, options) if others else []
    fitted = [f"fitted: {explain(constants)}"] if options.calibrate else []
    return [*lines, "", "Assumptions:", *(f"  {line}" for line in [*assumptions(machine), *fitted])]


def _table(plans: Sequence[Plan], best: Plan | None, machine: Machine, options: argparse.Namespace) -> list[str]:
    table = [list(COLUMNS), *(_cells(plan, best, machine, options) for plan in plans)]
    widths = [max(len(row[i]) for row in table) for i in range(len(COLUMNS))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def _cells(plan: Plan, best: Plan | None, machine: Machine, options: argparse.Namespace) -> list[str]:
    memory, reason = f"{plan.memory.peak / GIB:.1f}", why_not(plan, best, machine)
    if plan.time is None:
        return [plan.describe(), memory, "-", "-", "-", "-", "-", reason]
    return [
        plan.describe(),
        memory,
        f"{plan.time.total:.4g}",
        f"{plan.tokens_per_second:,.0f}",
        f"{plan.tokens_per_second / options.gpus:,.0f}",
        f"{plan.mfu(machine):.1%}",
        f"{plan.days(options.tokens):.3g}",
        reason,
    ]


def _parts(plan: Plan) -> list[str]:
    memory = ", ".join(f"{part} {size / GIB:.2f}" for part, size in plan.memory.parts().items() if size)
    lines = [f"memory GiB: {memory}"]
    if plan.time is not None:
        total = plan.time.total
        lines.append("time: " + ", ".join(f"{part} {s / total:.1%}" for part, s in plan.time.parts().items() if s))
    return lines


def _tree(found: Search, machine: Machine, constants: Constants, options: argparse.Namespace) -> dict[str, Any]:
    best = found.fitting[0] if found.fitting else None

    def describe(plan: Plan) -> dict[str, Any]:
        fits = plan.time is not None
        return {
            "plan": plan.describe(),
            "memory_bytes": plan.memory.parts() | {"peak": plan.memory.peak},
            "time_seconds": plan.time.parts() | {"total": plan.time.total} if plan.time is not None else None,
            "tokens_per_second": plan.tokens_per_second if fits else None,
            "mfu": plan.mfu(machine) if fits else None,
            "days": plan.days(options.tokens) if fits else None,
            "against_the_best": why_not(plan, best, machine),
        }

    return {
        "fitting": len(found.fitting),
        "too_large": len(found.too_large),
        "illegal": found.illegal,
        "plans": [describe(plan) for plan in found.fitting[: options.top]],
        "by_grid": [describe(plan) for plan in best_by_grid(found)],
        "assumptions": assumptions(machine),
        "factors": explain(constants),
    }


def _weak_scaling(options: argparse.Namespace) -> int:
    machine, folder = _machine(options, "bf16"), Path(options.weak_scaling)
    constants = _constants(options, machine)
    points = weak_scaling(machine, constants)
    series = [Series(name, curve, stroke(number)) for number, (name, curve) in enumerate(curves(points).items())]
    title, unit = f"weak scaling, simulated ({machine.name})", "tokens/s/device, % of the smallest"
    chart = line_chart(title, "devices", unit, series, log_x=True, from_zero=True, legend=True)
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"weak_scaling_simulated_{machine.name}"
    write_text(folder / f"{stem}.md", as_markdown(points, machine, constants))
    write_text(folder / f"{stem}.svg", chart.file())
    print(f"wrote {folder / stem}.md and .svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
