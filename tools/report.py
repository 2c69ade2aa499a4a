"""One page about one or several runs: curves, tables, samples, configuration, hardware, warnings in plain words.

    python tools/report.py runs/a runs/b -o report.html

One self-contained file: no network, no scripts. Works while a job runs; reads only. Needs no torch-built model and no
device. What is worth a warning stands in bd3_megatron/report/findings.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bd3_megatron.errors import BD3Error, DataError
from bd3_megatron.files import write_text
from bd3_megatron.report.page import render_page
from bd3_megatron.report.run_data import read_runs


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        runs = read_runs([Path(folder) for folder in options.run])
        results = [one for path in options.results for one in read_results(Path(path))]
        page = render_page(runs, now=time.time(), title=options.title, results=results)
        write_text(Path(options.out), page)
    except BD3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"wrote {options.out}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    found = argparse.ArgumentParser(description="One page about one or several runs.")
    found.add_argument("run", nargs="+", help="folder of a run (run.dir)")
    found.add_argument("-o", "--out", default="report.html", help="file to write (default: report.html)")
    found.add_argument("--title", help="of the page (default: the runs' names)")
    found.add_argument(
        "--results", action="append", default=[], metavar="FILE", help="tables to show first (tools/reproduce_mini.py)"
    )
    return found


def read_results(path: Path) -> list[dict[str, Any]]:
    """Sections that another tool left as JSON.

    Raises:
        DataError: the file is missing, or holds no list of sections.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"results '{path}' cannot be read ({error}); give a results.json.") from error
    if not isinstance(content, list) or not all(isinstance(one, dict) for one in content):
        raise DataError(f"results '{path}' hold no list of sections; give a results.json.")
    return content


if __name__ == "__main__":
    sys.exit(main())
