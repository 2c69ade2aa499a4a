"""One-line mutations of the code that decides what is learned, and the default tests that must turn red for each.

`bash tests/run.sh --mutations` copies the tree, makes one mutation at a time, runs its tests, and writes the table
tools/bench/results/mutations.md. A mutation that stays green is a hole in the tests, or is listed with the reason why
nothing can tell it from the original. The entries are `tests/mutations.yaml`; `tests/test_mutations.py` checks them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

import yaml

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests/mutations.yaml"
RESULTS = ROOT / "tools/bench/results/mutations.md"
SECONDS = 240
"""Most a mutation's tests may take; a hang counts as red, as it would in the suite."""


@dataclass(frozen=True)
class Mutation:
    """One changed line, and what must notice it."""

    subject: str
    """What the line decides: the groups of the record."""
    file: str
    old: str
    """A text that the file holds once."""
    new: str
    tests: tuple[str, ...]
    """Arguments of pytest: default tests."""
    equivalent: str = ""
    """Why no test can tell, where that is so."""


def read_mutations() -> tuple[Mutation, ...]:
    """The table `tests/mutations.yaml`."""
    entries = yaml.safe_load(TABLE.read_text("utf-8"))
    return tuple(Mutation(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries)


@dataclass(frozen=True)
class Verdict:
    """What a mutation's tests said."""

    mutation: Mutation
    noticed: bool
    seconds: float
    last_line: str


def copied_tree(folder: Path) -> Path:
    """The tree's tracked and new files, in a folder of their own."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        source = ROOT / name
        if name and source.is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    return folder


def tried(mutation: Mutation, tree: Path) -> Verdict:
    """Run the mutation's tests in a tree that has it, and put the tree back."""
    path = tree / mutation.file
    original = path.read_text("utf-8")
    path.write_text(mutated(mutation, original), "utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", *mutation.tests]
    start = time.monotonic()
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        ran = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=SECONDS)
        lines = ran.stdout.strip().splitlines()
        # 1: tests failed. Anything else but 0 is a mistake in this table, and must not count as a red test
        noticed, last = ran.returncode == 1, lines[-1] if lines else f"pytest ended with {ran.returncode}"
        if ran.returncode not in (0, 1):
            last = f"pytest ended with {ran.returncode}: {last}"
    except subprocess.TimeoutExpired:
        noticed, last = True, f"no end within {SECONDS} s"
    finally:
        path.write_text(original, "utf-8")
    return Verdict(mutation, noticed, time.monotonic() - start, last)


def mutated(mutation: Mutation, text: str) -> str:
    """The file's text with the mutation.

    Raises:
        ValueError: the text to replace is not there exactly once.
    """
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.file} holds {mutation.old!r} {text.count(mutation.old)} times; once is needed.")
    return text.replace(mutation.old, mutation.new)


def table(verdicts: Sequence[Verdict]) -> str:
    """The record, grouped by what the lines decide."""
    missed = [v for v in verdicts if not v.noticed and not v.mutation.equivalent]
    lines = [
        "# One-line mutations and the default tests that notice them\n",
        "    bash tests/run.sh --mutations\n",
        f"{len(verdicts)} mutations, {sum(v.noticed for v in verdicts)} noticed, {len(missed)} missed, "
        f"{sum(bool(v.mutation.equivalent) for v in verdicts)} equivalent.\n",
        "| decides | file | line | becomes | noticed by | s |",
        "|---|---|---|---|---|---|",
    ]
    for verdict in verdicts:
        one = verdict.mutation
        tests = ", ".join(f"`{t}`" for t in one.tests if t.startswith("tests/"))
        said = tests if verdict.noticed else one.equivalent or "**nobody**"
        old, new = (" ".join(text.split()).replace("|", "\\|") for text in (one.old, one.new))
        row = f"| {one.subject} | {one.file.removeprefix('bd3_megatron/')} | `{old}` | `{new}` | {said} |"
        lines.append(f"{row} {verdict.seconds:.0f} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Try all mutations, or those whose subject or file is named.

    Returns:
        0 when every mutation is noticed or listed as equivalent, else 1.
    """
    parser = argparse.ArgumentParser(description="Try one-line mutations against the default tests.")
    parser.add_argument(
        "names", nargs="*", help="subjects or parts of file names; none: all, and the record is written"
    )
    parser.add_argument("--workers", type=int, default=2, help="mutations tried at once")
    options = parser.parse_args(argv)
    chosen = [
        m for m in read_mutations() if not options.names or any(n in m.subject or n in m.file for n in options.names)
    ]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.workers) as pool:
        trees: Queue[Path] = Queue()
        for number in range(options.workers):
            trees.put(copied_tree(Path(folder) / str(number)))

        def one(mutation: Mutation) -> Verdict:
            tree = trees.get()
            try:
                verdict = tried(mutation, tree)
            finally:
                trees.put(tree)
            word = "noticed" if verdict.noticed else mutation.equivalent or "MISSED"
            print(f"{word:8} {mutation.file}: {mutation.old!r} -> {mutation.new!r}: {verdict.last_line}", flush=True)
            return verdict

        verdicts = list(pool.map(one, chosen))
    if not options.names:
        RESULTS.write_text(table(verdicts), "utf-8")
    return int(any(not v.noticed and not v.mutation.equivalent for v in verdicts))


if __name__ == "__main__":
    sys.exit(main())
