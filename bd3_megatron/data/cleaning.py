"""From a source's documents to those that are encoded: cleaned, keyed by content, some left out and counted.

Contract: one way for prepared folders, vocabularies and streams, so that they agree on what a document is and which side of
the held-out line it stands on. White space alone is no document.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from bd3_megatron.data.detokenizers import Rule, apply_rules, detokenizer
from bd3_megatron.data.dialogue import Spans
from bd3_megatron.data.held_out import content_key, is_held_out
from bd3_megatron.data.source import BadDocument, Dialogue, Source


@dataclass(frozen=True)
class CleanDocument:
    """Text as it is trained on."""

    text: str
    key: int
    """Of `content_key`."""
    dialogue: Dialogue | None = None
    """Its turns, where only answers are predicted."""
    spans: Spans | None = None
    """What is encoded in place of the text, once the dialogue is written out."""


def clean_documents(
    documents: Iterable[str | Dialogue | BadDocument], rules: Sequence[Rule]
) -> Iterator[CleanDocument | BadDocument | None]:
    """Apply a detokenizer's rules and compute keys; None for documents without words."""
    for document in documents:
        if isinstance(document, BadDocument):
            yield document
            continue
        if isinstance(document, Dialogue):
            # Detokenizers undo the spacing of benchmarks, and are refused for dialogues. The key is of the contents: a
            # chat is held out or not whatever template writes it.
            yield CleanDocument(document.text, content_key(document.text), document)
            continue
        yield clean(document, rules)


def clean(text: str, rules: Sequence[Rule]) -> CleanDocument | None:
    """One document after a detokenizer's rules; None where no words are left."""
    # The key is of the cleaned text: what is equal after cleaning is equal to the model.
    text = apply_rules(rules, text)
    return CleanDocument(text, content_key(text)) if text.strip() else None


def sample_documents(source: Source, num_bytes: int, valid_fraction: float, detokenizer_name: str) -> Iterator[str]:
    """Text to train a vocabulary on: an even, repeatable share of the corpus without what is held out.

    Args:
        source: the training text.
        num_bytes: budget, shared evenly among the parts, each read from its beginning.
        valid_fraction: share of documents that is held out, in [0, 0.5].
        detokenizer_name: applied as it will be to the corpus.
    """
    parts = source.parts()
    rules = detokenizer(detokenizer_name)
    for part in parts:
        budget = max(num_bytes // len(parts), 1)
        for document in clean_documents(source.documents(part), rules):
            # What cannot be read is counted, or refused, when the part is made.
            if not isinstance(document, CleanDocument) or is_held_out(document.key, valid_fraction):
                continue
            yield document.text[:budget]
            # Characters stand for bytes here: the sample only has to be even and repeatable.
            budget -= len(document.text)
            if budget <= 0:
                break
