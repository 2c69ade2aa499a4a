"""What noise costs: levels, masks and loss rows of a batch, against the training step that they are for.

    python -m tools.bench.rng                                   # [64, 2048], a step of 2 layers of the 110M shape
    python -m tools.bench.rng --layers 12 --step-rows 2 --repeats 1
    python -m tools.bench.rng --device cuda --layers 12 --step-rows 64

Noise is drawn on the CPU by every rank for its own rows, as in training, also with --device cuda, where the draw on the GPU
itself is timed beside it. The step is forward and backward of --step-rows rows, without the optimizer; its time is taken
in proportion to the rows. A model of few layers makes noise look dearer than it is. Target: below 2 % of a step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

# run as a script from any folder, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bd3_megatron.command import CommandParser
from bd3_megatron.data.batch import CleanBatch
from bd3_megatron.diffusion.noise_level import Interval, noise_levels
from bd3_megatron.diffusion.objective import BlockDiffusion
from bd3_megatron.parallel.pair_split import pair_layout
from bd3_megatron.train.batches import Noise, make_micro_batch
from tools.bench import harness
from tools.bench.harness import Note
from tools.bench.step import make_problem, shipped_step

STEP_ROW = "training step"
TOTAL = "micro-batch: levels, masks, loss rows"
TARGET = 0.02
"""Of a training step."""
SHAPE = {"layers": 2, "hidden": 768, "heads": 12, "kv-heads": 0, "ffn": 0, "length": 2048, "block": 16, "vocab": 50258}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    return harness.run_benchmark(build_parser(), measure_noise, arguments)


def measure_noise(options: argparse.Namespace) -> Iterator[Note]:
    """Draws and the step, interleaved."""
    # The step's batch; noise is drawn for --rows, a whole batch's worth.
    options.batch = options.step_rows
    step, _, label = shipped_step(make_problem(options), options.vocab, "auto")
    seconds = harness.interleave(draws(options) | {STEP_ROW: step}, repeats=options.repeats, device=options.device)
    # In proportion: forward and backward are linear in the rows, and a full batch would take minutes.
    seconds[STEP_ROW] = [s * options.rows / options.step_rows for s in seconds[STEP_ROW]]
    rows = [(name, harness.milliseconds(s), share(s, seconds[STEP_ROW])) for name, s in seconds.items()]
    table = harness.table((f"[{options.rows}, {options.length}]", "ms", "of a step"), rows)
    times = f"{options.rows} / {options.step_rows}"
    note = f"attention {label}; the step was timed at {options.step_rows} rows and taken {times} times."
    # The other way round: how fast a device must be before noise on the CPU is in its way.
    limit = TARGET * options.rows * options.length / statistics.median(seconds[TOTAL])
    note += (
        f" Noise stays below {100 * TARGET:g} % of a step on devices that make fewer than {limit:,.0f} data tokens/s."
    )
    if options.device == "cpu":
        note += " On GPU: not measured."
    shape = f"{options.layers} layers, h{options.hidden}, S{options.block}, V{options.vocab}"
    yield Note(f"noise against a step of {shape}, {options.device}", f"{table}\n\n{note}")


def build_parser() -> CommandParser:
    """The command line."""
    parser = harness.benchmark_parser("rng", __doc__, repeats=3)
    parser.add_argument("--rows", type=int, default=64, help="rows of the batch whose noise is drawn (default 64)")
    parser.add_argument("--step-rows", type=int, default=1, help="rows of the timed step (default 1)")
    parser.add_argument("--style", choices=("modern", "paper"), default="paper")
    for name, value in SHAPE.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser


def draws(options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """What is timed of the noise, by name."""
    generator = torch.Generator().manual_seed(0)
    tokens_BL = torch.randint(0, options.vocab - 1, (options.rows, options.length), generator=generator)
    clean = CleanBatch(tokens_BL=tokens_BL, index_B=torch.arange(options.rows))
    noise = Noise(
        seed=1, mask_id=options.vocab - 1, group_size=options.rows, block_size=options.block, interval=Interval()
    )
    diffusion = make_problem(options).config.diffusion
    layout = pair_layout(BlockDiffusion(block_size=options.block), length=options.length)
    blocks = options.length // options.block
    found: dict[str, Callable[[], object]] = {
        "levels": lambda: noise_levels(
            1, clean.index_B, num_blocks=blocks, interval=Interval(), group_size=options.rows
        ),
        "levels and masks": lambda: noise.corrupt(clean, diffusion),
        TOTAL: lambda: make_micro_batch(clean, noise, diffusion, layout),
    }
    if options.device == "cuda":
        # For comparison only: training draws on the CPU, so that the number of loss rows is known without asking the
        # device.
        there = CleanBatch(tokens_BL=tokens_BL.cuda(), index_B=clean.index_B)
        found["levels and masks, drawn on the GPU"] = lambda: noise.corrupt(there, diffusion)
    return found


def share(seconds: Sequence[float], step: Sequence[float]) -> str:
    """Median over rounds of the part of a step."""
    return f"{100 * statistics.median(s / whole for s, whole in zip(seconds, step, strict=True)):.3g} %"


if __name__ == "__main__":
    sys.exit(main())
