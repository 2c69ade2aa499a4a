"""Which documents are held out: those whose text hashes below a fraction, wherever and whenever they are read.

Contract: the choice is a function of the text alone. A corpus that grows keeps its held-out documents, exact copies are all
held out or all trained on, and folders, mixtures and streams with one fraction agree; a greater fraction holds out more of
the same. White space does not count, so a document read as a line, a paragraph or a table's row is one document.
Refuses: fractions that leave nothing to train on, folders that train on what another holds out, one text cut two ways.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bd3_megatron.errors import ConfigError, cut

HELD_OUT_RULE = "sha256 of the words"
"""Name of the choice in headers; another choice would need another name."""
GREATEST_FRACTION = 0.5
# Keys are uniform on [0, 2^64), so a threshold holds out the same share of every corpus.
_KEYS = 1 << 64


def content_key(text: str) -> int:
    """A number in [0, 2^64) that tells a text from others: the first 8 bytes of the SHA-256 of its words.

    Args:
        text: as it is trained on, that is after the detokenizer.
    """
    # White space does not count: a document read as a line, a paragraph or a table's row is one document.
    words = " ".join(text.split())
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big")


def is_held_out(key: int, fraction: float) -> bool:
    """Whether a document belongs to the held-out split.

    Args:
        key: of its text, by `content_key`.
        fraction: share of all documents, in [0, 0.5].
    """
    # A threshold: a greater fraction holds out the same documents and more.
    return key < int(fraction * _KEYS)


def fraction_of(key: int) -> float:
    """The fraction up to which a document with this key is trained on."""
    return key / _KEYS


def check_fraction(fraction: float) -> None:
    """Refuse fractions that leave nothing to train on.

    Raises:
        ConfigError: outside [0, 0.5].
    """
    if not 0.0 <= fraction <= GREATEST_FRACTION:
        raise ConfigError(f"valid_fraction={fraction} is outside [0, {GREATEST_FRACTION}]; use for example 0.05.")


def check_nothing_leaks(trained: Iterable[tuple[str, float]], held_out: tuple[str, float]) -> None:
    """Refuse training text that another folder holds out.

    Args:
        trained: (folder, its fraction) of every folder that is trained on.
        held_out: (folder, fraction) of the folder whose held-out rows are evaluated; a fraction of 0 means that its
            valid split is a text of its own, about which the fractions of others say nothing.

    Raises:
        ConfigError: a folder holds out less.
    """
    where, wanted = held_out
    for folder, fraction in trained:
        # Holding out more is safe: it contains what the other folder holds out.
        if fraction < wanted:
            raise ConfigError(
                f"{folder} holds out {fraction} of its documents and {where} {wanted}: documents that are evaluated there "
                f"may be trained on here; prepare {folder} with --valid-fraction {wanted}, or take both from one corpus."
            )


def check_read_alike(trained: tuple[str, Mapping[str, Any]], held_out: tuple[str, Mapping[str, Any]]) -> None:
    """Refuse one text that is cut or cleaned in two ways: a document held out of one may be part of one of the other.

    Args:
        trained: (what is trained on, its source as headers state it).
        held_out: likewise, of the folder whose held-out rows are evaluated.

    Raises:
        ConfigError: both read one file, folder or dataset, and differ in what a document is or in the detokenizer.
    """
    (what, source), (other, other_source) = trained, held_out
    ways = list(_ways_of(other_source))
    for text, way in _ways_of(source):
        for other_text, other_way in ways:
            # Texts of different names may hold the same documents too, but no name tells.
            if way != other_way and _overlap(text, other_text):
                raise ConfigError(
                    f"{what} reads {cut(text)} with documents={way[0]}, detokenizer={way[1]} and {other} with "
                    f"documents={other_way[0]}, detokenizer={other_way[1]}: what is held out of one may be trained on in the "
                    "other; read both alike (a stream of text files has documents=paragraph)."
                )


def _ways_of(source: Mapping[str, Any], cleaned: str = "none") -> Iterator[tuple[str, tuple[str, str]]]:
    """(text, (what a document is, detokenizer)) of every text that a header's source names."""
    cleaned = str(source.get("detokenizer", cleaned))
    for part in _listed(source, "sources"):
        if isinstance(part, Mapping):
            yield from _ways_of(part, cleaned)
    # datasets made of text files are read by paragraphs, and rows are rows wherever they are read
    way = (str(source.get("documents", "paragraph")), cleaned)
    for name in (*_listed(source, "paths"), *([source["path"]] if "path" in source else [])):
        yield str(name), way


def _listed(source: Mapping[str, Any], name: str) -> list[Any]:
    # a header comes from outside
    found = source.get(name)
    return found if isinstance(found, list) else []


def _overlap(one: str, other: str) -> bool:
    """Whether two names are one, or one is a folder that holds the other."""
    first, second = (Path(os.path.abspath(name)) for name in (one, other))
    return first.is_relative_to(second) or second.is_relative_to(first)
