"""Weak scaling on paper: the best plan of three model sizes from one node to 1,024 devices.

Every size has L 2048, S 16 and a fixed number of sequences a device. Efficiency is tokens a second and device relative to
the smallest number of devices that holds the model. This is a model's output, not a measurement, and the table says so
with every assumption. Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from bd3_megatron.config.load import config_from_tree
from bd3_megatron.config.schema import Config
from bd3_megatron.cost.parameters import parameter_count
from bd3_megatron.planner.constants import Constants, constants_for
from bd3_megatron.planner.machines import GIB, Machine, assumptions
from bd3_megatron.planner.plans import Plan, rank_plans

DEVICE_COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
# the batch grows with the devices, so that the work of a device stays the same
SEQUENCES_PER_DEVICE = 4
SEQ_LEN, BLOCK_SIZE = 2048, 16


@dataclass(frozen=True)
class ModelSize:
    """A model shape, modern style."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int


SIZES = (
    ModelSize("1.3B", 24, 2048, 16, 16, 5632, 50258),
    ModelSize("7B", 32, 4096, 32, 32, 11008, 32000),
    ModelSize("30B", 60, 6656, 64, 64, 17920, 32000),
)


@dataclass(frozen=True)
class ScalingPoint:
    """Best plan of a size on so many devices; None where nothing fits."""

    size: ModelSize
    devices: int
    plan: Plan | None
    efficiency: float | None


def weak_scaling_config(size: ModelSize, devices: int) -> Config:
    """The configuration of a size in weak scaling."""
    return config_from_tree(
        {
            # nothing is run; the schema asks for a folder and a length
            "run": {"dir": "unused"},
            "model": {
                "num_layers": size.layers,
                "hidden_size": size.hidden,
                "num_heads": size.heads,
                "num_kv_heads": size.kv_heads,
                "ffn_hidden_size": size.ffn,
                "vocab_size": size.vocab,
            },
            "data": {"seq_len": SEQ_LEN},
            "diffusion": {"block_size": BLOCK_SIZE},
            "train": {"steps": 1, "global_batch_size": SEQUENCES_PER_DEVICE * devices},
        }
    )


def weak_scaling(
    machine: Machine,
    constants: Constants | None = None,
    *,
    devices: Sequence[int] = DEVICE_COUNTS,
    sizes: Sequence[ModelSize] = SIZES,
) -> list[ScalingPoint]:
    """The curve: every size on every number of devices."""
    points: list[ScalingPoint] = []
    for size in sizes:
        base: float | None = None
        for count in devices:
            found = rank_plans(weak_scaling_config(size, count), count, machine, constants)
            plan = found.fitting[0] if found.fitting else None
            rate = None if plan is None else plan.tokens_per_second / count
            # the smallest number of devices that holds the model is the whole of 100 %
            base = rate if base is None else base
            points.append(ScalingPoint(size, count, plan, None if rate is None or base is None else rate / base))
    return points


def scaling_markdown(points: Sequence[ScalingPoint], machine: Machine, constants: Constants | None = None) -> str:
    """The table with all assumptions."""
    lines = [
        f"# Weak scaling, simulated: {machine.name}",
        "",
        "Output of the planner's time model (bd3_megatron/planner/timing.py), **not measured**.",
        "",
        "| model | parameters | devices | batch | best plan | GiB | step s | tokens/s/device | MFU | efficiency |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_row(point, machine) for point in points),
        "",
        "Assumptions:",
        "",
        *(f"* {line}" for line in [*assumptions(machine), *_model_assumptions(constants or constants_for(machine))]),
    ]
    return "\n".join(lines) + "\n"


def _row(point: ScalingPoint, machine: Machine) -> str:
    config = weak_scaling_config(point.size, point.devices)
    cells = [
        point.size.name,
        f"{parameter_count(config) / 1e9:.2f}B",
        str(point.devices),
        str(config.train.global_batch_size),
    ]
    plan = point.plan
    # a row without a plan says so: a hole in the table would look like a number that was forgotten
    if plan is None or plan.time is None or point.efficiency is None:
        return f"| {' | '.join([*cells, 'nothing fits', '-', '-', '-', '-', '-'])} |"
    cells += [
        plan.label,
        f"{plan.memory.peak / GIB:.1f}",
        f"{plan.time.total:.3f}",
        f"{plan.tokens_per_second / point.devices:,.0f}",
        "-" if (mfu := plan.mfu(machine)) is None else f"{mfu:.1%}",
        f"{point.efficiency:.1%}",
    ]
    return f"| {' | '.join(cells)} |"


def _model_assumptions(constants: Constants) -> list[str]:
    # every constant is printed, because the table is worth no more than they are
    values = ", ".join(f"{f.name} {getattr(constants, f.name):g}" for f in fields(constants))
    return [
        f"modern style, L {SEQ_LEN}, S {BLOCK_SIZE}, {SEQUENCES_PER_DEVICE} sequences a device and step, "
        "masked fraction by the loglinear schedule, bf16 with fp32 master weights, moments, average and gradients",
        "attention does the allowed pairs exactly; all rows but the last clean block in every layer; logits of masked rows",
        "tensor- and context-parallel collectives are not hidden; ZeRO-1 reduces during the last backward; bubbles of 1F1B",
        "rings on the slowest link a group crosses; groups in the order tp, cp, dp, pp from the fastest axis; "
        "no congestion, stragglers, checkpoint or data stalls",
        f"constants: {values}",
    ]


def efficiency_curves(points: Sequence[ScalingPoint]) -> dict[str, list[tuple[float, float]]]:
    """{model: [(devices, efficiency in percent)]} of the points that fit."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        if point.efficiency is not None:
            lines.setdefault(point.size.name, []).append((float(point.devices), 100 * point.efficiency))
    return lines
