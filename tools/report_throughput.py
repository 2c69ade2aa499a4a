"""Throughput of one or many runs, from their metrics.jsonl: table, notes and plots. Works while a job runs.

    python tools/report_throughput.py runs/a runs/b --format markdown --plots plots/

Reads only; needs no torch and no device. What the columns mean stands in bd3_megatron/train/throughput.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

# run as a script from any folder, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bd3_megatron.command import CommandParser, run_tool
from bd3_megatron.files import write_text
from bd3_megatron.report.chart import Chart, Series, line_chart, stacked_bars, stroke
from bd3_megatron.report.run_record import RunRecord, read_run
from bd3_megatron.report.run_summary import RunComparison, RunSummary, compare_runs

THROUGHPUT_HEADINGS = (
    "run",
    "model",
    "devices",
    "grid",
    "steps",
    "tokens/s",
    "tokens/s/device",
    "TFLOP/s/device",
    "MFU",
    "MFU-min",
    "HFU",
    "step s",
    "memory GiB",
    "scaling",
    "goodput",
    "restarts",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    return run_tool(build_parser(), work, arguments)


def work(options: argparse.Namespace) -> int:
    """Print the table and write the plots."""
    runs = [read_run(Path(folder)) for folder in options.run]
    compared = compare_runs(runs)
    print({"text": as_text, "markdown": throughput_markdown, "json": as_json}[options.format](compared))
    if options.plots is not None:
        # To stderr, so that the table can be piped.
        for path in write_plots(runs, compared, Path(options.plots)):
            print(f"wrote {path}", file=sys.stderr)
    return 0


def build_parser() -> CommandParser:
    """The arguments of this tool."""
    parser = CommandParser(prog="report_throughput", description="Throughput of runs, from their metrics.jsonl.")
    parser.add_argument("run", nargs="+", help="folder of a run (run.dir)")
    parser.add_argument("--format", choices=("text", "markdown", "json"), default="text", help="of what is printed")
    parser.add_argument(
        "--plots", metavar="DIR", help="also write throughput.svg, time_split.svg and scaling.svg there"
    )
    return parser


def _cells(row: RunSummary) -> list[str]:
    scaling = "-" if row.efficiency is None else f"{row.scaling} {row.efficiency:.0%}"
    memory = None if row.peak_memory_bytes is None else row.peak_memory_bytes / 2**30
    return [
        row.run,
        row.model,
        str(row.devices),
        row.grid,
        str(row.steps),
        _number(row.data_tokens_per_second, ",.0f"),
        _number(row.data_tokens_per_second_per_device, ",.0f"),
        _number(row.model_tflops_per_second, ".3g"),
        _number(row.mfu, ".1%"),
        _number(row.mfu_min, ".1%"),
        _number(row.hfu, ".1%"),
        _number(row.step_seconds, ".4g"),
        _number(memory, ".2f"),
        scaling,
        _number(row.goodput, ".1%"),
        str(row.restarts),
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _split_line(row: RunSummary) -> str | None:
    if not row.time_split:
        return None
    # The largest first: it is what to look at.
    shares = sorted(row.time_split.items(), key=lambda item: -item[1])
    return f"{row.run}: " + ", ".join(f"{kind} {share:.1%}" for kind, share in shares)


def _tail(compared: RunComparison) -> list[str]:
    splits = [line for row in compared.rows if (line := _split_line(row)) is not None]
    tail = ["", "Where the time goes:", *(f"  {line}" for line in splits)] if splits else []
    notes = [*compared.run_notes, *compared.group_notes]
    return tail + (["", "Notes:", *(f"  {note}" for note in notes)] if notes else [])


def as_text(compared: RunComparison) -> str:
    """Aligned columns for a terminal."""
    table = [list(THROUGHPUT_HEADINGS), *(_cells(row) for row in compared.rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(THROUGHPUT_HEADINGS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    return "\n".join(lines + _tail(compared))


def throughput_markdown(compared: RunComparison) -> str:
    """A Markdown table and lists."""
    lines = [f"| {' | '.join(THROUGHPUT_HEADINGS)} |", f"|{'---|' * len(THROUGHPUT_HEADINGS)}"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in compared.rows]
    tail = [f"* {line.strip()}" if line.startswith("  ") else line for line in _tail(compared)]
    return "\n".join(lines + [piece for line in tail for piece in ([line, ""] if line.endswith(":") else [line])])


def as_json(compared: RunComparison) -> str:
    """Everything, unrounded; times as shares of the step."""
    notes = [*compared.run_notes, *compared.group_notes]
    return json.dumps({"runs": [asdict(row) for row in compared.rows], "notes": notes}, indent=2)


def write_plots(runs: Sequence[RunRecord], compared: RunComparison, folder: Path) -> list[Path]:
    """Write the plots that the runs have data for; returns their paths."""
    charts = {"throughput.svg": _over_steps(runs)}
    splits = {row.run: row.time_split for row in compared.rows if row.time_split}
    if splits:
        charts["time_split.svg"] = stacked_bars("where the time of a step goes", splits)
    # One number of devices is no curve.
    if len({row.devices for row in compared.rows}) > 1:
        charts["scaling.svg"] = _over_devices(compared)
    folder.mkdir(parents=True, exist_ok=True)
    for name, chart in charts.items():
        write_text(folder / name, chart.file())
    return [folder / name for name in charts]


def _over_steps(runs: Sequence[RunRecord]) -> Chart:
    key = "throughput/data_tokens_per_second"
    series = [
        # Per device, so that runs of different size can be compared.
        Series(run.name, [(float(step), rate / run.devices) for step, rate in run.series(key).items()], stroke(number))
        for number, run in enumerate(runs)
    ]
    return line_chart("throughput", "step", "data tokens/s/device", series, from_zero=True, legend=True)


def _over_devices(compared: RunComparison) -> Chart:
    models: dict[str, list[tuple[float, float]]] = {}
    for row in compared.rows:
        if row.data_tokens_per_second_per_device:
            # Scaling is of one model; runs of others get a line of their own.
            models.setdefault(row.model, []).append((float(row.devices), row.data_tokens_per_second_per_device))
    series = [Series(model, sorted(points), stroke(number)) for number, (model, points) in enumerate(models.items())]
    return line_chart("scaling", "devices", "data tokens/s/device", series, log_x=True, from_zero=True, legend=True)


if __name__ == "__main__":
    sys.exit(main())
