"""Turn official BD3-LM weights into an exported folder: `python tools/import_official.py SOURCE --out FOLDER`.

SOURCE is an official Hugging Face folder or a Lightning .ckpt; nothing inside a .ckpt is executed. A thin door over
convert/import_official; imports late, so that --help is quick.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def new_parser() -> argparse.ArgumentParser:
    """The arguments of this tool."""
    parser = argparse.ArgumentParser(description="Fold official BD3-LM weights into an exported folder (fp32).")
    parser.add_argument("source", type=Path, help="official Hugging Face folder, or Lightning .ckpt")
    parser.add_argument("--out", type=Path, required=True, help="folder to write (appears whole or not at all)")
    parser.add_argument("--raw", action="store_true", help="trained weights instead of their moving average (.ckpt)")
    parser.add_argument("--block-size", type=int, help="tokens of a block, where the source does not say")
    parser.add_argument("--seq-len", type=int, help="trained length in tokens, where the source does not say")
    parser.add_argument("--mask-id", type=int, help="mask token id (default: the tokenizer's, else vocab_size - 1)")
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer files to copy and to ask for ids")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    parsed = new_parser().parse_args(arguments)
    from bd3_megatron.convert.import_official import ImportOptions, import_official
    from bd3_megatron.errors import BD3Error

    options = ImportOptions(
        block_size=parsed.block_size,
        seq_len=parsed.seq_len,
        mask_id=parsed.mask_id,
        tokenizer_dir=parsed.tokenizer,
        raw=parsed.raw,
    )
    try:
        report = import_official(parsed.source, parsed.out, options)
    except BD3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{report.out}: {report.num_parameters / 1e6:.2f} M parameters, fp32")
    for note in report.notes:
        print(f"  {note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
