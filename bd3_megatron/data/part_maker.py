"""One part of a source to tokens: documents read, cleaned, encoded in small batches, split and written.

Contract: documents of a part keep their order. A part's folder is published whole, its record included, so what exists is
finished; the record says what was read, and a part whose text did not change is never made again.
Costs: at most about a megabyte of text is inside the tokenizer at a time.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bd3_megatron.data.cleaning import CleanDocument, clean_documents
from bd3_megatron.data.decontaminate import NgramIndex, NgramRequest
from bd3_megatron.data.deduplicate import copies_digest, read_copies
from bd3_megatron.data.detokenizers import Rule, detokenizer
from bd3_megatron.data.dialogue import Spans, plain_spans
from bd3_megatron.data.held_out import is_held_out
from bd3_megatron.data.part_pool import Progress, Report
from bd3_megatron.data.shard_header import ShardRecord, token_dtype
from bd3_megatron.data.shards import ShardWriter
from bd3_megatron.data.source import BadDocument, Dialogue, Part, PartTask, Source
from bd3_megatron.data.tokenizer import Tokenizer, Tokens
from bd3_megatron.data.tokenizer_open import load_tokenizer
from bd3_megatron.errors import DataError, WorkStopped
from bd3_megatron.files import disk_errors, read_json, whole, write_json

RECORD_FILE = "record.json"
DISK_REMEDY = "free some space or choose another --out, and run the same command again: finished parts are kept"
# Characters inside the tokenizer at a time: enough to occupy its threads, little enough for memory.
_BATCH_CHARACTERS = 1 << 20
BAD_NAMED = 5
"""Number of bad documents that a part's record names."""


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """What became of a part."""

    shards: dict[str, ShardRecord]
    """By split; a split without documents is absent."""
    left_out: dict[str, int]
    """Documents that are in no shard, by reason: empty, bad, repeated, contaminated."""
    bad: list[str]
    """The first few that could not be read, in words."""
    lowest_key: int
    """Smallest content key of all documents in the shards."""
    stamp: str
    content: str
    """SHA-256 of the text that was read."""
    repeated: str
    """Which documents were left out as copies; it changes with the text of other parts."""

    @staticmethod
    def read(folder: Path) -> PartRecord | None:
        """The record in a part's folder; None where there is none that this release reads."""
        if not (folder / RECORD_FILE).is_file():
            return None
        content = read_json(folder / RECORD_FILE, "remove the .partial folder and prepare the data again")
        try:
            shards = {split: ShardRecord(**shard) for split, shard in content.pop("shards").items()}
            return PartRecord(shards=shards, **content)
        # A record of another release is no error: the part is made again.
        except (KeyError, TypeError, AttributeError):
            return None

    def is_of(self, task: PartTask, source: Source, repeated: str) -> bool:
        """Whether the part would come out the same again; reads its text only where its files were touched."""
        if self.repeated != repeated:
            return False
        # Sizes and times decide first, since hashing reads the whole text; a touched file with equal text is still
        # accepted.
        return self.stamp == source.stamp(task.part) or self.content == content_of(source, task.part)


def content_of(source: Source, part: Part) -> str:
    """SHA-256 of the text of a part, document by document."""
    digest = hashlib.sha256()
    for document in source.documents(part):
        _add_to(digest, document)
    return digest.hexdigest()


@dataclass(kw_only=True)
class TokenPartMaker:
    """Makes parts; one instance in each worker."""

    sources: Mapping[str, Source]
    work_folder: Path
    tokenizer_folder: Path
    valid_fraction: float
    detokenizer: str
    skip_bad: int = 0
    decontaminate: NgramRequest | None = None
    rules: tuple[Rule, ...] = ()
    """Of the detokenizer, once opened."""
    evaluated: NgramIndex | None = None
    """What is evaluated on and must not be trained on, once opened."""
    _tokenizer: Tokenizer | None = None

    def open(self) -> None:
        self._tokenizer = load_tokenizer(self.tokenizer_folder)
        self.rules = detokenizer(self.detokenizer)
        self.evaluated = None if self.decontaminate is None else self.decontaminate.index()

    def make(self, task: PartTask, report: Report) -> tuple[PartTask, PartRecord]:
        """Tokenise one part and publish its folder.

        Raises:
            DataError: more bad documents than may be skipped.
            WorkStopped: the disk's own reason.
        """
        folder = part_folder(self.work_folder, task)
        with (
            disk_errors(f"writing {folder}", DISK_REMEDY, kind=WorkStopped),
            # A folder that exists counts as finished, so it appears by one rename, its record included.
            whole(folder, replace_folder=True) as temporary,
        ):
            temporary.mkdir()
            record = self._write(task, temporary, report)
            write_json(temporary / RECORD_FILE, asdict(record))
        return task, record

    def _write(self, task: PartTask, folder: Path, report: Report) -> PartRecord:
        source = self.sources[task.split]
        # Taken first: a file that changes while it is read has another stamp next time, and is read again.
        stamp = source.stamp(task.part)
        chosen = _Choice(self, task)
        with ExitStack() as stack:
            # Fixed by the vocabulary and not by the ids met, so that all parts of a split have one dtype.
            dtype = token_dtype(self._opened().vocab_size)
            writers = {
                split: ShardWriter(folder / split, dtype, answers_only=source.answers_only)
                for split in self._splits(task.split)
            }
            for writer in writers.values():
                stack.enter_context(writer)
            self._encode(task, chosen.documents(source), writers, report)
            shards = {split: made for split, writer in writers.items() if (made := writer.finish()) is not None}
        return PartRecord(
            shards=shards,
            left_out=dict(chosen.left_out),
            bad=chosen.bad,
            lowest_key=chosen.lowest_key,
            stamp=stamp,
            content=chosen.digest.hexdigest(),
            repeated=chosen.repeated,
        )

    def _encode(
        self, task: PartTask, documents: Iterator[CleanDocument], writers: Mapping[str, ShardWriter], report: Report
    ) -> None:
        weight_left = float(task.part.weight)
        for batch in _batches(documents):
            encoded = self._encoded(batch)
            sides = [self._split_of(task.split, document.key) for document in batch]
            for split, writer in writers.items():
                writer.add(
                    [tokens for side, (tokens, _) in zip(sides, encoded, strict=True) if side == split and len(tokens)],
                    [
                        known
                        for side, (tokens, known) in zip(sides, encoded, strict=True)
                        if side == split and len(tokens)
                    ],
                )
            # Characters only approximate bytes: the sum must not exceed the part's weight, and the rest is reported
            # below.
            weight = min(_weight_of(task.part, batch), weight_left)
            weight_left -= weight
            report(Progress(documents=len(batch), tokens=sum(len(tokens) for tokens, _ in encoded), weight=weight))
        report(Progress(weight=weight_left))

    def spans_of(self, dialogue: Dialogue) -> Spans | BadDocument:
        """A dialogue written out: by the tokenizer's template, or as it is."""
        template = self._opened().chat_template
        if not dialogue.is_chat:
            return plain_spans(dialogue)
        assert template is not None  # `prepare` refuses chats without one
        return template.spans(dialogue)

    def _encoded(self, batch: list[CleanDocument]) -> list[tuple[Tokens, NDArray[np.bool_]]]:
        """Ids of each document, and which of them are supervised."""
        # Spans of a dialogue are encoded one by one: the ids of a prompt do not depend on its answer.
        spans = [document.spans or () for document in batch]
        texts = [
            [s.text for s in some] if some else [document.text] for document, some in zip(batch, spans, strict=True)
        ]
        with_control = any(document.dialogue is not None and document.dialogue.is_chat for document in batch)
        ids = iter(self._opened().encode_batch([text for some in texts for text in some], with_control=with_control))
        encoded = []
        for some, written in zip(spans, texts, strict=True):
            pieces = [next(ids) for _ in written]
            known = [np.full(len(p), s.is_supervised) for p, s in zip(pieces, some, strict=True)] if some else []
            tokens = np.concatenate(pieces, dtype=np.uint32)
            encoded.append((tokens, np.concatenate(known) if known else np.ones(len(tokens), dtype=np.bool_)))
        return encoded

    def _splits(self, split: str) -> list[str]:
        return ["train", "valid"] if split == "train" and self.valid_fraction > 0 else [split]

    def _split_of(self, split: str, key: int) -> str:
        # By content and not at random: equal documents fall on the same side, in any order and in any corpus.
        return "valid" if split == "train" and is_held_out(key, self.valid_fraction) else split

    def _opened(self) -> Tokenizer:
        assert self._tokenizer is not None  # open() comes first
        return self._tokenizer


class _Choice:
    """The documents of a part that are encoded; counts those that are not."""

    def __init__(self, maker: TokenPartMaker, task: PartTask) -> None:
        self._maker, self._task = maker, task
        copies = read_copies(maker.work_folder, task)
        self.repeated, self._copies = copies_digest(copies), frozenset(copies.tolist())
        self.left_out: Counter[str] = Counter()
        self.bad: list[str] = []
        self.lowest_key = (1 << 64) - 1
        self.digest = hashlib.sha256()

    def documents(self, source: Source) -> Iterator[CleanDocument]:
        # Numbers count only documents that `clean` kept, as `KeyPartMaker` counts them: copies are named by these
        # numbers.
        number = -1
        for document in clean_documents(self._hashed(source), self._maker.rules):
            if document is None:
                self.left_out["empty"] += 1
            elif isinstance(document, BadDocument):
                self._count_bad(document)
            else:
                number += 1
                reason = self._reason(number, document.text)
                if reason is not None:
                    self.left_out[reason] += 1
                    continue
                spans = None if document.dialogue is None else self._maker.spans_of(document.dialogue)
                if isinstance(spans, BadDocument):
                    self._count_bad(spans)
                    continue
                self.lowest_key = min(self.lowest_key, document.key)
                yield replace(document, spans=spans)

    def _hashed(self, source: Source) -> Iterator[str | Dialogue | BadDocument]:
        for document in source.documents(self._task.part):
            _add_to(self.digest, document)
            yield document

    def _reason(self, number: int, text: str) -> str | None:
        # A copy is not compared with the evaluation texts: its first occurrence was.
        if number in self._copies:
            return "repeated"
        evaluated = self._maker.evaluated
        return (
            "contaminated" if evaluated is not None and self._task.split == "train" and evaluated.holds(text) else None
        )

    def _count_bad(self, document: BadDocument) -> None:
        self.left_out["bad"] += 1
        check_bad(self.left_out["bad"], self._maker.skip_bad, document)
        if len(self.bad) < BAD_NAMED:
            self.bad.append(f"{document.where} {document.reason}")


def check_bad(count: int, allowed: int, last: BadDocument) -> None:
    """Refuse more documents that cannot be read than may be left out.

    Raises:
        DataError: names the last of them.
    """
    if count > allowed:
        state = f"; it is bad document number {count}, and --skip-bad {allowed} allows no more" if allowed else ""
        raise DataError(
            f"{last.where} {last.reason}{state}; {last.remedy}, or leave out up to N such documents with --skip-bad N."
        )


def part_folder(work_folder: Path, task: PartTask) -> Path:
    """Where a finished part lies."""
    return work_folder / "parts" / task.stem


def _batches(documents: Iterator[CleanDocument]) -> Iterator[list[CleanDocument]]:
    """Documents about a megabyte at a time."""
    batch: list[CleanDocument] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _weight_of(part: Part, batch: list[CleanDocument]) -> float:
    """Share of a part's weight that these documents make up; what is left over is reported when the part is done."""
    # Grouped whole files carry no offsets; their weight is reported at the end.
    if not part.stop:
        return 0.0
    # Parts of text weigh bytes, of which characters are a fair measure; parts of a table weigh rows.
    return float(sum(len(document.text) for document in batch) if part.items else len(batch))


def _add_to(digest: Any, document: str | Dialogue | BadDocument) -> None:
    text = document.as_json() if isinstance(document, Dialogue) else document
    # The length goes first, so that a document cut in two is other text.
    content = (text if isinstance(text, str) else text.reason).encode()
    digest.update(f"{len(content)} {type(document).__name__} ".encode())
    digest.update(content)
