"""Turn a run's checkpoint into a Hugging Face folder: `python tools/convert_checkpoint.py RUN --out FOLDER`.

One process, no GPU, no process group; memory for the largest tensor and a little. A thin door over
convert/from_checkpoint; imports late, so that --help is quick.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def new_parser() -> argparse.ArgumentParser:
    """The arguments of this tool."""
    parser = argparse.ArgumentParser(description="Write a checkpoint as a Hugging Face folder, and prove it.")
    parser.add_argument("place", type=Path, help="a run's folder, or one checkpoint of it")
    parser.add_argument("--out", type=Path, required=True, help="folder to write (appears whole or not at all)")
    parser.add_argument("--raw", action="store_true", help="trained weights instead of their moving average")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="of the stored weights")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    parsed = new_parser().parse_args(arguments)
    import torch

    from bd3_megatron.convert.from_checkpoint import convert_checkpoint
    from bd3_megatron.errors import BD3Error

    def warn(text: str) -> None:
        print(text, file=sys.stderr)

    try:
        report = convert_checkpoint(
            parsed.place, parsed.out, raw=parsed.raw, dtype=getattr(torch, DTYPES[parsed.dtype]), warn=warn
        )
    except BD3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{report.out}: {report.which} weights of {report.source}, {report.num_parameters / 1e6:.2f} M parameters")
    print(f"  logits of the folder and of the checkpoint differ by at most {report.max_logit_difference:.2e}")
    for note in report.notes:
        print(f"  {note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
