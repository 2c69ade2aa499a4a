"""Write an exported folder under official BD3-LM keys: `python tools/export_official.py FOLDER --out DIR`.

The official Hugging Face class loads the result; importing it again is bit-equal. A thin command over
convert/import_official; imports late, so that --help is quick.
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
        prog="export_official", description="Write an exported folder under official BD3-LM keys (fp32)."
    )
    parser.add_argument("folder", type=Path, help="exported folder in the paper's style")
    parser.add_argument("--out", type=Path, required=True, help="folder to write (appears whole or not at all)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    return run_tool(build_parser(), work, arguments)


def work(parsed: argparse.Namespace) -> int:
    """Export, and say what was written."""
    # Late: torch is not needed to print --help.
    from bd3_megatron.convert.import_official import export_official

    report = export_official(parsed.folder, parsed.out)
    print(f"{report.out}: {report.num_parameters / 1e6:.2f} M parameters, fp32")
    # What the official class needs beside the weights is not ours to write; the notes say it.
    for note in report.notes:
        print(f"  {note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
