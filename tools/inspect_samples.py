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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bd3_megatron.errors import BD3Error, DataError

WORD = re.compile(r"[^\W\d_]+")
CHUNK_TOKENS = 1_000_000


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("samples", type=Path, help="a text file")
    made.add_argument("--data", type=Path, required=True, metavar="DIR", help="a folder made by tools/prepare_data.py")
    return made


def words_of(text: str) -> list[str]:
    """Words in order, case folded."""
    return [word.casefold() for word in WORD.findall(text)]


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
            found.update(words_of(tokenizer.decode(tokens[start : start + CHUNK_TOKENS])))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        if not arguments.samples.is_file():
            raise DataError(
                f"'{arguments.samples}' does not exist; give a text file, for example one made by bd3 sample."
            )
        sampled = words_of(arguments.samples.read_text(encoding="utf-8"))
        known = training_words(arguments.data)
    except BD3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    share = sum(word in known for word in sampled) / len(sampled) if sampled else None
    print(json.dumps({"num_words": len(sampled), "share_in_training_text": share}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
