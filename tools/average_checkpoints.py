"""Average checkpoints of a run: `python tools/average_checkpoints.py RUN --last 4 --out FOLDER`.

FOLDER becomes a checkpoint of weights that tools/convert_checkpoint.py and tools/inspect_checkpoint.py read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# run as a script from any folder, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bd3_megatron.command import CommandParser, run_tool


def build_parser() -> CommandParser:
    """The arguments of this tool."""
    parser = CommandParser(
        prog="average_checkpoints", description="Write the mean of several checkpoints as a checkpoint."
    )
    parser.add_argument(
        "sources", type=Path, nargs="+", help="one run's folder (with --last or --best), or checkpoints"
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--last", type=int, help="the newest so many")
    chosen.add_argument("--best", type=int, help="those with the lowest held-out loss in metrics.jsonl")
    parser.add_argument("--raw", action="store_true", help="trained weights instead of their moving averages")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint to write; must not exist")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    return run_tool(build_parser(), work, arguments)


def work(parsed: argparse.Namespace) -> int:
    """Average, and say of which steps."""
    # Late: torch is not needed to print --help.
    from bd3_megatron.convert.average import average, best_checkpoints, last_checkpoints

    def warn(text: str) -> None:
        print(text, file=sys.stderr)

    # Named one by one: taken as they are, in any order.
    paths = parsed.sources
    if parsed.last is not None:
        paths = last_checkpoints(parsed.sources[0], parsed.last, warn=warn)
    elif parsed.best is not None:
        paths = best_checkpoints(parsed.sources[0], parsed.best, warn=warn)
    manifest = average(paths, parsed.out, raw=parsed.raw)
    # The moving averages where every checkpoint has one, see convert/average.
    kind = "averaged" if manifest.origin["weights"] == "ema" else "raw"
    print(f"{parsed.out}: mean of the {kind} weights of steps {manifest.origin['averaged_steps']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
