"""Which documents are held out: those whose text hashes below a fraction, wherever and whenever they are read.

Contract: the choice is a function of the text alone. A corpus that grows keeps its held-out documents, exact copies are all
held out or all trained on, and folders, mixtures and streams with one fraction agree; a greater fraction holds out more of
the same. White space does not count, so a document read as a line, a paragraph or a table's row is one document.
Refuses: fractions that leave nothing to train on, folders that train on what another holds out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from bd3_megatron.errors import ConfigError

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
