"""Write an exported folder under official BD3-LM keys: `python tools/export_official.py FOLDER --out DIR`.

The official Hugging Face class loads the result; importing it again is bit-equal. A thin door over
convert/import_official; imports late, so that --help is quick.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def new_parser() -> argparse.ArgumentParser:
    """The arguments of this tool."""
    parser = argparse.ArgumentParser(description="Write an exported folder under official BD3-LM keys (fp32).")
    parser.add_argument("folder", type=Path, help="exported folder in the paper's style")
    parser.add_argument("--out", type=Path, required=True, help="folder to write (appears whole or not at all)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    parsed = new_parser().parse_args(arguments)
    from bd3_megatron.convert.import_official import export_official
    from bd3_megatron.errors import BD3Error

    try:
        report = export_official(parsed.folder, parsed.out)
    except BD3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{report.out}: {report.num_parameters / 1e6:.2f} M parameters, fp32")
    for note in report.notes:
        print(f"  {note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
