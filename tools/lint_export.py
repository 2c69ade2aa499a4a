"""What would an engine do wrongly with this folder? `python tools/lint_export.py FOLDER --engine sglang`.

Exit code 0 when the files contradict nothing that the engine assumes, 1 when something must be changed first, 2 when the
folder cannot be read. Nothing is loaded or run.
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
        prog="lint_export",
        description="Say what an engine would do wrongly with a model folder, as far as its files tell.",
    )
    parser.add_argument("folder", type=Path, help="a model folder: ours, SDAR's or Qwen3's layout")
    parser.add_argument("--engine", choices=("sglang", "lmdeploy", "jetengine", "transformers"), required=True)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    return run_tool(build_parser(), work, arguments)


def work(parsed: argparse.Namespace) -> int:
    """Print every answer, and what follows."""
    # Late: torch is not needed to print --help.
    from bd3_megatron.convert.lint import has_errors, lint_folder

    answers = lint_folder(parsed.folder, parsed.engine)
    for answer in answers:
        print(f"{'wrong' if answer.is_error else 'note '}  {answer.sentence}")
    # Remarks alone are settings to give; they do not fail a pipeline.
    if has_errors(answers):
        print(f"{parsed.engine} would serve {parsed.folder} wrongly; change what is said above first")
        return 1
    print(f"nothing in {parsed.folder} contradicts what {parsed.engine} assumes; nothing was loaded or run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
