"""One part of a source to tokens: documents read, cleaned, encoded in small batches, split and written.

Decides: white space alone is no document; documents of a part keep their order; which are held out is decided by place.
A record, written last, says that the part is complete.
Costs: at most about a megabyte of text is inside the tokenizer at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from bd3_megatron.data.detokenizers import Rule, apply_rules, detokenizer
from bd3_megatron.data.held_out import is_held_out, placed
from bd3_megatron.data.part_pool import Progress, Report
from bd3_megatron.data.shards import ShardRecord, ShardWriter, token_dtype
from bd3_megatron.data.sources import Part, Source
from bd3_megatron.data.tokenizer import Tokenizer
from bd3_megatron.data.tokenizer_open import load_tokenizer
from bd3_megatron.errors import WorkStopped
from bd3_megatron.files import disk_errors, read_json, write_json

_BATCH_CHARACTERS = 1 << 20
_DISK_REMEDY = "make room or choose another --out, and run the same command again: finished parts are kept"


@dataclass(frozen=True, kw_only=True)
class PartTask:
    """One part of one split's source."""

    split: str
    part: Part

    @property
    def stem(self) -> str:
        return f"part-{self.part.number:05d}"


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """What became of a part."""

    task: PartTask
    shards: dict[str, ShardRecord]
    """By split; a split without documents is absent."""
    num_empty: int
    weight: int

    @staticmethod
    def read(folder: Path, task: PartTask) -> PartRecord | None:
        """The record of a finished part, or None."""
        path = _record_path(folder, task)
        if not path.is_file():
            return None
        content = read_json(path, "remove the .partial folder and prepare the data again")
        shards = {split: ShardRecord(**shard) for split, shard in content["shards"].items()}
        return PartRecord(task=task, shards=shards, num_empty=content["num_empty"], weight=task.part.weight)

    def write(self, folder: Path) -> None:
        shards = {split: asdict(shard) for split, shard in self.shards.items()}
        write_json(_record_path(folder, self.task), {"shards": shards, "num_empty": self.num_empty})


@dataclass(kw_only=True)
class TokenPartMaker:
    """Makes parts; one instance in each worker."""

    sources: Mapping[str, Source]
    tokenizer_folder: Path
    data_folder: Path
    work_folder: Path
    valid_fraction: float
    detokenizer: str
    _tokenizer: Tokenizer | None = None
    _rules: tuple[Rule, ...] = ()

    def open(self) -> None:
        self._tokenizer = load_tokenizer(self.tokenizer_folder)
        self._rules = detokenizer(self.detokenizer)

    def make(self, task: PartTask, report: Report) -> PartRecord:
        """Tokenise one part and write its shards and record.

        Raises:
            DataError: bad text.
            WorkStopped: the disk's own reason.
        """
        doing = f"writing {task.stem} of {task.split} in {self.data_folder.parent}"
        with disk_errors(doing, _DISK_REMEDY, kind=WorkStopped):
            writers = self._writers(task)
            try:
                num_empty = self._write(task, writers, report)
                shards = {split: made for split, writer in writers.items() if (made := writer.finish()) is not None}
            except BaseException:
                for writer in writers.values():
                    writer.abandon()
                raise
            record = PartRecord(task=task, shards=shards, num_empty=num_empty, weight=task.part.weight)
            record.write(self.work_folder / "parts")
            return record

    def _writers(self, task: PartTask) -> dict[str, ShardWriter]:
        splits = [task.split]
        if task.split == "train" and self.valid_fraction > 0:
            splits.append("valid")
        dtype = token_dtype(self._opened().vocab_size)
        writers = {}
        for split in splits:
            (self.data_folder / split).mkdir(exist_ok=True)
            writers[split] = ShardWriter(self.data_folder / split / task.stem, self.work_folder / "temporary", dtype)
        return writers

    def _write(self, task: PartTask, writers: dict[str, ShardWriter], report: Report) -> int:
        num_empty = 0
        weight_left = float(task.part.weight)
        for texts in self._batches(task):
            kept = [(place, text) for place, text in texts if place is not None]
            num_empty += len(texts) - len(kept)
            encoded = self._opened().encode_batch([text for _, text in kept])
            for split, writer in writers.items():
                writer.add(
                    [
                        tokens
                        for (place, _), tokens in zip(kept, encoded, strict=True)
                        if self._split_of(task, place) == split and len(tokens)
                    ]
                )
            weight = min(_weight_of(task.part, [text for _, text in texts]), weight_left)
            weight_left -= weight
            report(Progress(documents=len(kept), tokens=sum(map(len, encoded)), weight=weight))
        report(Progress(weight=weight_left))
        return num_empty

    def _opened(self) -> Tokenizer:
        assert self._tokenizer is not None  # open() comes first
        return self._tokenizer

    def _split_of(self, task: PartTask, place: int) -> str:
        if task.split == "train" and is_held_out(task.part.number, place, self.valid_fraction):
            return "valid"
        return task.split

    def _batches(self, task: PartTask) -> Iterator[list[tuple[int | None, str]]]:
        """Cleaned documents with their places, about a megabyte at a time."""
        batch: list[tuple[int | None, str]] = []
        size = 0
        texts = self.sources[task.split].documents(task.part)
        for place, text in placed(apply_rules(self._rules, text) for text in texts):
            batch.append((place, text))
            size += len(text)
            if size >= _BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch


def _weight_of(part: Part, texts: list[str]) -> float:
    """Share of a part's weight that these documents make up; what is left over is reported when the part is done."""
    if not part.stop:
        return 0.0
    # Parts of text weigh bytes, of which characters are a fair measure; parts of a table weigh rows.
    return float(sum(map(len, texts)) if part.items else len(texts))


def _record_path(folder: Path, task: PartTask) -> Path:
    return folder / f"{task.split}-{task.part.number:05d}.json"
