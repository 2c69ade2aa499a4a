#!/usr/bin/env python3
"""Print what a prepared split holds: header, statistics of document lengths, decoded samples; --verify reads all bytes.

Examples:
    tools/inspect_shards.py data/docs/train
    tools/inspect_shards.py data/docs --verify
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

# run as a script from any folder, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bd3_megatron.command import CommandParser, run_tool
from bd3_megatron.errors import DataError, counted

if TYPE_CHECKING:
    from bd3_megatron.data.shards import ShardFolder


def build_parser() -> CommandParser:
    """The arguments of this tool."""
    made = CommandParser(
        prog="inspect_shards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("folder", help="a split (DIR/train), or DIR for all its splits")
    made.add_argument("--verify", action="store_true", help="compare every checksum, order of ends and token")
    made.add_argument("--samples", type=int, default=2, metavar="N", help="documents to decode (2)")
    made.add_argument("--characters", type=int, default=200, metavar="N", help="of each decoded document (200)")
    return made


def splits_of(folder: Path) -> list[Path]:
    """The split folders at or below `folder`.

    Raises:
        DataError: there is none.
    """
    from bd3_megatron.data.shard_header import HEADER_FILE

    if (folder / HEADER_FILE).is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob(f"*/{HEADER_FILE}")) if folder.is_dir() else []
    if not found:
        raise DataError(f"{folder} holds no token shards; give a folder made by tools/prepare_data.py.")
    return found


def print_split(shards: ShardFolder) -> None:
    """Print header and statistics."""
    import numpy as np

    header = shards.header
    # As int64: numpy turns the stored uint64 beside a 0 into float64.
    lengths = np.concatenate(
        [np.diff(shards.document_ends(s).astype(np.int64), prepend=0) for s in range(shards.num_shards)]
    )
    low, middle, high = np.percentile(lengths, [5, 50, 95])
    print(f"{shards.where}")
    print(f"  tokens       {header.num_tokens:,} ({header.dtype.name}) in {counted(len(header.shards), 'shard')}")
    if header.num_supervised is not None:
        share = 100 * header.num_supervised / header.num_tokens
        print(f"  answers      {header.num_supervised:,} tokens ({share:.1f}%); nothing else is predicted")
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in sorted(header.left_out.items())) or "none"
    print(f"  documents    {header.num_documents:,}; left out: {left_out}")
    print(f"  held out     {header.held_out_fraction:g} of the documents, by content")
    print(
        f"  lengths      mean {lengths.mean():.1f}, median {middle:.0f}, 5% {low:.0f}, 95% {high:.0f}, "
        f"longest {lengths.max()}"
    )
    ids = ", ".join(f"{name} {value}" for name, value in header.special_ids.as_dict().items())
    print(f"  vocabulary   {header.vocab_size}; {ids}")
    print(f"  tokenizer    {header.tokenizer_fingerprint}")
    print(f"  source       {header.source}")
    print(f"  packing      {header.packing or 'as training says'}")


def show_samples(shards: ShardFolder, count: int, characters: int) -> None:
    """Decode the first `count` documents where the tokenizer stands beside the split."""
    from bd3_megatron.data.tokenizer_fingerprint import check_same_tokenizer
    from bd3_megatron.data.tokenizer_open import load_tokenizer

    folder = shards.folder.parent / "tokenizer"
    if count < 1 or not folder.is_dir():
        return
    tokenizer = load_tokenizer(folder)
    # Decoded by another tokenizer the samples would look like damaged data.
    check_same_tokenizer((shards.tokenizer_fingerprint, shards.where), (tokenizer.fingerprint, str(folder)))
    start = 0
    for number, end in enumerate(shards.document_ends(0)[:count].tolist()):
        # No more tokens than characters are wanted: a long document is not decoded whole.
        text = tokenizer.decode(shards.tokens(0)[start : min(end, start + characters)])
        print(f"  document {number}: {text[:characters]!r}")
        start = end


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    return run_tool(build_parser(), work, arguments)


def work(options: argparse.Namespace) -> int:
    """Print every split below the folder."""
    from bd3_megatron.data.shards import ShardFolder

    for split in splits_of(Path(options.folder)):
        shards = ShardFolder(split)
        print_split(shards)
        show_samples(shards, options.samples, options.characters)
        if options.verify:
            # The generator raises at the first shard that is not sound.
            sound = sum(1 for _ in shards.verify())
            print(f"  verified     {counted(sound, 'shard is', 'shards are')} sound")
    return 0


if __name__ == "__main__":
    sys.exit(main())
