"""From sources to a prepared folder: tokenised in parts by any number of workers, restartable, published at once.

Decides: work happens in `.NAME.partial` beside DIR. A part is done when its record exists, and the record is written
after the part's files are on the disk; so a run that was killed goes on where it stood, and the folder becomes visible
by one rename when everything is complete. Nothing depends on the number of workers, on time or on restarts: the same
request gives the same bytes.
Refuses: bad requests before anything is written; bad text, with everything removed; a full disk, keeping finished parts;
a DIR that holds anything else; a second process on the same DIR.
Costs: memory of about one part a worker (16 MiB of text at most, plus its tokens).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bd3_megatron.data.held_out import check_fraction
from bd3_megatron.data.part_maker import PartRecord, PartTask, TokenPartMaker
from bd3_megatron.data.part_pool import make_parts
from bd3_megatron.data.prepare_progress import ProgressBar
from bd3_megatron.data.shards import FORMAT, HEADER_FILE, SHARDS_VERSION, Header, token_dtype
from bd3_megatron.data.sources import Source
from bd3_megatron.data.tokenizer import Tokenizer
from bd3_megatron.data.tokenizer_open import load_tokenizer, open_tokenizer
from bd3_megatron.data.tokenizer_sample import sample_documents
from bd3_megatron.errors import BD3Error, ConfigError, DataError, WorkStopped
from bd3_megatron.files import disk_errors, move, read_json, write_json
from bd3_megatron.lease import held

MANIFEST_FILE = "prepare.json"
TRAINED_TOKENIZERS = {"sentencepiece": "unigram", "sentencepiece-bpe": "bpe"}
_DISK_REMEDY = "make room or choose another --out, and run the same command again: finished parts are kept"


@dataclass(frozen=True, kw_only=True)
class PrepareRequest:
    """Everything that decides what a prepared folder holds."""

    out: Path
    """DIR."""
    sources: Mapping[str, Source]
    """Text of each split: `train`, and others where the corpus has them."""
    tokenizer: str = "bytes"
    """bytes, sentencepiece, sentencepiece-bpe (trained on the text), or what `open_tokenizer` takes."""
    vocab_size: int = 2048
    """V of a trained tokenizer."""
    valid_fraction: float = 0.05
    """Share of train's documents held out as `valid`; unused where a valid source is given."""
    detokenizer: str = "none"
    packing: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)
    """The recipe's own append_eos and wrap_special by split; recorded in the headers."""
    tokenizer_sample_bytes: int = 32 << 20
    """Text a vocabulary is trained on, taken evenly from all parts."""

    def holds_out(self) -> bool:
        return "train" in self.sources and "valid" not in self.sources and self.valid_fraction > 0


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What `prepare` made or found."""

    folder: Path
    was_there: bool
    """The same request had been completed before; nothing was done."""
    num_tokens: dict[str, int]
    """By split."""
    num_documents: dict[str, int]
    vocab_size: int


def prepare(
    request: PrepareRequest,
    *,
    num_workers: int = 1,
    show_progress: bool = False,
    say: Callable[[str], None] = lambda sentence: None,
) -> Prepared:
    """Make a prepared folder, or find it made.

    Args:
        request: what to make.
        num_workers: processes; the result does not depend on it.
        show_progress: a bar on stderr.
        say: told in a sentence what is resumed or trained.

    Raises:
        ConfigError: a request that contradicts itself, or DIR holds something else.
        DataError: text that is missing, empty or not UTF-8.
        WorkStopped: a full disk, or a worker that died; finished parts are kept.
        TokenizerError: a tokenizer that cannot be opened or trained.
    """
    _check(request, num_workers)
    parts = {split: source.parts() for split, source in request.sources.items()}
    plan = _plan(request)
    work = _WorkFolder(request.out)
    found = _find_finished(request.out, plan)
    if found is not None:
        work.remove()  # a run killed right after publishing left it
        return found
    with work.locked(), disk_errors(f"writing {work.root}", _DISK_REMEDY, kind=WorkStopped):
        if work.begin(plan):
            say(f"going on with {work.root}: {work.num_finished()} parts are finished")
        try:
            tokenizer = _tokenizer(request, work, say)
            tasks = [PartTask(split=split, part=part) for split, listed in parts.items() for part in listed]
            records = _make_all(request, work, tasks, num_workers, show_progress=show_progress)
            headers = _headers(request, tokenizer, records)
        except (WorkStopped, OSError):
            raise
        except BD3Error:
            work.remove()
            raise
        return work.finish(plan, headers)


class _WorkFolder:
    """`.NAME.partial` beside DIR: data/ becomes DIR, work/ holds the plan, the records and temporary files."""

    def __init__(self, out: Path) -> None:
        self.out = out.absolute()
        self.root = self.out.with_name(f".{self.out.name}.partial")
        self.data, self.work = self.root / "data", self.root / "work"
        self.plan_file = self.work / "plan.json"
        self._made: list[Path] = []

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second process out, of this machine or another.

        Raises:
            FolderHeldError: another process is preparing the same DIR.
            LaunchError: the place cannot be written.
        """
        self._made = [p for p in (self.root, *self.root.parents) if not p.exists()]
        with held(self.root, name=f"out={self.out}"):
            yield

    def begin(self, plan: dict[str, Any]) -> bool:
        """Set the folder up for a plan; True where an earlier run of the same plan goes on."""
        if self.plan_file.is_file() and _is_plan(self.plan_file, plan):
            shutil.rmtree(self.work / "temporary", ignore_errors=True)
            (self.work / "temporary").mkdir(exist_ok=True)
            return True
        for folder in (self.data, self.work):
            shutil.rmtree(folder, ignore_errors=True)
        (self.work / "temporary").mkdir(parents=True)
        (self.work / "parts").mkdir()
        self.data.mkdir()
        write_json(self.plan_file, plan)
        return False

    def num_finished(self) -> int:
        return sum(1 for _ in (self.work / "parts").glob("*.json"))

    def finish(self, plan: dict[str, Any], headers: dict[str, Header]) -> Prepared:
        for split, header in headers.items():
            (self.data / split).mkdir(exist_ok=True)
            write_json(self.data / split / HEADER_FILE, header.as_dict())
        write_json(self.data / MANIFEST_FILE, plan)
        if self.out.is_dir() and not any(self.out.iterdir()):
            self.out.rmdir()
        move(self.data, self.out)
        shutil.rmtree(self.root, ignore_errors=True)
        return _prepared(self.out, headers, was_there=False)

    def remove(self) -> None:
        """Leave nothing behind, not even folders made on the way."""
        shutil.rmtree(self.root, ignore_errors=True)
        for folder in self._made[1:]:
            try:
                folder.rmdir()
            except OSError:
                return


def _check(request: PrepareRequest, num_workers: int) -> None:
    check_fraction(request.valid_fraction)
    if num_workers < 1:
        raise ConfigError(f"num_workers={num_workers} does no work; use 1 or more.")
    if not request.sources:
        raise ConfigError("no text was named; give --text, --builtin, --dataset or a recipe with a source.")
    if request.tokenizer in TRAINED_TOKENIZERS and "train" not in request.sources:
        raise ConfigError(
            f"tokenizer={request.tokenizer} is trained on train text and there is none; name a tokenizer."
        )
    if request.out.is_file():
        raise ConfigError(f"out={request.out} is a file; name a folder.")


def _plan(request: PrepareRequest) -> dict[str, Any]:
    """What decides the result, as JSON: equal plans give equal bytes."""
    trained = request.tokenizer in TRAINED_TOKENIZERS
    tokenizer = (
        {"train": request.tokenizer, "vocab_size": request.vocab_size, "sample_bytes": request.tokenizer_sample_bytes}
        if trained
        else {"fingerprint": open_tokenizer(request.tokenizer).fingerprint}
    )
    return {
        "format": FORMAT,
        "version": SHARDS_VERSION,
        "sources": {split: source.identity() for split, source in request.sources.items()},
        "tokenizer": tokenizer,
        "valid_fraction": request.valid_fraction if request.holds_out() else 0.0,
        "detokenizer": request.detokenizer,
        "packing": {split: dict(rule) for split, rule in request.packing.items()},
    }


def _find_finished(out: Path, plan: dict[str, Any]) -> Prepared | None:
    if not out.exists() or not any(out.iterdir()):
        return None
    manifest = out / MANIFEST_FILE
    if not manifest.is_file():
        raise ConfigError(f"out={out} holds other files; name a new or empty folder.")
    if not _is_plan(manifest, plan):
        raise ConfigError(f"out={out} was prepared from other text or settings; name a new folder or remove it first.")
    splits = sorted(path.parent.name for path in out.glob(f"*/{HEADER_FILE}"))
    from bd3_megatron.data.shards import read_header

    return _prepared(out, {split: read_header(out / split) for split in splits}, was_there=True)


def _is_plan(path: Path, plan: dict[str, Any]) -> bool:
    written = read_json(path, "remove the folder and prepare the data again")
    return json.dumps(written, sort_keys=True) == json.dumps(json.loads(json.dumps(plan)), sort_keys=True)


def _tokenizer(request: PrepareRequest, work: _WorkFolder, say: Callable[[str], None]) -> Tokenizer:
    """Open the tokenizer of a run that goes on, or make it and save it whole."""
    folder = work.data / "tokenizer"
    if folder.is_dir():
        return load_tokenizer(folder)
    if request.tokenizer in TRAINED_TOKENIZERS:
        from bd3_megatron.data.sentencepiece_model import train_sentencepiece

        say(f"training a {request.tokenizer} vocabulary of {request.vocab_size}")
        fraction = request.valid_fraction if request.holds_out() else 0.0
        texts = sample_documents(
            request.sources["train"], request.tokenizer_sample_bytes, fraction, request.detokenizer
        )
        kind = TRAINED_TOKENIZERS[request.tokenizer]
        tokenizer: Tokenizer = train_sentencepiece(texts, request.vocab_size, model_type=kind)
    else:
        tokenizer = open_tokenizer(request.tokenizer)
    temporary = work.work / "temporary" / "tokenizer"
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer.save(temporary)
    move(temporary, folder)
    return tokenizer


def _make_all(
    request: PrepareRequest, work: _WorkFolder, tasks: list[PartTask], num_workers: int, *, show_progress: bool
) -> list[PartRecord]:
    finished = {task: PartRecord.read(work.work / "parts", task) for task in tasks}
    maker = TokenPartMaker(
        sources=dict(request.sources),
        tokenizer_folder=work.data / "tokenizer",
        data_folder=work.data,
        work_folder=work.work,
        valid_fraction=request.valid_fraction if request.holds_out() else 0.0,
        detokenizer=request.detokenizer,
    )
    rest = [task for task in tasks if finished[task] is None]
    with ProgressBar(sum(task.part.weight for task in tasks), show=show_progress) as bar:
        for record in finished.values():
            if record is not None:
                bar.skip(record.weight)
        for record in make_parts(maker, rest, num_workers, bar.advance):
            finished[record.task] = record
    return [record for task in tasks if (record := finished[task]) is not None]


def _headers(request: PrepareRequest, tokenizer: Tokenizer, records: list[PartRecord]) -> dict[str, Header]:
    """One header a split.

    Raises:
        DataError: a split has no tokens at all.
    """
    splits = [*request.sources, *(["valid"] if request.holds_out() else [])]
    headers = {}
    for split in splits:
        shards = tuple(record.shards[split] for record in records if split in record.shards)
        if not shards:
            raise DataError(_emptiness(request, split, records))
        origin = split if split in request.sources else "train"
        empty = sum(record.num_empty for record in records if record.task.split == split)
        held_out = request.valid_fraction if request.holds_out() else 0.0
        headers[split] = Header(
            dtype=token_dtype(tokenizer.vocab_size).str,
            vocab_size=tokenizer.vocab_size,
            special_ids=tokenizer.special,
            tokenizer_fingerprint=tokenizer.fingerprint,
            shards=shards,
            source=request.sources[origin].describe()
            | {"detokenizer": request.detokenizer, "valid_fraction": held_out},
            num_empty_documents=empty,
            packing=dict(request.packing.get(split, {})),
        )
    return headers


def _emptiness(request: PrepareRequest, split: str, records: list[PartRecord]) -> str:
    documents = sum(shard.num_documents for record in records for shard in record.shards.values())
    if documents == 0:
        return f"the {split} text holds no documents (only white space); give text."
    return (
        f"{documents} documents with valid_fraction={request.valid_fraction} leave none for {split}; give more "
        "documents, cut them smaller (--documents line), or use --valid-fraction 0."
    )


def _prepared(folder: Path, headers: dict[str, Header], *, was_there: bool) -> Prepared:
    return Prepared(
        folder=folder,
        was_there=was_there,
        num_tokens={split: header.num_tokens for split, header in headers.items()},
        num_documents={split: header.num_documents for split, header in headers.items()},
        vocab_size=next(iter(headers.values())).vocab_size,
    )
