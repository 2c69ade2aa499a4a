"""How much text stands behind scored rows: bytes and words, for measures that do not depend on the tokenizer.

Contract: a document that neighbouring rows cut is put together again before it is decoded; special tokens and what fills a
row are no text. Where only some rows are scored, a letter cut at their edge counts as U+FFFD. Costs one decoding of the
scored rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from bd3_megatron.data.loader import TokenDataset
from bd3_megatron.data.tokenizer import META_FILE, Tokenizer
from bd3_megatron.data.tokenizer_fingerprint import check_same_tokenizer
from bd3_megatron.data.tokenizer_open import load_tokenizer

# Rows whose tokens are Python numbers at a time.
ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class TextUnits:
    """Sizes of one text."""

    num_tokens: int
    """Tokens of the rows, special ones included, without padding and fill."""
    num_bytes: int
    """Of the UTF-8 text."""
    num_words: int
    """Parts between white space."""

    def measures(self, nll_nats_per_token: float) -> dict[str, float | int | None]:
        """Bits per byte and perplexity per word at so many nats per token; None where there is no byte or word.

        Source: Language Model Evaluation Harness (arXiv 2405.14782), bits_per_byte and word_perplexity.
        """
        nats = nll_nats_per_token * self.num_tokens
        per_word = nats / self.num_words if self.num_words else None
        return {
            "bits_per_byte": nats / math.log(2) / self.num_bytes if self.num_bytes else None,
            # exp(710) overflows a float64
            "word_perplexity": None if per_word is None else math.inf if per_word > 700 else math.exp(per_word),
            "num_bytes": self.num_bytes,
            "num_words": self.num_words,
        }


def text_tokenizer(dataset: TokenDataset, data: Path) -> Tokenizer | None:
    """The tokenizer that prepared a text, from beside it; None where it is not there.

    Args:
        dataset: the rows.
        data: the prepared folder, or one split of it.

    Raises:
        TokenizerError: what lies there is damaged, or did not make this text.
    """
    found = next(
        # Beside the split where a split was named.
        (path for path in (data / "tokenizer", data.parent / "tokenizer") if (path / META_FILE).is_file()),
        None,
    )
    if found is None:
        return None
    tokenizer = load_tokenizer(found)
    check_same_tokenizer(
        (dataset.sources[0].shards.tokenizer_fingerprint, str(data)), (tokenizer.fingerprint, str(found))
    )
    return tokenizer


def text_units(dataset: TokenDataset, row_id_N: Tensor, tokenizer: Tokenizer) -> TextUnits:
    """Sizes of the text in some rows.

    Args:
        dataset: rows in their own order, of one source.
        row_id_N: int64, rising.
        tokenizer: made the text.
    """
    text, first = _Documents(tokenizer), int(dataset.sources[0].rule.wrap_special)
    num_tokens, previous = 0, -1
    for row_id_B in row_id_N.split(ROWS_AT_ONCE):
        clean = dataset.batch_for(row_id_B)
        given_BL = None if clean.is_supervised_BL is None else ~clean.is_supervised_BL
        skipped = [mask.tolist() for mask in (clean.is_padding_BL, clean.is_fill_BL, given_BL) if mask is not None]
        documents = None if clean.document_id_BL is None else clean.document_id_BL.tolist()
        for place, (row_id, ids) in enumerate(zip(row_id_B.tolist(), clean.tokens_BL.tolist(), strict=True)):
            # A row that was left out lies between: what is cut there cannot be joined.
            if row_id != previous + 1:
                text.end()
            previous = row_id
            kept = [i for i in range(len(ids)) if not any(mask[place][i] for mask in skipped)]
            num_tokens += len(kept)
            # BOS and EOS at both ends of a row are no document's
            for i in kept[first : len(kept) - first]:
                is_new = documents is not None and i > 0 and documents[place][i] != documents[place][i - 1]
                # Padding and fill stand behind the end of a text, a prompt stands before an answer.
                if is_new or i > 0 and any(mask[place][i - 1] for mask in skipped):
                    text.end()
                text.add(ids[i])
            if any(mask[place][-1] for mask in skipped):
                text.end()
    text.end()
    return TextUnits(num_tokens, text.num_bytes, text.num_words)


class _Documents:
    """Counts documents, token by token."""

    num_bytes: int
    num_words: int

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.num_bytes = self.num_words = 0
        self._tokenizer, self._ids = tokenizer, list[int]()

    def add(self, token: int) -> None:
        """One more token; an end token ends the document."""
        if token == self._tokenizer.special.eos:
            self.end()
        else:
            self._ids.append(token)

    def end(self) -> None:
        """The document is over, or what follows is not known."""
        if self._ids:
            # A document at once: tokens may hold parts of a letter.
            text = self._tokenizer.decode(self._ids, skip_special=True)
            self.num_bytes += len(text.encode("utf-8", errors="replace"))
            self.num_words += len(text.split())
        self._ids = []
