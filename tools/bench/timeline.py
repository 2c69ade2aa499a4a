"""What measuring where the time goes costs: the marks of one step against that step.

    python -m tools.bench.timeline [--layers 2 --hidden 64 --heads 4 --length 64 --block 4 --vocab 256 --batch 1]

The marks are those of train/trainer around one step of `--micro-batches`: two a span, around data, the schedule, every
forward and the optimizer, and one at each end. The step is forward and backward of the shipped path, one micro-batch at a
time; a small one, because on a large one the share vanishes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

# run as a script from any folder, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bd3_megatron.command import CommandParser
from bd3_megatron.train.timeline import Timeline, device_event_factory
from tools.bench import harness
from tools.bench.harness import Note
from tools.bench.step import make_problem, shipped_step

STEPS_TIMED = 200
"""Steps' marks in one timing: one step's are too quick for the clock."""


def marks_of_steps(timeline: Timeline, micro_batches: int, steps: int = STEPS_TIMED) -> None:
    """Set the marks of `steps` steps that do nothing, and read what they measured."""
    for step in range(steps):
        timeline.start_step(step)
        with timeline.span("data_wait"):
            pass
        with timeline.span("backward"):
            for _ in range(micro_batches):
                with timeline.span("forward"):
                    pass
        with timeline.span("optimizer"):
            pass
        timeline.end_step()
    # Reading the marks is part of the cost.
    timeline.finished()


def build_parser() -> CommandParser:
    """The command line."""
    parser = harness.benchmark_parser("timeline", __doc__, repeats=9)
    parser.add_argument("--backend", default="auto", help="attention backend")
    parser.add_argument("--style", choices=("modern", "paper"), default="modern")
    parser.add_argument("--micro-batches", type=int, default=8, help="of one step (default 8)")
    sizes = {"layers": 2, "hidden": 64, "heads": 4, "kv-heads": 0, "ffn": 0, "length": 64, "block": 4}
    for name, value in {**sizes, "vocab": 256, "batch": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    return harness.run_benchmark(build_parser(), measure_marks, arguments)


def measure_marks(options: argparse.Namespace) -> Iterator[Note]:
    """Marks and step in turns."""
    micro_step, _, label = shipped_step(make_problem(options), options.vocab, options.backend)
    timeline = Timeline(event_factory=device_event_factory() if options.device == "cuda" else None)

    def step() -> None:
        for _ in range(options.micro_batches):
            micro_step()

    candidates = {"step": step, "marks": lambda: marks_of_steps(timeline, options.micro_batches)}
    seconds = harness.interleave(candidates, repeats=options.repeats, device=options.device)
    # Two a span around data, schedule and optimizer, one at each end, two a forward.
    count = 8 + 2 * options.micro_batches
    shares = [m / STEPS_TIMED / s for m, s in zip(seconds["marks"], seconds["step"], strict=True)]
    each = statistics.median(seconds["marks"]) / STEPS_TIMED
    rows = [
        (f"step of {options.micro_batches} micro-batches ({label})", harness.milliseconds(seconds["step"]), "100 %"),
        (f"its {count} marks", f"{1e3 * each:.4g}", f"{100 * statistics.median(shares):.2g} %"),
    ]
    body = harness.table(("part", "ms", "share"), rows) + f"\n\none mark takes {1e6 * each / count:.2g} microseconds"
    shape = f"{options.layers} layers, h{options.hidden}, L{options.length}, S{options.block}, V{options.vocab}"
    yield Note(f"marks of a step, {shape}, batch {options.batch}", body)


if __name__ == "__main__":
    sys.exit(main())
