"""What every benchmark shares: candidates take turns in one process, medians are compared, a dated note is kept.

Decides: one round runs every candidate once, so that a busy neighbour slows all of them alike; ratios are medians of the
rounds' ratios. On CPU the clock counts this process's CPU time, on a GPU wall time between synchronizations.
A note holds the command, versions, hardware and table, never a path or a host name.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from bd3_megatron.files import write_text

RESULTS = Path(__file__).parent / "results"


def add_arguments(parser: argparse.ArgumentParser, *, repeats: int) -> None:
    """Options that every benchmark takes."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (default 1)")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"timed rounds (default {repeats})")
    parser.add_argument("--no-note", action="store_true", help="print only; leave tools/bench/results alone")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse, and keep what was given (without the place of the results) for the note."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    options.given = " ".join(without_results(given))
    return options


def without_results(given: Sequence[str]) -> list[str]:
    """Arguments as a note shows them: where the note itself goes is nobody's business."""
    if "--results" not in given:
        return list(given)
    at = list(given).index("--results")
    return [*given[:at], *given[at + 2 :]]


def interleave(candidates: Mapping[str, Callable[[], object]], *, repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of every candidate in every round, after one untimed round.

    Args:
        candidates: name -> what to run.
        repeats: timed rounds.
        device: "cpu" or "cuda".

    Returns:
        Name -> seconds, round by round.
    """
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
    load = f"load {os.getloadavg()[0]:.1f}"
    return ", ".join([*parts, load, f"torch {torch.__version__}", f"python {platform.python_version()}"])


def report(module: str, title: str, body: str, arguments: argparse.Namespace) -> None:
    """Print a result, and append it to results/<last part of module>.md unless --no-note was given."""
    command = f"python -m {module} {arguments.given}".rstrip()
    when = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    note = f"## {when}: {title}\n\n    {command}\n\n{machine(arguments.device)}\n\n{body}\n"
    print(note)
    if arguments.no_note:
        return
    path = arguments.results / f"{module.rpartition('.')[2]}.md"
    before = path.read_text("utf-8") if path.exists() else f"# {module}: dated results\n"
    write_text(path, f"{before}\n{note}")


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
