"""Which grid to run, before running it: memory, time and tokens a second of every legal plan on N devices.

The configuration's own grid stands beside the best one, with the override that turns the one into the other. A
prediction with printed assumptions (`planner/timing.py`), not a measurement. No torch, no device. Exit code 1 when
nothing fits.

    python tools/plan.py configs/7b.yaml --gpus 64 --gpu h100 model.vocab_size=50258
    python tools/plan.py configs/7b.yaml --gpus 64 --cluster configs/cluster/h100.yaml --calibrate runs/a runs/b
    python tools/plan.py --weak-scaling tools/bench/results --gpu h100
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# run as a script from any folder, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bd3_megatron.command import CommandParser, add_config_arguments, is_override, run_tool
from bd3_megatron.config.budget import samples_before, total_steps
from bd3_megatron.config.load import flatten, load_config, replace_field, with_later
from bd3_megatron.config.schema import Config
from bd3_megatron.cost.assumptions import engine_assumptions
from bd3_megatron.cost.parameters import parameter_count
from bd3_megatron.cost.traffic import bytes_by_axis
from bd3_megatron.data.vocabulary import vocabulary_size
from bd3_megatron.errors import ConfigError, UsageError, counted, either
from bd3_megatron.files import write_text
from bd3_megatron.planner.calibrate import Observation, calibrate, fitted_factors
from bd3_megatron.planner.constants import Constants, constants_for
from bd3_megatron.planner.machines import (
    ALIASES,
    DEVICES,
    GIB,
    ClusterFile,
    Machine,
    assumptions,
    device_name_of,
    full_name,
    machine_of,
)
from bd3_megatron.planner.peaks import PEAKS
from bd3_megatron.planner.plans import Plan, RankedPlans, best_by_grid, on_devices, plan_of, rank_plans, why_not
from bd3_megatron.planner.scaling import efficiency_curves, scaling_markdown, weak_scaling
from bd3_megatron.report.chart import Series, line_chart, stroke
from bd3_megatron.report.run_record import RunRecord, read_run
from launch.cluster import load_cluster

PROFILES = Path(__file__).resolve().parents[1] / "configs" / "cluster"
PLAN_HEADINGS = ("", "plan", "GiB", "step s", "tokens/s", "tokens/s/device", "MFU", "days", "against the best")
# Beyond any machine.
MOST_DEVICES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Everything that is printed."""

    config: Config
    machine: Machine
    constants: Constants
    devices: int
    tokens: float
    """Clean tokens of the whole training."""
    found: RankedPlans
    configured: Plan | str
    """The configuration's own grid, or why it is not legal on these devices."""
    typed: tuple[str, ...]
    """Overrides of the command line."""

    @property
    def best(self) -> Plan | None:
        return self.found.fitting[0] if self.found.fitting else None

    def is_configured(self, plan: Plan) -> bool:
        """Whether this is how the configuration would run as it stands."""
        return isinstance(self.configured, Plan) and plan.config == self.configured.config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    return run_tool(build_parser(), work, arguments)


def build_parser() -> CommandParser:
    """The arguments of this tool."""
    parser = CommandParser(prog="plan", description="Predict memory and speed of every legal grid on N devices.")
    add_config_arguments(parser, is_required=False)
    parser.add_argument("--gpus", type=int, help="number of devices N")
    parser.add_argument(
        "--gpu", help=f"one of {', '.join(sorted([*DEVICES, *ALIASES]))}; the cluster profile may name it"
    )
    parser.add_argument("--cluster", metavar="FILE", help="a profile of configs/cluster/ with your site's numbers")
    parser.add_argument("--calibrate", nargs="+", metavar="RUN", default=[], help="measured runs to fit the model to")
    parser.add_argument(
        "--tokens", type=float, help="clean tokens of the whole training (default: the configuration's)"
    )
    parser.add_argument("--top", type=int, default=5, help="plans to print in detail (default 5)")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="of what is printed")
    parser.add_argument("--weak-scaling", metavar="DIR", help="write the 1.3B/7B/30B curve to DIR instead")
    return parser


def work(options: argparse.Namespace) -> int:
    """Print the plans, or write the weak-scaling curve."""
    if options.weak_scaling is not None:
        return write_weak_scaling(options)
    # `--calibrate RUN ...` takes every word that follows it, overrides too
    runs = [word for word in options.calibrate if not is_override(word)]
    options.overrides += [word for word in options.calibrate if is_override(word)]
    options.calibrate = runs
    answer = answer_of(options)
    if options.format == "json":
        print(json.dumps(as_tree(answer, options.top), indent=2))
    else:
        print("\n".join(as_lines(answer, options.top, calibrated=bool(runs))))
    return 0 if answer.best is not None else 1


def answer_of(options: argparse.Namespace) -> Answer:
    """Rank all plans.

    Raises:
        UsageError: no configuration, or numbers out of range.
        ConfigError: a configuration, device or profile that cannot be planned.
    """
    if options.config is None or options.gpus is None:
        raise UsageError("a plan needs a CONFIG and --gpus N; or give --weak-scaling DIR.")
    if not 1 <= options.gpus <= MOST_DEVICES:
        raise UsageError(f"--gpus {options.gpus} is not between 1 and {MOST_DEVICES:,}; give the number of devices.")
    if options.top < 1:
        raise UsageError(f"--top {options.top} is below 1; give the number of plans to print.")
    config = load_config(options.config, options.overrides)
    # The table's size decides memory; it is read from the data where the configuration leaves it out.
    config = replace_field(config, "model.vocab_size", vocabulary_size(config))
    tokens = options.tokens
    if tokens is None:
        tokens = float(
            samples_before(config.train, total_steps(config.train, config.data.seq_len)) * config.data.seq_len
        )
    # Written this way round, so that a NaN is refused.
    if not (tokens > 0 and math.isfinite(tokens)):
        raise UsageError(f"--tokens {tokens:g} is no amount of training; give a positive number.")
    machine = machine_for(options, "fp32" if config.train.precision == "fp32" else "bf16")
    constants = constants_from(options, machine)
    try:
        configured: Plan | str = plan_of(on_devices(config, options.gpus), machine, constants)
    except ConfigError as error:
        # The configured grid may be illegal on N devices; that is a part of the answer and no error.
        configured = str(error)
    return Answer(
        config=config,
        machine=machine,
        constants=constants,
        devices=options.gpus,
        tokens=tokens,
        found=rank_plans(config, options.gpus, machine, constants),
        configured=configured,
        typed=tuple(options.overrides),
    )


def machine_for(options: argparse.Namespace, precision: str) -> Machine:
    """The device of the command line or of the cluster profile, with the profile's numbers.

    Raises:
        ConfigError: no device is named, or two.
    """
    known = either(sorted([*DEVICES, *ALIASES]))
    if options.cluster is None:
        if options.gpu is None:
            raise UsageError(f"no device is named; give --gpu ({known}) or --cluster with a profile that names one.")
        return machine_of(options.gpu, peak_tflops=_known_peak(options.gpu, precision))
    path = Path(options.cluster)
    # the name alone means a shipped profile
    profile = load_cluster(PROFILES / f"{path}.yaml" if not path.exists() and path.suffix == "" else path)
    gpu = options.gpu or profile.planner_gpu
    if gpu is None:
        raise ConfigError(f"cluster profile '{path}' names no planner_gpu; give --gpu ({known}).")
    # Bandwidths measured on one device must not be used for another.
    if profile.planner_gpu is not None and full_name(gpu) != full_name(profile.planner_gpu):
        raise ConfigError(
            f"--gpu {gpu} is not the planner_gpu={profile.planner_gpu} of '{path}', whose numbers are that device's; "
            "leave --gpu out, or name another profile."
        )
    # A site's node size stands in the launch part of the profile already.
    given: ClusterFile = profile.planner
    if given.gpus_per_node is None and profile.gpus_per_node:
        given = replace(given, gpus_per_node=profile.gpus_per_node)
    return machine_of(gpu, peak_tflops=_known_peak(gpu, precision), cluster=given)


def _known_peak(gpu: str, precision: str) -> float | None:
    # None for a device without a peak by name: the plan then has no MFU.
    peak = PEAKS.get(device_name_of(gpu))
    return None if peak is None else peak.of(precision)


def constants_from(options: argparse.Namespace, machine: Machine) -> Constants:
    """The time model's constants, fitted to the runs of --calibrate where there are any."""
    if not options.calibrate:
        return constants_for(machine)
    return calibrate([observation(read_run(Path(folder))) for folder in options.calibrate], machine)


def observation(run: RunRecord) -> Observation:
    """What calibration takes from a run: its configuration on the grid it had, and its typical step.

    Raises:
        ConfigError: no step is recorded.
    """
    seconds = run.typical("time/step_seconds")
    if seconds is None:
        raise ConfigError(f"run '{run.folder}' has no step recorded to calibrate on; give one that has run.")
    return Observation(on_devices(run.config, run.devices), seconds, run.time_split().get("optimizer"))


def override_to(plan: Plan, config: Config) -> list[str]:
    """What to add to a `bd3 train` command so that `config` runs as `plan`: every key that differs."""
    before, after = flatten(config), flatten(plan.config)
    # JSON is YAML, and writes null, true and lists on one line; names need no quotes
    shown = {key: value if isinstance(value, str) else json.dumps(value) for key, value in after.items()}
    return [f"{key}={shown[key]}" for key, value in after.items() if value != before[key]]


def as_lines(answer: Answer, top: int, *, calibrated: bool) -> list[str]:
    """The answer for a terminal."""
    config, found, best = answer.config, answer.found, answer.best
    lines = [
        f"{_size(parameter_count(config))} parameters, L {config.data.seq_len}, batch "
        f"{config.train.global_batch_size}, {answer.devices} x {answer.machine.name}, {answer.tokens:.3g} tokens: "
        f"{counted(len(found.fitting), 'plan fits', 'plans fit')}, "
        f"{counted(len(found.too_large), 'is', 'are')} too large, {counted(found.illegal, 'is', 'are')} illegal",
        "",
    ]
    if best is None:
        lines += ["nothing fits; the smallest plans are:", ""]
    chosen = list(found.fitting[:top]) or list(found.too_large[:top])
    # Shown once: in front, unless it is among the plans listed anyway.
    own = [] if isinstance(answer.configured, str) or any(map(answer.is_configured, chosen)) else [answer.configured]
    lines += _table([*own, *chosen], answer)
    if isinstance(answer.configured, str):
        lines += ["", f"The configured grid is not legal here: {answer.configured}"]
    if best is not None:
        added = override_to(best, config)
        lines += ["", f"To run the best, add: {shlex.join(added)}" if added else "The configuration is the best plan."]
        # A key may be set once only.
        kept = with_later(answer.typed, added)
        replaced = [override for override in answer.typed if override not in kept]
        lines += [f"and leave out: {shlex.join(replaced)}"] * bool(replaced)
    lines += [
        "",
        f"Parts of {'the best' if best is not None else 'the smallest'}:",
        *(f"  {line}" for line in _parts(chosen[0], answer.machine)),
    ]
    # A reader's own favourite is likely among them, with the reason why it is slower.
    others = [plan for plan in best_by_grid(found) if plan not in chosen]
    if others:
        lines += ["", "Why the other grids lose (the best plan of each):", "", *_table(others, answer)]
    fitted = [f"fitted: {fitted_factors(answer.constants)}"] if calibrated else []
    return [*lines, "", "Assumptions:", *(f"  {line}" for line in [*assumptions(answer.machine), *fitted])]


def _size(count: int) -> str:
    return f"{count / 1e9:.3g}B" if count >= 1e8 else f"{count / 1e6:.3g}M"


def _table(plans: Sequence[Plan], answer: Answer) -> list[str]:
    table = [list(PLAN_HEADINGS), *(_cells(plan, answer) for plan in plans)]
    widths = [max(len(row[i]) for row in table) for i in range(len(PLAN_HEADINGS))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def _cells(plan: Plan, answer: Answer) -> list[str]:
    marks = ["configured"] * answer.is_configured(plan) + ["best"] * (plan is answer.best)
    memory, reason = f"{plan.memory.peak / GIB:.1f}", why_not(plan, answer.best, answer.machine)
    if plan.time is None:
        return [" ".join(marks), plan.label, memory, "-", "-", "-", "-", "-", reason]
    mfu = plan.mfu(answer.machine)
    return [
        " ".join(marks),
        plan.label,
        memory,
        f"{plan.time.total:.4g}",
        f"{plan.tokens_per_second:,.0f}",
        f"{plan.tokens_per_second / answer.devices:,.0f}",
        "-" if mfu is None else f"{mfu:.1%}",
        f"{plan.days(answer.tokens):.3g}",
        reason,
    ]


def _parts(plan: Plan, machine: Machine) -> list[str]:
    memory = ", ".join(f"{part} {size / GIB:.2f}" for part, size in plan.memory.parts().items() if size)
    lines = [f"memory GiB: {memory}"]
    if plan.time is not None:
        total = plan.time.total
        lines.append("time: " + ", ".join(f"{part} {s / total:.1%}" for part, s in plan.time.parts().items() if s))
    moved = bytes_by_axis(plan.config, engine=engine_assumptions(machine.device_type, plan.config))
    gib = ", ".join(f"{axis} {size / GIB:.3g}" for axis, size in moved.items() if size)
    return [*lines, f"GiB that a rank of the first stage hands to collectives in a step: {gib or 'none'}"]


def as_tree(answer: Answer, top: int) -> dict[str, Any]:
    """The answer as JSON holds it, unrounded."""
    found, best, configured = answer.found, answer.best, answer.configured
    return {
        "fitting": len(found.fitting),
        "too_large": len(found.too_large),
        "illegal": found.illegal,
        "tokens": answer.tokens,
        "configured": {"refused": configured} if isinstance(configured, str) else _plan_tree(configured, answer),
        "override": override_to(best, answer.config) if best is not None else None,
        "plans": [_plan_tree(plan, answer) for plan in found.fitting[:top]],
        "by_grid": [_plan_tree(plan, answer) for plan in best_by_grid(found)],
        "assumptions": assumptions(answer.machine),
        "factors": fitted_factors(answer.constants),
    }


def _plan_tree(plan: Plan, answer: Answer) -> dict[str, Any]:
    fits = plan.time is not None
    return {
        "plan": plan.label,
        "memory_bytes": plan.memory.parts() | {"peak": plan.memory.peak},
        "time_seconds": plan.time.parts() | {"total": plan.time.total} if plan.time is not None else None,
        "tokens_per_second": plan.tokens_per_second if fits else None,
        "mfu": plan.mfu(answer.machine),
        "days": plan.days(answer.tokens) if fits else None,
        "against_the_best": why_not(plan, answer.best, answer.machine),
    }


def write_weak_scaling(options: argparse.Namespace) -> int:
    """Write the table and the chart of weak scaling on paper."""
    machine, folder = machine_for(options, "bf16"), Path(options.weak_scaling)
    constants = constants_from(options, machine)
    points = weak_scaling(machine, constants)
    series = [
        Series(name, curve, stroke(number)) for number, (name, curve) in enumerate(efficiency_curves(points).items())
    ]
    title, unit = f"weak scaling, simulated ({machine.name})", "tokens/s/device, % of the smallest"
    chart = line_chart(title, "devices", unit, series, log_x=True, from_zero=True, legend=True)
    # The name says it: these numbers were not measured.
    stem = f"weak_scaling_simulated_{machine.name}"
    write_text(folder / f"{stem}.md", scaling_markdown(points, machine, constants))
    write_text(folder / f"{stem}.svg", chart.file())
    print(f"wrote {folder / stem}.md and .svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
