#!/usr/bin/env python3
"""Which share of the words in a sample file occurs in the training text: a plain check that a model has learnt words.

Prints one JSON object: num_words, share_in_training_text (null without words). A word is a run of letters, case folded.
Costs a few seconds: the training split is decoded once.

Examples:
    tools/inspect_samples.py runs/quickstart/samples.txt --data runs/quickstart/data
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

# run as a script from any folder, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bd3_megatron.command import CommandParser, run_tool
from bd3_megatron.errors import DataError

# Letters only: digits and punctuation are right by chance.
_WORD = re.compile(r"[^\W\d_]+")
# Tokens decoded at a time; at the border of two a word may be cut, once in a million tokens.
CHUNK_TOKENS = 1_000_000


def build_parser() -> CommandParser:
    """The arguments of this tool."""
    made = CommandParser(
        prog="inspect_samples", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("samples", type=Path, help="a text file")
    made.add_argument("--data", type=Path, required=True, metavar="DIR", help="a folder made by tools/prepare_data.py")
    return made


def folded_words(text: str) -> list[str]:
    """Words in order, case folded."""
    return [word.casefold() for word in _WORD.findall(text)]


def training_words(data: Path) -> set[str]:
    """Every word of the training split, decoded with the tokenizer beside it.

    Raises:
        DataError: the split is missing or damaged.
    """
    from bd3_megatron.data.shards import ShardFolder
    from bd3_megatron.data.tokenizer_open import load_tokenizer

    shards, tokenizer = ShardFolder(data / "train"), load_tokenizer(data / "tokenizer")
    found: set[str] = set()
    for shard in range(shards.num_shards):
        tokens = shards.tokens(shard)
        for start in range(0, len(tokens), CHUNK_TOKENS):
            # special ids become blanks' neighbours, so that documents do not run into each other
            found.update(folded_words(tokenizer.decode(tokens[start : start + CHUNK_TOKENS])))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    return run_tool(build_parser(), work, arguments)


def work(options: argparse.Namespace) -> int:
    """Print the share of known words."""
    try:
        text = options.samples.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"'{options.samples}' is no UTF-8 text (byte {error.start}); give a text file.") from error
    sampled, known = folded_words(text), training_words(options.data)
    # Every occurrence counts, so that a rare invented word weighs little.
    share = sum(word in known for word in sampled) / len(sampled) if sampled else None
    print(json.dumps({"num_words": len(sampled), "share_in_training_text": share}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
