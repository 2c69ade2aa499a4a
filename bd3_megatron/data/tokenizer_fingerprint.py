"""Which tokenizer made these ids: a fingerprint of what decides them, and the refusal of another.

Contract: equal fingerprints mean equal ids for every text; where the tokenizer lies, how its JSON is laid out and what only
decoding, templates or truncation use do not count. Equal vocabulary sizes mean nothing.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from bd3_megatron.data.special_ids import SpecialIds
from bd3_megatron.errors import TokenizerError

# Decoder, post-processor, truncation and padding are absent: they change no id of a text encoded without special
# tokens.
_DECIDING = ("model", "normalizer", "pre_tokenizer", "added_tokens")
SHOWN_DIGITS = 16
"""Digits of a fingerprint in sentences; two of a million tokenizers agree in them once in 10^7 cases."""


def fingerprint_of(tokenizer_json: str, special: SpecialIds) -> str:
    """Fingerprint of a tokenizer.

    Args:
        tokenizer_json: as the `tokenizers` library writes it, which brings files of all its releases to one form.
        special: the ids training uses.

    Returns:
        64 hex digits.
    """
    spec = json.loads(tokenizer_json)
    decided = {name: _stated(spec.get(name)) for name in _DECIDING} | {"special_ids": special.as_dict()}
    return hashlib.sha256(json.dumps(decided, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_same_tokenizer(one: tuple[str, str], other: tuple[str, str]) -> None:
    """Refuse to use two tokenizers as one.

    Args:
        one: (fingerprint, what it belongs to).
        other: likewise.

    Raises:
        TokenizerError: they differ; names both.
    """
    (first, what), (second, other_what) = one, other
    if first != second:
        raise TokenizerError(
            f"{what} has the tokenizer {first[:SHOWN_DIGITS]}, {other_what} has {second[:SHOWN_DIGITS]}: the same ids are "
            "other text; use the tokenizer folder that the data was prepared with, or prepare the data again."
        )


def _stated(node: Any) -> Any:
    """The node without keys that are off: each release of the library adds switches, off by default."""
    if isinstance(node, dict):
        # 0 == False in Python, and 0 is an id
        return {key: _stated(value) for key, value in node.items() if value is not None and value is not False}
    return [_stated(value) for value in node] if isinstance(node, list) else node
