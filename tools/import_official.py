"""Turn official BD3-LM weights into an exported folder: `python tools/import_official.py SOURCE --out FOLDER`.

SOURCE is an official Hugging Face folder or a Lightning .ckpt; nothing inside a .ckpt is executed. A thin command over
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
        prog="import_official", description="Fold official BD3-LM weights into an exported folder (fp32)."
    )
    parser.add_argument("source", type=Path, help="official Hugging Face folder, or Lightning .ckpt")
    parser.add_argument("--out", type=Path, required=True, help="folder to write (appears whole or not at all)")
    parser.add_argument("--raw", action="store_true", help="trained weights instead of their moving average (.ckpt)")
    parser.add_argument("--block-size", type=int, help="tokens of a block, where the source does not say")
    parser.add_argument("--seq-len", type=int, help="trained length in tokens, where the source does not say")
    parser.add_argument("--mask-id", type=int, help="mask token id (default: the tokenizer's, else vocab_size - 1)")
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer files to copy and to ask for ids")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    return run_tool(build_parser(), work, arguments)


def work(parsed: argparse.Namespace) -> int:
    """Import, and say what was written."""
    # Late: torch is not needed to print --help.
    from bd3_megatron.convert.import_official import ImportOptions, import_official

    # What is not given is asked of the source; nothing is guessed.
    options = ImportOptions(
        block_size=parsed.block_size,
        seq_len=parsed.seq_len,
        mask_id=parsed.mask_id,
        tokenizer_dir=parsed.tokenizer,
        raw=parsed.raw,
    )
    report = import_official(parsed.source, parsed.out, options)
    print(f"{report.out}: {report.num_parameters / 1e6:.2f} M parameters, fp32")
    for note in report.notes:
        print(f"  {note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
