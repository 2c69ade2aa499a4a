"""Average checkpoints of a run: `python tools/average_checkpoints.py RUN --last 4 --out FOLDER`.

FOLDER becomes a checkpoint of weights that tools/convert_checkpoint.py and tools/inspect_checkpoint.py read.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def new_parser() -> argparse.ArgumentParser:
    """The arguments of this tool."""
    parser = argparse.ArgumentParser(description="Write the mean of several checkpoints as a checkpoint.")
    parser.add_argument("places", type=Path, nargs="+", help="one run's folder (with --last or --best), or checkpoints")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--last", type=int, help="the newest so many")
    chosen.add_argument("--best", type=int, help="those with the lowest held-out loss in metrics.jsonl")
    parser.add_argument("--raw", action="store_true", help="trained weights instead of their moving averages")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint to write; must not exist")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    parsed = new_parser().parse_args(arguments)
    from bd3_megatron.convert.average import average, best_checkpoints, last_checkpoints
    from bd3_megatron.errors import BD3Error

    def warn(text: str) -> None:
        print(text, file=sys.stderr)

    try:
        paths = parsed.places
        if parsed.last is not None:
            paths = last_checkpoints(parsed.places[0], parsed.last, warn=warn)
        elif parsed.best is not None:
            paths = best_checkpoints(parsed.places[0], parsed.best, warn=warn)
        manifest = average(paths, parsed.out, raw=parsed.raw)
    except BD3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    kind = "averaged" if manifest.origin["weights"] == "ema" else "raw"
    print(f"{parsed.out}: mean of the {kind} weights of steps {manifest.origin['averaged_steps']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
