"""Will an engine serve this folder rightly? `python tools/lint_export.py FOLDER --engine sglang|lmdeploy|transformers`.

Exit code 0 when it will, 1 when something must be changed first, 2 when the folder cannot be read.
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
    parser = CommandParser(prog="lint_export", description="Say whether an engine will serve a model folder rightly.")
    parser.add_argument("folder", type=Path, help="a model folder: ours, SDAR's or Qwen3's layout")
    parser.add_argument("--engine", choices=("sglang", "lmdeploy", "transformers"), required=True)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    return run_tool(build_parser(), work, arguments)


def work(parsed: argparse.Namespace) -> int:
    """Print every finding and the verdict."""
    from bd3_megatron.convert.lint import lint_folder, served_rightly

    findings = lint_folder(parsed.folder, parsed.engine)
    for finding in findings:
        print(f"{'wrong' if finding.is_error else 'note '}  {finding.sentence}")
    good = served_rightly(findings)
    print(f"{parsed.engine} {'serves' if good else 'does not serve'} {parsed.folder} rightly")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
