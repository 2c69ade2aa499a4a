"""Exact deduplication: the first of equal documents stays, wherever in the corpus the others stand.

Contract: equal means equal words (`content_key`); a training copy of a document in another split goes.
Costs: the text is read twice; 32 bytes a document in memory while copies are looked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bd3_megatron.data.cleaning import CleanDocument, clean_documents
from bd3_megatron.data.detokenizers import Rule, detokenizer
from bd3_megatron.data.part_pool import Report
from bd3_megatron.data.source import PartTask, Source
from bd3_megatron.files import stream

# Own code because it is one call of numpy: the libraries seen (datatrove, text-dedup) bring job systems and formats of
# their own for near-duplicates on clusters.
Numbers = NDArray[np.uint64]


@dataclass(kw_only=True)
class KeyPartMaker:
    """Writes the content keys of a part's documents; one instance in each worker."""

    sources: Mapping[str, Source]
    work_folder: Path
    detokenizer: str
    _rules: tuple[Rule, ...] = ()

    def open(self) -> None:
        self._rules = detokenizer(self.detokenizer)

    def make(self, task: PartTask, report: Report) -> PartTask:
        """Write one file of keys, or find it."""
        source = self.sources[task.split]
        # The stamp is part of the name: keys of a file that was mended since are not found.
        path = keys_file(self.work_folder, task, source.stamp(task.part))
        if not path.is_file():
            documents = clean_documents(source.documents(task.part), self._rules)
            keys = [document.key for document in documents if isinstance(document, CleanDocument)]
            _write(path, np.asarray(keys, dtype=np.uint64))
        return task


def mark_copies(work_folder: Path, tasks: Sequence[PartTask], sources: Mapping[str, Source]) -> int:
    """Write, for each part, which of its documents are copies of earlier ones; returns how many there are in all.

    Args:
        work_folder: where `KeyPartMaker` wrote the keys of all these parts.
        tasks: all parts, in order.
        sources: by split.
    """
    # Splits that are not trained on come first, so their documents are the first occurrence; the sort is stable.
    ordered = sorted(tasks, key=lambda task: task.split == "train")
    keys = [np.load(keys_file(work_folder, task, sources[task.split].stamp(task.part))) for task in ordered]
    # return_index gives the first occurrence, which the rule "the first stays" needs.
    _, first = np.unique(np.concatenate(keys), return_index=True)
    is_copy = np.ones(sum(map(len, keys)), dtype=np.bool_)
    is_copy[first] = False
    pieces = np.split(is_copy, np.cumsum([len(some) for some in keys])[:-1])
    for task, piece in zip(ordered, pieces, strict=True):
        _write(_copies_file(work_folder, task), np.flatnonzero(piece).astype(np.uint64))
    return int(np.count_nonzero(is_copy))


def read_copies(work_folder: Path, task: PartTask) -> Numbers:
    """Numbers of a part's documents that are copies, those without words not counted; none where nobody looked."""
    path = _copies_file(work_folder, task)
    found: Numbers = np.load(path) if path.is_file() else np.zeros(0, dtype=np.uint64)
    return found


def copies_digest(copies: Numbers) -> str:
    """What tells one choice of copies from another."""
    return hashlib.sha256(copies.tobytes()).hexdigest()


def keys_file(work_folder: Path, task: PartTask, stamp: str) -> Path:
    """Where the keys of a part with this stamp lie."""
    return work_folder / "keys" / f"{task.stem}-{hashlib.sha256(stamp.encode()).hexdigest()[:16]}.npy"


def _copies_file(work_folder: Path, task: PartTask) -> Path:
    return work_folder / "copies" / f"{task.stem}.npy"


def _write(path: Path, numbers: Numbers) -> None:
    with stream(path) as file:
        np.save(file, numbers)
