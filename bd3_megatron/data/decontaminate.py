"""Decontamination: training documents that share a run of words with an evaluation set are left out whole.

Contract: words are letters and digits, without case and punctuation; hits found by hash are confirmed word by word.
Costs: about 5 MB/s a process, and the words of the evaluation sets in memory of each.
Source: Brown et al., "Language Models are Few-Shot Learners", 2020, appendix C.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bd3_megatron.data.dataset_source import HubDataset
from bd3_megatron.data.text_files import TextFiles, is_text_file
from bd3_megatron.errors import ConfigError, DataError

# As in GPT-3's report. Own code, because datatrove's reads its own task definitions and would bring its job system.
DEFAULT_WORDS = 13
_WORD = re.compile(r"\w+")
# Odd, so that multiplying modulo 2^64 loses no bits.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, kw_only=True)
class NgramRequest:
    """Which evaluation texts must not be trained on."""

    files: tuple[str, ...]
    """Text files, or dataset files of which every text in every row counts."""
    num_words: int = DEFAULT_WORDS
    """Words of a run."""

    def __post_init__(self) -> None:
        if self.num_words < 1:
            raise ConfigError(f"--ngram {self.num_words} is no run of words; use 8 to 13.")

    def identity(self) -> dict[str, Any]:
        """What tells this request from another, as JSON.

        Raises:
            DataError: a file does not exist.
        """
        for name in self.files:
            if not Path(name).is_file():
                raise DataError(f"evaluation file {name} does not exist; give text, .jsonl, .parquet or .csv files.")
        # Sizes and times, not content: the identity is computed at every start.
        found = [[name, os.path.getsize(name), os.stat(name).st_mtime_ns] for name in self.files]
        return {"files": found, "num_words": self.num_words}

    def index(self) -> NgramIndex:
        """Read the files."""
        return NgramIndex((text for name in self.files for text in _texts_of(name)), self.num_words)


class NgramIndex:
    """All runs of words of some texts."""

    def __init__(self, texts: Iterable[str], num_words: int) -> None:
        self.num_words = num_words
        self.num_texts = self.num_short = 0
        self._words: list[str] = []
        hashes, places = [np.zeros(0, dtype=np.uint64)], [np.zeros(0, dtype=np.int64)]
        for text in texts:
            words = words_of(text)
            self.num_texts += 1
            # Texts shorter than a run can match nothing; their number is told, since they go unprotected.
            self.num_short += len(words) < num_words
            hashes.append(self._hashes(words))
            places.append(len(self._words) + np.arange(len(hashes[-1])))
            self._words += words
        # Sorted once, so that a run is found by bisection; one occurrence of each hash is kept.
        self._sorted, first = np.unique(np.concatenate(hashes), return_index=True)
        self._places = np.concatenate(places)[first]

    def holds(self, text: str) -> bool:
        """Whether a run of the text is among them."""
        words = words_of(text)
        hashes = self._hashes(words)
        if not len(hashes) or not len(self._sorted):
            return False
        at = np.minimum(np.searchsorted(self._sorted, hashes), len(self._sorted) - 1)
        hits = np.flatnonzero(self._sorted[at] == hashes)
        # A hash of 64 bits may collide, and no document may be lost to a collision.
        return any(self._is_same(words[i : i + self.num_words], int(self._places[at[i]])) for i in hits.tolist())

    def _is_same(self, run: list[str], place: int) -> bool:
        return self._words[place : place + self.num_words] == run

    def _hashes(self, words: list[str]) -> NDArray[np.uint64]:
        """A hash of every run: a polynomial in the words' own, modulo 2^64."""
        count = len(words) - self.num_words + 1
        if count < 1:
            return np.zeros(0, dtype=np.uint64)
        # Python's hash of a text differs between processes; index and text are hashed in the same one.
        of_word = np.fromiter(map(hash, words), dtype=np.int64, count=len(words)).astype(np.uint64)
        runs = np.zeros(count, dtype=np.uint64)
        for place in range(self.num_words):
            runs = runs * _MULTIPLIER + of_word[place : place + count]
        return runs


def words_of(text: str) -> list[str]:
    """Words without case."""
    return _WORD.findall(text.casefold())


def _texts_of(name: str) -> Iterator[str]:
    if is_text_file(Path(name)):
        source = TextFiles(paths=(name,), documents_are="file")
        for part in source.parts():
            for document in source.documents(part):
                if not isinstance(document, str):
                    raise DataError(f"{document.where} {document.reason}; {document.remedy}.")
                yield document
        return
    for row in HubDataset(path=name).rows():
        yield from _strings_in(row)


def _strings_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings_in(inner)
