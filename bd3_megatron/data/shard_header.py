"""The header of a split, header.json: what its shards hold, who made the ids, what was left out.

Contract: a header is read whole or refused; every field has its type and its range, and counts agree with one another.
Refuses: other formats and versions, headers that list no shards, fields that are missing or mean nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bd3_megatron.data.held_out import GREATEST_FRACTION, HELD_OUT_RULE
from bd3_megatron.data.special_ids import SpecialIds
from bd3_megatron.errors import DataError
from bd3_megatron.files import read_json

FORMAT = "bd3_megatron shards"
SHARDS_VERSION = 2
"""2: held out by content; 1: by number, which other corpora and streams could not follow."""
ANSWERS_VERSION = 3
"""Of headers whose shards say what is supervised: a release that does not know them would train on the prompts."""
HEADER_FILE = "header.json"
PREPARE_AGAIN = "prepare the data again with tools/prepare_data.py"
PACKING_KEYS = ("append_eos", "wrap_special")
# Far above any corpus, and small enough that byte offsets of 4-byte tokens stay inside int64.
_MOST_TOKENS = 1 << 48
_MOST_IDS = 1 << 32
# A header comes from outside: names may not lead out of the folder, hide a file, or fill a message.
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,200}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One .bin/.idx pair as the header knows it."""

    name: str
    num_tokens: int
    num_documents: int
    bin_sha256: str
    idx_sha256: str
    num_supervised: int | None = None
    """Tokens that are predicted; None: all are, and there is no file that says which."""
    sup_sha256: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """As a header holds it: without what plain text does not have."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a split's header.json says."""

    vocab_size: int
    special_ids: SpecialIds
    tokenizer_fingerprint: str
    shards: tuple[ShardRecord, ...]
    source: dict[str, Any] = field(default_factory=dict)
    """Where the text came from, and how it was cut and cleaned."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Documents of the source that stand in no shard, by reason."""
    packing: dict[str, bool] = field(default_factory=dict)
    """The recipe's own rule for special tokens (append_eos, wrap_special), where it has one."""
    held_out_fraction: float = 0.0
    """Share of documents held out by content; 0 where nothing was, or where valid has a text of its own."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored tokens."""
        return token_dtype(self.vocab_size)

    @property
    def num_tokens(self) -> int:
        """Of all shards."""
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def num_documents(self) -> int:
        """Of all shards."""
        return sum(shard.num_documents for shard in self.shards)

    @property
    def num_supervised(self) -> int | None:
        """Tokens that are predicted; None: all are."""
        counts = [shard.num_supervised for shard in self.shards if shard.num_supervised is not None]
        return sum(counts) if counts else None

    def as_dict(self) -> dict[str, Any]:
        """The content of header.json."""
        # The totals repeat the sums over shards on purpose: a header that lost shards no longer agrees with them.
        content = asdict(self) | {"special_ids": self.special_ids.as_dict(), "dtype": self.dtype.str}
        content |= {"shards": [shard.as_dict() for shard in self.shards]}
        version = SHARDS_VERSION if self.num_supervised is None else ANSWERS_VERSION
        totals = {"num_tokens": self.num_tokens, "num_documents": self.num_documents}
        held_out = {"held_out": {"rule": HELD_OUT_RULE, "fraction": content.pop("held_out_fraction")}}
        return {"format": FORMAT, "version": version, **content, **held_out, **totals}


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Smallest stored dtype for ids in [0, V)."""
    # Little-endian on every machine, so that folders can be copied between them.
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def read_header(folder: Path) -> Header:
    """Read and check a split's header.json.

    Raises:
        DataError: missing, not JSON, of another format or version, or with a field that is missing or wrong.
        TokenizerError: special ids that no model can be trained with.
    """
    path = folder / HEADER_FILE
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist; give a folder made by tools/prepare_data.py.")
    content = read_json(path, PREPARE_AGAIN)
    # The format is checked before the version: a version of another format says nothing.
    if content.get("format") != FORMAT:
        raise DataError(f"{path} is not a header of token shards; {PREPARE_AGAIN}.")
    version = content.get("version")
    if version not in (SHARDS_VERSION, ANSWERS_VERSION):
        raise DataError(
            f"{path} has version {str(version)[:40]}; this release reads versions {SHARDS_VERSION} and {ANSWERS_VERSION}, "
            f"use the release that wrote it or {PREPARE_AGAIN}."
        )
    stated = Stated(content, str(path))
    vocab_size = stated.whole("vocab_size", 2, _MOST_IDS)
    header = Header(
        vocab_size=vocab_size,
        special_ids=SpecialIds.from_dict(stated.mapping("special_ids"), vocab_size, str(path)),
        tokenizer_fingerprint=stated.text("tokenizer_fingerprint", _DIGEST),
        shards=_shards(stated, path, answers_only=version == ANSWERS_VERSION),
        source=stated.mapping("source"),
        left_out=stated.counts("left_out"),
        packing=_packing(stated),
        held_out_fraction=_held_out(stated, path),
    )
    for name, counted in (("num_tokens", header.num_tokens), ("num_documents", header.num_documents)):
        # Truncated by hand or merged wrongly: a sum that differs means that shards are missing or added.
        if stated.whole(name, 1, _MOST_TOKENS) != counted:
            raise stated.damaged(name, f"not {counted}, the sum over its shards")
    if stated.content.get("dtype") != header.dtype.str:
        raise stated.damaged("dtype", f"not {header.dtype.str}, which holds {vocab_size} ids")
    return header


class Stated:
    """JSON from outside, read field by field."""

    def __init__(self, content: Mapping[str, Any], where: str) -> None:
        self.content, self.where = content, where

    def whole(self, name: str, low: int, high: int) -> int:
        """A whole number in [low, high]."""
        value = self.content.get(name)
        # True is an int in Python
        if type(value) is not int or not low <= value <= high:
            raise self.damaged(name, f"no whole number in [{low}, {high}]")
        return value

    def text(self, name: str, pattern: re.Pattern[str]) -> str:
        """A text of one form."""
        value = self.content.get(name)
        # fullmatch, because `$` would allow a line end after the text.
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise self.damaged(name, f"no text of the form {pattern.pattern}")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """An object."""
        value = self.content.get(name)
        if not isinstance(value, dict):
            raise self.damaged(name, "no JSON object")
        return value

    def listed(self, name: str) -> list[Any]:
        """A list that is not empty."""
        value = self.content.get(name)
        if not isinstance(value, list) or not value:
            raise self.damaged(name, "no list with at least one entry")
        return value

    def counts(self, name: str) -> dict[str, int]:
        """An object of counts."""
        inner = Stated(self.mapping(name), f"{self.where}, {name}")
        return {key: inner.whole(key, 0, _MOST_TOKENS) for key in inner.content}

    def damaged(self, name: str, law: str) -> DataError:
        """The error for a field."""
        shown = repr(self.content[name])[:60] if name in self.content else "missing"
        return DataError(f"{self.where} is damaged ({name} is {shown}, {law}); {PREPARE_AGAIN}.")


def _shards(stated: Stated, path: Path, *, answers_only: bool) -> tuple[ShardRecord, ...]:
    records = []
    for number, content in enumerate(stated.listed("shards")):
        where = f"{path}, shard {number},"
        if not isinstance(content, dict):
            raise DataError(f"{where} is damaged (no JSON object); {PREPARE_AGAIN}.")
        shard = Stated(content, where)
        num_tokens = shard.whole("num_tokens", 1, _MOST_TOKENS)
        records.append(
            ShardRecord(
                # A name with a slash would lead out of the folder.
                name=shard.text("name", _NAME),
                num_tokens=num_tokens,
                # A stored document has at least one token, so there are no more documents than tokens.
                num_documents=shard.whole("num_documents", 1, num_tokens),
                bin_sha256=shard.text("bin_sha256", _DIGEST),
                idx_sha256=shard.text("idx_sha256", _DIGEST),
                num_supervised=shard.whole("num_supervised", 1, num_tokens) if answers_only else None,
                sup_sha256=shard.text("sup_sha256", _DIGEST) if answers_only else None,
            )
        )
    # A shard read twice would be trained on twice, unnoticed.
    if len({record.name for record in records}) != len(records):
        raise stated.damaged("shards", "and names a shard twice")
    return tuple(records)


def _packing(stated: Stated) -> dict[str, bool]:
    packing = stated.mapping("packing")
    if any(key not in PACKING_KEYS or not isinstance(value, bool) for key, value in packing.items()):
        raise stated.damaged("packing", f"not true or false for {' and '.join(PACKING_KEYS)}")
    return packing


def _held_out(stated: Stated, path: Path) -> float:
    held_out = Stated(stated.mapping("held_out"), f"{path}, held_out,")
    held_out.text("rule", re.compile(re.escape(HELD_OUT_RULE)))
    fraction = held_out.content.get("fraction")
    # bool first: True is an int in Python and would pass as the fraction 1.
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 <= fraction <= GREATEST_FRACTION:
        raise held_out.damaged("fraction", f"no number in [0, {GREATEST_FRACTION}]")
    return float(fraction)
