"""From sources to a prepared folder: tokenised in parts by any number of workers, restartable, published at once.

Contract: nothing depends on the number of workers, on time or on restarts: equal settings and text give equal bytes. The
folder becomes visible by one rename when everything is complete; until then finished parts are kept, whatever fails.
Refuses: bad requests before anything is written, documents that cannot be read, a folder that holds anything else.
Costs: memory of a few megabytes of text and its tokens a worker.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bd3_megatron.config.data import DEFAULT_HELD_OUT, DEFAULT_NUM_PIECES
from bd3_megatron.data.cleaning import sample_documents
from bd3_megatron.data.decontaminate import NgramRequest
from bd3_megatron.data.deduplicate import KeyPartMaker, copies_digest, mark_copies, read_copies
from bd3_megatron.data.held_out import GREATEST_FRACTION, HELD_OUT_RULE, check_fraction, fraction_of
from bd3_megatron.data.part_maker import BAD_NAMED, DISK_REMEDY, PartRecord, TokenPartMaker, part_folder
from bd3_megatron.data.part_pool import ProgressBar, make_parts
from bd3_megatron.data.shard_header import FORMAT, HEADER_FILE, SHARDS_VERSION, Header, read_header
from bd3_megatron.data.source import PartTask, Source
from bd3_megatron.data.tokenizer import Tokenizer
from bd3_megatron.data.tokenizer_open import load_tokenizer, open_tokenizer
from bd3_megatron.data.work_folder import MANIFEST_FILE, WorkFolder, is_written, named_shards
from bd3_megatron.errors import BD3Error, ConfigError, DataError, WorkStopped, counted, cut
from bd3_megatron.files import disk_errors, whole

TRAINED_TOKENIZERS = {"sentencepiece": "unigram", "sentencepiece-bpe": "bpe"}


@dataclass(frozen=True, kw_only=True)
class PrepareRequest:
    """Everything that decides what a prepared folder holds."""

    out: Path
    """DIR."""
    sources: Mapping[str, Source]
    """Text of each split: `train`, and others where the corpus has them."""
    tokenizer: str = "bytes"
    """bytes, sentencepiece, sentencepiece-bpe (trained on the text), or what `open_tokenizer` takes."""
    vocab_size: int = DEFAULT_NUM_PIECES
    """V of a trained tokenizer."""
    valid_fraction: float = DEFAULT_HELD_OUT
    """Share of train's documents held out as `valid` by content; unused where a valid source is given."""
    detokenizer: str = "none"
    packing: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)
    """The recipe's own append_eos and wrap_special by split; recorded in the headers."""
    dedup: bool = False
    """Leave out copies of earlier documents, and training copies of documents in a given valid split."""
    decontaminate: NgramRequest | None = None
    """Evaluation sets whose runs of words no training document may hold."""
    tokenizer_sample_bytes: int = 32 << 20
    """Text a vocabulary is trained on, taken evenly from all parts."""

    @property
    def held_out_fraction(self) -> float:
        """The share that is held out indeed."""
        return self.valid_fraction if "train" in self.sources and "valid" not in self.sources else 0.0


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What `prepare` made or found."""

    folder: Path
    was_there: bool
    """The same request had been completed before; nothing was done."""
    num_tokens: dict[str, int]
    """By split."""
    num_documents: dict[str, int]
    num_supervised: dict[str, int]
    """Tokens of answers, of the splits where only answers are predicted."""
    left_out: dict[str, int]
    """Documents that stand in no shard, by reason: empty, bad, repeated, contaminated."""
    vocab_size: int


def prepare(
    request: PrepareRequest,
    *,
    num_workers: int = 1,
    skip_bad: int = 0,
    show_progress: bool = False,
    say: Callable[[str], None] = lambda sentence: None,
) -> Prepared:
    """Make a prepared folder, or find it made.

    Args:
        request: what to make.
        num_workers: processes; the result does not depend on it.
        skip_bad: documents that may be left out because they cannot be read; they are counted and named.
        show_progress: a bar on stderr.
        say: told in a sentence what is resumed, trained or left out.

    Raises:
        ConfigError: a request that contradicts itself, or DIR holds something else.
        DataError: text that is missing, empty or not UTF-8; finished parts are kept.
        WorkStopped: a full disk, or a worker that died; finished parts are kept.
        TokenizerError: a tokenizer that cannot be opened or trained.
    """
    _check(request, num_workers, skip_bad)
    parts = {split: source.parts() for split, source in request.sources.items()}
    settings = _settings(request)
    manifest = settings | {"sources": {split: source.identity() for split, source in request.sources.items()}}
    work = WorkFolder(request.out)
    # The check precedes the lock: a finished folder may lie on a disk that is mounted read-only.
    found = _find_finished(request.out, manifest)
    if found is not None:
        work.remove()  # a run killed right after publishing left it
        return found
    # Two runs with one --out would publish each other's half-written parts, so one of them is refused.
    with work.locked(), disk_errors(f"writing {work.root}", DISK_REMEDY, kind=WorkStopped):
        if work.begin(settings):
            say(f"going on with {work.root}: {counted(work.num_finished(), 'part is', 'parts are')} finished")
        try:
            tokenizer = _tokenizer(request, work, say)
            tasks = [PartTask(split=split, part=part) for split, listed in parts.items() for part in listed]
            run = _Run(request, work, tasks, num_workers, say)
            # Copies come first: whether a document is kept depends on the text of all parts, not only on its own.
            run.find_copies()
            records = run.make(skip_bad, show_progress=show_progress)
        # A full disk or a killed worker says nothing against the text: all finished parts are kept.
        except (WorkStopped, OSError):
            raise
        except BD3Error:
            # What is finished may have taken days, and the text that cannot be read may be mended in a minute.
            if kept := work.num_finished():
                finished = counted(kept, "finished part is", "finished parts are")
                say(f"{finished} kept in {work.root}: the same command goes on from there")
            else:
                work.remove()
            raise
        try:
            headers = _headers(request, tokenizer, tasks, records)
        except DataError:
            # Only so few documents leave a split empty that nothing is lost with them.
            work.remove()
            raise
        # Headers and the manifest are written last, since a folder with a manifest counts as complete.
        files = {f"{split}/{HEADER_FILE}": header.as_dict() for split, header in headers.items()}
        work.publish(tasks, records, files | {MANIFEST_FILE: manifest})
        return _prepared(request.out, headers, was_there=False)


@dataclass(frozen=True)
class _Run:
    """The parts of one request and who makes them."""

    request: PrepareRequest
    work: WorkFolder
    tasks: Sequence[PartTask]
    num_workers: int
    say: Callable[[str], None]

    def find_copies(self) -> None:
        """Mark the documents that stand somewhere before, where the request asks for it."""
        if not self.request.dedup:
            return
        maker = KeyPartMaker(
            sources=dict(self.request.sources), work_folder=self.work.work, detokenizer=self.request.detokenizer
        )
        for _ in make_parts(maker, self.tasks, self.num_workers, lambda progress: None):
            pass
        copies = mark_copies(self.work.work, self.tasks, self.request.sources)
        one, many = "document is a copy of an earlier one and is", "documents are copies of earlier ones and are"
        self.say(f"{counted(copies, one, many)} left out")

    def make(self, skip_bad: int, *, show_progress: bool) -> dict[PartTask, PartRecord]:
        """Make every part that is not there yet.

        Raises:
            DataError: more bad documents than may be skipped, in all parts together.
        """
        maker = TokenPartMaker(
            sources=dict(self.request.sources),
            work_folder=self.work.work,
            tokenizer_folder=self.work.data / "tokenizer",
            valid_fraction=self.request.held_out_fraction,
            detokenizer=self.request.detokenizer,
            skip_bad=skip_bad,
            decontaminate=self.request.decontaminate,
        )
        self._say_what_is_compared()
        records = {task: record for task in self.tasks if (record := self._finished(task)) is not None}
        # What a part holds follows from its text and the settings, never from the worker or the run that made it.
        rest = [task for task in self.tasks if task not in records]
        with ProgressBar(sum(task.part.weight for task in self.tasks), show=show_progress) as bar:
            for task in records:
                bar.skip(task.part.weight)
            _check_bad(records, skip_bad)
            for task, record in make_parts(maker, rest, self.num_workers, bar.advance):
                records[task] = record
                _check_bad(records, skip_bad)
        if named := [bad for task in self.tasks for bad in records[task].bad]:
            count = sum(record.left_out.get("bad", 0) for record in records.values())
            more = ", ..." if count > BAD_NAMED else ""
            self.say(
                f"{counted(count, 'bad document is', 'bad documents are')} left out: {', '.join(named[:BAD_NAMED])}{more}"
            )
        return records

    def _finished(self, task: PartTask) -> PartRecord | None:
        record = PartRecord.read(part_folder(self.work.work, task))
        # With dedup, an edit in one part may turn a document of another part into a copy, or back.
        copies = copies_digest(read_copies(self.work.work, task))
        return record if record is not None and record.is_of(task, self.request.sources[task.split], copies) else None

    def _say_what_is_compared(self) -> None:
        if self.request.decontaminate is None:
            return
        index = self.request.decontaminate.index()
        short = f"; {index.num_short} are shorter than {index.num_words} words and are not" if index.num_short else ""
        self.say(f"training text is compared with {index.num_texts - index.num_short} evaluation texts{short}")


def _check(request: PrepareRequest, num_workers: int, skip_bad: int) -> None:
    check_fraction(request.valid_fraction)
    if num_workers < 1:
        raise ConfigError(f"num_workers={num_workers} does no work; use 1 or more.")
    if skip_bad < 0:
        raise ConfigError(f"skip_bad={skip_bad} is negative; use 0 or more.")
    if not request.sources:
        raise ConfigError("no text was named; give --text, --builtin, --dataset or a recipe with a source.")
    # A vocabulary that is trained on evaluation text would make the evaluation look better than it is.
    if request.tokenizer in TRAINED_TOKENIZERS and "train" not in request.sources:
        raise ConfigError(
            f"tokenizer={request.tokenizer} is trained on train text and there is none; name a tokenizer."
        )
    _check_answers(request)
    if request.out.is_file():
        raise ConfigError(f"out={request.out} is a file; name a folder.")


def _check_answers(request: PrepareRequest) -> None:
    for split, source in request.sources.items():
        if source.needs_template and request.tokenizer in TRAINED_TOKENIZERS:
            raise _no_template(request.tokenizer)
        if source.answers_only and request.detokenizer != "none":
            raise ConfigError(
                f"detokenizer={request.detokenizer} undoes the spacing of a benchmark's plain text, and {split} holds prompts "
                "and answers; leave it out."
            )


def _no_template(tokenizer: str) -> ConfigError:
    return ConfigError(
        f"tokenizer={cut(tokenizer)} has no chat template, so nothing says how messages are written; name a tokenizer with a "
        "chat_template.jinja, or give the columns of prompt and answer."
    )


def _settings(request: PrepareRequest) -> dict[str, Any]:
    """What decides the result beside the text, as JSON: with equal settings and text, equal bytes."""
    trained = request.tokenizer in TRAINED_TOKENIZERS
    tokenizer = (
        {"train": request.tokenizer, "vocab_size": request.vocab_size, "sample_bytes": request.tokenizer_sample_bytes}
        if trained
        # The fingerprint and not the name: a name on the hub may give another tokenizer tomorrow.
        else _identity_of(request)
    )
    return {
        "format": FORMAT,
        "version": SHARDS_VERSION,
        "sources": {split: source.settings() for split, source in request.sources.items()},
        "tokenizer": tokenizer,
        "held_out": {"rule": HELD_OUT_RULE, "fraction": request.held_out_fraction},
        "detokenizer": request.detokenizer,
        "packing": {split: dict(rule) for split, rule in request.packing.items()},
        "dedup": request.dedup,
        "decontaminate": None if request.decontaminate is None else request.decontaminate.identity(),
    }


def _identity_of(request: PrepareRequest) -> dict[str, str]:
    """What tells the named tokenizer from others; its template too where chats are written by it.

    Raises:
        ConfigError: there are chats and no template.
    """
    tokenizer = open_tokenizer(request.tokenizer)
    if not any(source.needs_template for source in request.sources.values()):
        return {"fingerprint": tokenizer.fingerprint}
    if tokenizer.chat_template is None:
        raise _no_template(request.tokenizer)
    template = hashlib.sha256(tokenizer.chat_template.source.encode()).hexdigest()
    return {"fingerprint": tokenizer.fingerprint, "chat_template": template}


def _find_finished(out: Path, expected: dict[str, Any]) -> Prepared | None:
    if not out.exists() or not any(out.iterdir()):
        return None
    manifest = out / MANIFEST_FILE
    if not manifest.is_file():
        raise ConfigError(f"out={out} holds other files; name a new or empty folder.")
    if not is_written(manifest, expected):
        raise ConfigError(f"out={out} was prepared from other text or settings; name a new folder or remove it first.")
    splits = sorted(path.parent.name for path in out.glob(f"*/{HEADER_FILE}"))
    return _prepared(out, {split: read_header(out / split) for split in splits}, was_there=True)


def _tokenizer(request: PrepareRequest, work: WorkFolder, say: Callable[[str], None]) -> Tokenizer:
    """Open the tokenizer of a run that goes on, or make it and save it whole."""
    folder = work.data / "tokenizer"
    # Parts that are finished hold ids of this very tokenizer; to train it again could give other ids.
    if folder.is_dir():
        return load_tokenizer(folder)
    if request.tokenizer in TRAINED_TOKENIZERS:
        from bd3_megatron.data.sentencepiece_model import train_sentencepiece

        say(f"training a {request.tokenizer} vocabulary of {request.vocab_size}")
        texts = sample_documents(
            request.sources["train"],
            request.tokenizer_sample_bytes,
            request.held_out_fraction,
            request.detokenizer,
        )
        kind = TRAINED_TOKENIZERS[request.tokenizer]
        tokenizer: Tokenizer = train_sentencepiece(texts, request.vocab_size, model_type=kind)
    else:
        tokenizer = open_tokenizer(request.tokenizer)
    # Workers load the tokenizer from this folder, so it must appear complete or not at all.
    with whole(folder) as temporary:
        tokenizer.save(temporary)
    return tokenizer


def _check_bad(records: Mapping[PartTask, PartRecord], skip_bad: int) -> None:
    count = sum(record.left_out.get("bad", 0) for record in records.values())
    if count > skip_bad:
        # The limit holds for the whole corpus; a worker checks only its own part, to stop early.
        named = [bad for record in records.values() for bad in record.bad]
        raise DataError(
            f"{counted(count, 'document is', 'documents are')} bad and skip_bad={skip_bad} allows no more "
            f"({'; '.join(named[:BAD_NAMED])}); mend them, or raise --skip-bad."
        )


def _headers(
    request: PrepareRequest, tokenizer: Tokenizer, tasks: Sequence[PartTask], records: Mapping[PartTask, PartRecord]
) -> dict[str, Header]:
    """One header a split.

    Raises:
        DataError: a split has no tokens at all.
    """
    headers = {}
    # `valid` has no source of its own where it is held out of train.
    for split in [*request.sources, *(["valid"] if request.held_out_fraction else [])]:
        shards = named_shards(tasks, records, split)
        if not shards:
            raise DataError(_emptiness(request, split, records.values()))
        origin = split if split in request.sources else "train"
        left_out: Counter[str] = Counter()
        for task in tasks:
            # A part of train feeds both splits, but what it left out is counted once, with train.
            left_out.update(records[task].left_out if task.split == split else {})
        headers[split] = Header(
            vocab_size=tokenizer.vocab_size,
            special_ids=tokenizer.special,
            tokenizer_fingerprint=tokenizer.fingerprint,
            shards=shards,
            source=request.sources[origin].describe() | {"detokenizer": request.detokenizer},
            left_out=dict(left_out),
            packing=dict(request.packing.get(split, {})),
            held_out_fraction=request.held_out_fraction,
        )
    return headers


def _emptiness(request: PrepareRequest, split: str, records: Iterable[PartRecord]) -> str:
    shards = [shard for record in records for shard in record.shards.values()]
    documents = sum(shard.num_documents for shard in shards)
    if documents == 0:
        return f"the {split} text holds no documents (only white space, or all were left out); give text."
    fraction = request.held_out_fraction
    lowest = fraction_of(min(record.lowest_key for record in records))
    # The first document to be held out is known; rounded up, since a fraction is typed by hand.
    wanted = math.ceil((lowest + 0.005) * 100) / 100
    if split == "valid" and documents > 1 and wanted <= GREATEST_FRACTION:
        return (
            f"{documents} documents with valid_fraction={fraction} leave none for valid, since documents are chosen by "
            f"their text; use --valid-fraction {wanted}, give more documents, or cut them smaller (--documents line)."
        )
    return (
        f"{counted(documents, 'document')} with valid_fraction={fraction} {'leaves' if documents == 1 else 'leave'} none for "
        f"{split}; give more documents, cut them smaller (--documents line), or use --valid-fraction 0."
    )


def _prepared(folder: Path, headers: dict[str, Header], *, was_there: bool) -> Prepared:
    left_out: Counter[str] = Counter()
    for header in headers.values():
        left_out.update(header.left_out)
    return Prepared(
        folder=folder,
        was_there=was_there,
        num_tokens={split: header.num_tokens for split, header in headers.items()},
        num_documents={split: header.num_documents for split, header in headers.items()},
        num_supervised={s: header.num_supervised for s, header in headers.items() if header.num_supervised is not None},
        left_out=dict(left_out),
        vocab_size=next(iter(headers.values())).vocab_size,
    )
