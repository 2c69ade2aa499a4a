"""What every benchmark shares: its command line, candidates that take turns, ratios of medians, a dated note.

A note holds the command, versions, hardware and table, never a path or a host name.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from bd3_megatron.command import CommandParser, run_tool
from bd3_megatron.errors import UsageError
from bd3_megatron.files import write_text

REPOSITORY = Path(__file__).resolve().parents[2]
# Kept with the code: a claim of speed is read beside what it is about.
RESULTS = REPOSITORY / "tools" / "bench" / "results"
MIB = 2**20


@dataclass(frozen=True)
class Note:
    """One result of a benchmark."""

    title: str
    body: str
    """Markdown."""
    is_sound: bool = True
    """False where a promise was broken, such as bytes that differ: the benchmark then ends with exit code 1."""


def benchmark_parser(name: str, description: str | None, *, repeats: int) -> CommandParser:
    """A parser with the options that every benchmark takes.

    Args:
        name: of the module below tools/bench.
        description: for --help, as it is laid out.
        repeats: timed rounds by default.
    """
    parser = CommandParser(
        prog=f"tools.bench.{name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (default 1)")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"timed rounds (default {repeats})")
    add_note_arguments(parser)
    return parser


def add_note_arguments(parser: CommandParser) -> None:
    """Where the note goes."""
    parser.add_argument("--no-note", action="store_true", help="print only; leave tools/bench/results alone")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)


def run_benchmark(
    parser: CommandParser,
    measure: Callable[[argparse.Namespace], Iterable[Note]],
    arguments: Sequence[str] | None,
) -> int:
    """Measure, print every note, and append it to the results unless --no-note was given.

    Args:
        parser: of `benchmark_parser`.
        measure: yields notes as they are ready.
        arguments: without the program's name; None: the process's.

    Returns:
        The exit code: 1 where a note is not sound.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)

    def work(options: argparse.Namespace) -> int:
        if options.threads < 1 or options.repeats < 1:
            raise UsageError(f"--threads {options.threads} and --repeats {options.repeats} must both be at least 1.")
        torch.set_num_threads(options.threads)
        is_sound = True
        for note in measure(options):
            write_note(f"python -m {parser.prog} {' '.join(shown_arguments(given))}".rstrip(), note, options)
            is_sound = is_sound and note.is_sound
        return 0 if is_sound else 1

    return run_tool(parser, work, given)


def shown_arguments(given: Sequence[str]) -> list[str]:
    """Arguments as a note shows them: not where the note goes, and of a folder on this machine its name only."""
    kept = list(given)
    if "--results" in kept:
        # A folder of a test would not run again elsewhere.
        at = kept.index("--results")
        kept = [*kept[:at], *kept[at + 2 :]]
    return [Path(word).name if word.startswith(("/", "~")) else word for word in kept]


def interleave(candidates: Mapping[str, Callable[[], object]], *, repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of every candidate in every round, after one untimed round.

    Args:
        candidates: name -> what to run.
        repeats: timed rounds.
        device: "cpu" or "cuda".

    Returns:
        Name -> seconds, round by round.
    """
    # a round runs every candidate once, so that a busy neighbour slows all of them alike
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for timed in (False, *(True,) * repeats):
        for name, run in candidates.items():
            start = _now(device)
            run()
            if timed:
                seconds[name].append(_now(device) - start)
            else:
                _now(device)
    return seconds


def speedup(seconds: Mapping[str, Sequence[float]], name: str, *, against: str) -> float:
    """Median over rounds of how many times faster `name` was than `against`."""
    # The ratio of each round, then the median: a slow round slows both sides of its ratio.
    return statistics.median(base / own for base, own in zip(seconds[against], seconds[name], strict=True))


def milliseconds(seconds: Sequence[float]) -> str:
    """The median, in milliseconds."""
    return f"{1e3 * statistics.median(seconds):.4g}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def machine(device: str) -> str:
    """Hardware and versions, in one line."""
    parts = [_cpu_name(), f"{os.cpu_count()} cores", f"{torch.get_num_threads()} threads"]
    if device == "cuda":
        parts.append(f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda})")
    # A reader must know whether the machine was busy.
    load = f"load {os.getloadavg()[0]:.1f}"
    return ", ".join([*parts, load, f"torch {torch.__version__}", f"python {platform.python_version()}"])


def write_note(command: str, note: Note, options: argparse.Namespace) -> None:
    """Print a note with its command, date and hardware, and append it to the results unless --no-note was given."""
    when = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    text = f"## {when}: {note.title}\n\n    {command}\n\n{machine(options.device)}\n\n{note.body}\n"
    print(text)
    if options.no_note:
        return
    module = command.split()[2]
    path = options.results / f"{module.rpartition('.')[2]}.md"
    # Appended: notes are a diary, and older results stay.
    before = path.read_text("utf-8") if path.exists() else f"# {module}: dated results\n"
    write_text(path, f"{before}\n{text}")


def _now(device: str) -> float:
    if device == "cuda":
        # Kernels are only queued; without this the clock would measure the queueing.
        torch.cuda.synchronize()
        return time.perf_counter()
    # a neighbour's time does not count, which on shared cores is most of the noise
    return time.process_time()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
