"""Will an engine serve this folder rightly? `python tools/lint_export.py FOLDER --engine sglang|lmdeploy|transformers`.

Exit code 0 when it will, 1 when something must be changed first, 2 when the folder cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def new_parser() -> argparse.ArgumentParser:
    """The arguments of this tool."""
    parser = argparse.ArgumentParser(description="Say whether an engine will serve a model folder rightly.")
    parser.add_argument("folder", type=Path, help="a model folder: ours, SDAR's or Qwen3's layout")
    parser.add_argument("--engine", choices=("sglang", "lmdeploy", "transformers"), required=True)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    parsed = new_parser().parse_args(arguments)
    from bd3_megatron.convert.lint import lint_folder, served_rightly
    from bd3_megatron.errors import BD3Error

    try:
        findings = lint_folder(parsed.folder, parsed.engine)
    except BD3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for finding in findings:
        print(f"{'wrong' if finding.is_error else 'note '}  {finding.sentence}")
    good = served_rightly(findings)
    print(f"{parsed.engine} {'serves' if good else 'does not serve'} {parsed.folder} rightly")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
