"""Small corpora for the tests of data: token shards from lists, awkward text, seeded generators."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bd3_megatron.data.shard_header import HEADER_FILE, Header, token_dtype
from bd3_megatron.data.shards import ShardWriter
from bd3_megatron.data.special_ids import SpecialIds
from bd3_megatron.data.tokenizer_bytes import ByteTokenizer
from bd3_megatron.files import write_json

BYTES = ByteTokenizer()
SPECIAL = SpecialIds(bos=256, eos=257, pad=258, mask=259)
VOCAB = 260

AWKWARD = (
    "plain words, and some more of them.",
    "  leading, double  and   triple spaces, trailing  ",
    "tabs\tand\nnew\r\nlines\n\n\n   indented\n",
    "emoji \U0001f600\U0001f469\u200d\U0001f469\u200d\U0001f467",
    "CJK \u4f60\u597d\u4e16\u754c kana \u3042 accents \u00e9 e\u0301 \u00df",
    "control \x00\x01\x07\x1b\x7f\x85 and odd spaces \u00a0\u2003\u3000\u2028\ufeff",
    "SentencePiece's own sign \u2581 and bytes <0x41><0xE2>",
    "and <s> </s> <unk> <pad> <mask> <|mask|> [MASK]",
    "private \ue000 last \U0010ffff high \U0001f9ff",
    "",
    " ",
    "x",
)

WORDS = (
    "the of and a to in is was he for it with as his on be at by had not are but from or have an they which one you "
    "were all her she there would their we him been has when who will no more if out so said what up its about than into them"
).split()


def english(num_words: int, seed: int) -> str:
    """Words in sentences and paragraphs."""
    chosen = random.Random(seed)
    words = []
    for number in range(1, num_words + 1):
        word = chosen.choice(WORDS)
        words.append(word + (".\n\n" if number % 40 == 0 else ".\n" if number % 13 == 0 else " "))
    return "".join(words)


def documents(num_documents: int, seed: int, longest: int = 60) -> list[list[int]]:
    """Documents of bytes with lengths from 1 to `longest`."""
    chosen = random.Random(seed)
    return [[chosen.randrange(256) for _ in range(chosen.randint(1, longest))] for _ in range(num_documents)]


def write_split(
    folder: Path,
    shards: Sequence[Sequence[Sequence[int]]],
    *,
    vocab_size: int = VOCAB,
    fingerprint: str = BYTES.fingerprint,
    held_out_fraction: float = 0.0,
    supervised: Sequence[Sequence[Sequence[bool]]] | None = None,
) -> Path:
    """Write a split from shards of documents of ids, and of what is predicted of them, as `prepare` would."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number, listed in enumerate(shards):
        known = None if supervised is None else [np.asarray(one, dtype=np.bool_) for one in supervised[number]]
        stem = folder / f"part-{number:05d}"
        with ShardWriter(stem, token_dtype(vocab_size), answers_only=known is not None) as writer:
            writer.add([np.asarray(document, dtype=np.uint32) for document in listed], known)
            record = writer.finish()
        assert record is not None
        records.append(record)
    header = Header(
        vocab_size=vocab_size,
        special_ids=SPECIAL,
        tokenizer_fingerprint=fingerprint,
        shards=tuple(records),
        held_out_fraction=held_out_fraction,
    )
    write_json(folder / HEADER_FILE, header.as_dict())
    return folder


def answers(listed: Sequence[Sequence[int]], seed: int) -> list[list[bool]]:
    """What is predicted of documents: spans at random places, at least one token of each."""
    chosen = random.Random(seed)
    flags = []
    for document in listed:
        edges = sorted(chosen.sample(range(len(document) + 1), k=min(3, len(document) + 1)))
        known = [sum(edge <= i for edge in edges) % 2 == 1 for i in range(len(document))]
        flags.append(known if any(known) else [True] * len(document))
    return flags


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
