#!/usr/bin/env python3
"""How much one block's loss and one batch's gradient vary, by noise interval and block size: the paper's Table 8 for any run.

    python -m tools.estimate_variance runs/mine
    python -m tools.estimate_variance --train configs/debug_cpu.yaml --block-size 4 16 --steps 400 --out runs/variance

With --train a short run is made for each block size first, through `bd3 train`.
Losses are nats per token of one block, variances over data and noise; a gradient's variance is the trace of its covariance
over batches of --batch-rows rows. Masks are not resampled. The plain model in fp32 on the CPU, averaged weights.
Refuses: autoregressive runs, which draw no noise, and runs without held-out rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# run as a script from any folder, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bd3_megatron.command import CommandParser, run_tool


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)

    def work(options: argparse.Namespace) -> int:
        # torch is paid for by those who measure, not by those who ask for --help
        from tools.variance.measure import estimate_variances

        estimate_variances(options, given)
        return 0

    return run_tool(build_parser(), work, given)


def build_parser() -> CommandParser:
    """The arguments of this tool."""
    parser = CommandParser(
        prog="estimate_variance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, help="run folders or checkpoints")
    parser.add_argument("--train", metavar="CONFIG", help="train a short run for each --block-size first")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides for --train")
    parser.add_argument("--block-size", type=int, nargs="+", default=[4], help="with --train (default 4)")
    parser.add_argument("--steps", type=int, default=400, help="with --train (default 400)")
    parser.add_argument("--out", type=Path, default=Path("runs/variance"), help="with --train: where the runs are made")
    parser.add_argument(
        "--batches", type=int, default=32, help="held-out batches a candidate is scored on (default 32)"
    )
    parser.add_argument("--gradient-batches", type=int, default=12, help="batches for gradients (default 12; 0: none)")
    parser.add_argument("--batch-rows", type=int, default=16, help="rows of a batch (default 16)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (default 1)")
    parser.add_argument("--plots", type=Path, default=None, help="where the plots go (default: beside the note)")
    parser.add_argument("--no-note", action="store_true", help="print only; leave tools/bench/results alone")
    # For tests: where the note goes.
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    # Read by the note's line on hardware.
    parser.set_defaults(device="cpu")
    return parser


if __name__ == "__main__":
    sys.exit(main())
