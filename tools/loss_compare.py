#!/usr/bin/env python3
"""Compare the loss curves of runs: equal loss is what "the grid does not matter" means.

    tools/loss_compare.py RUN RUN [RUN ...] [--tolerance 1e-5] [--svg FILE]

Reads metrics.jsonl of each run folder, takes the steps all of them have logged, and prints for every run the largest
absolute and the mean difference of its training loss from the first run's, in nats per token. Exit code 1 when a run is
further away than the tolerance. Torch-free.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# run as a script from any folder, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bd3_megatron.command import CommandParser, run_tool
from bd3_megatron.errors import DataError, UsageError
from bd3_megatron.files import write_text
from bd3_megatron.report.chart import Series, line_chart, stroke
from bd3_megatron.report.run_record import LOSS_KEY, read_run


def losses(folder: Path) -> dict[int, float]:
    """Step -> training loss of a run.

    Raises:
        DataError: no such run, or it has logged no loss yet.
    """
    found = read_run(folder).series(LOSS_KEY)
    if not found:
        raise DataError(f"'{folder}' has logged no {LOSS_KEY} yet; wait for its first steps.")
    return found


def loss_gaps(runs: dict[str, dict[int, float]]) -> list[tuple[str, int, float, float]]:
    """(name, common steps, largest and mean absolute difference from the first run) of every run.

    Raises:
        DataError: the runs have no step in common.
    """
    # Runs may log at other steps or end earlier; a step that only one has says nothing.
    common = sorted(set.intersection(*(set(run) for run in runs.values())))
    if not common:
        raise DataError(f"the runs {', '.join(runs)} have no logged step in common; log the same steps in both.")
    first = next(iter(runs.values()))
    rows = []
    for name, run in runs.items():
        gaps = [abs(run[step] - first[step]) for step in common]
        rows.append((name, len(common), max(gaps), sum(gaps) / len(gaps)))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    return run_tool(build_parser(), work, arguments)


def build_parser() -> CommandParser:
    """The arguments of this tool."""
    parser = CommandParser(
        prog="loss_compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders; the first is the reference")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="nats per token (default 1e-5)")
    parser.add_argument("--svg", type=Path, help="also draw the curves")
    return parser


def work(options: argparse.Namespace) -> int:
    """Print the table; 0 when all are within the tolerance, 1 when not."""
    # Written this way round, so that a NaN is refused.
    if not options.tolerance >= 0:
        raise UsageError(f"--tolerance {options.tolerance:g} is no distance; give nats per token, 0 or more.")
    runs = {name: losses(Path(name)) for name in options.runs}
    rows = loss_gaps(runs)
    print(f"{'run':40} {'steps':>6} {'largest':>10} {'mean':>10}")
    for name, steps, largest, mean in rows:
        print(f"{name:40} {steps:6} {largest:10.2e} {mean:10.2e}")
    if options.svg is not None:
        series = [Series(name, sorted(run.items()), stroke(i)) for i, (name, run) in enumerate(runs.items())]
        chart = line_chart("Training loss", "step", "nats per token", series, from_zero=True, legend=True)
        write_text(options.svg, chart.file())
    # The largest gap decides: a mean would hide a spike.
    return int(max(row[2] for row in rows) > options.tolerance)


if __name__ == "__main__":
    sys.exit(main())
