"""One page about one or several runs: curves, tables, samples, configuration, hardware, warnings in plain words.

    python tools/report.py runs/a runs/b -o report.html

One self-contained file: no network, no scripts. Works while a job runs; reads only. Needs no torch-built model and no
device. What is worth a warning stands in bd3_megatron/report/findings.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# run as a script from any folder, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bd3_megatron.command import CommandParser, run_tool
from bd3_megatron.errors import ConfigError
from bd3_megatron.files import write_text
from bd3_megatron.report.page import render_page
from bd3_megatron.report.results import read_results
from bd3_megatron.report.run_data import read_runs


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    return run_tool(build_parser(), work, arguments)


def work(options: argparse.Namespace) -> int:
    """Write the page."""
    out = Path(options.out)
    # A slip of the tab key must not cost the record that the page is about.
    if out.is_file() and out.stat().st_size > 0 and not out.read_bytes()[:64].lower().startswith(b"<!doctype html"):
        raise ConfigError(f"--out {out} is there and no page of a report; name a new file, or remove it first.")
    # Reads only, and tolerates a last line that is still being written.
    runs = read_runs([Path(folder) for folder in options.run])
    results = [one for path in options.results for one in read_results(Path(path))]
    # The clock is handed in: rendering itself reads none.
    write_text(out, render_page(runs, now=time.time(), title=options.title, results=results))
    print(f"wrote {options.out}")
    return 0


def build_parser() -> CommandParser:
    """The arguments of this tool."""
    found = CommandParser(prog="report", description="One page about one or several runs.")
    found.add_argument("run", nargs="+", help="folder of a run (run.dir)")
    # One file, so that it can be mailed or kept with the run.
    found.add_argument("-o", "--out", default="report.html", help="file to write (default: report.html)")
    found.add_argument("--title", help="of the page (default: the runs' names)")
    found.add_argument(
        "--results", action="append", default=[], metavar="FILE", help="tables to show first (tools/reproduce_mini.py)"
    )
    return found


if __name__ == "__main__":
    sys.exit(main())
