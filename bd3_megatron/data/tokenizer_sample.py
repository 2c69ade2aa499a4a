"""Text to train a vocabulary on: an even, repeatable share of the corpus without what is held out."""

from __future__ import annotations

from collections.abc import Iterator

from bd3_megatron.data.detokenizers import apply_rules, detokenizer
from bd3_megatron.data.held_out import is_held_out, placed
from bd3_megatron.data.sources import Source


def sample_documents(source: Source, num_bytes: int, valid_fraction: float, detokenizer_name: str) -> Iterator[str]:
    """Documents from the beginning of every part, about `num_bytes` in all, held-out ones left out.

    Args:
        source: the training text.
        num_bytes: budget, shared evenly among the parts.
        valid_fraction: share of documents that is held out, in [0, 0.5].
        detokenizer_name: applied as it will be to the corpus.
    """
    parts = source.parts()
    rules = detokenizer(detokenizer_name)
    for part in parts:
        budget = max(num_bytes // len(parts), 1)
        for place, text in placed(apply_rules(rules, text) for text in source.documents(part)):
            if place is None or is_held_out(part.number, place, valid_fraction):
                continue
            yield text[:budget]
            budget -= len(text)
            if budget <= 0:
                break
