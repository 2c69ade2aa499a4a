"""Hugging Face `datasets` as a source: local files and folders, saved datasets, hub names, streams.

Contract: a table is cut every `rows_per_part` rows, a stream is one part a file, text files are cut as text_files says.
Refuses: unknown columns (naming those there are). Rows without text are named.
Costs: `datasets` writes an Arrow copy of local text-like files to its cache; `streaming` avoids that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any

from bd3_megatron.data.dataset_open import (
    TEXT_COLUMN,
    NamedDataset,
    files_of,
    first_line,
    open_dataset,
    stream_of,
    text_files,
)
from bd3_megatron.data.dataset_rows import BadRow, decoded, is_decoded_later, sampled_rows
from bd3_megatron.data.dialogue import chat_of, pair_of
from bd3_megatron.data.row_filter import cell, columns_of, keeps
from bd3_megatron.data.source import BadDocument, Dialogue, Documents, Part
from bd3_megatron.data.text_files import TextFiles
from bd3_megatron.errors import BD3Error, ConfigError, DataError

# Wide tables would make the message longer than a terminal.
_COLUMNS_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class HubDataset(NamedDataset):
    """One split and column of a dataset, as documents."""

    _opened: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        pair = [name for name in ("prompt_column", "answer_column") if getattr(self, name) is not None]
        if len(pair) == 1:
            raise ConfigError(
                f"{pair[0]}={getattr(self, pair[0])} stands alone; give both prompt_column and answer_column, or neither."
            )
        named = [
            *(["messages"] if self.messages is not None else []),
            *(["prompt_column with answer_column"] if pair else []),
        ]
        # with two of them it would be the order of the code that decides which text is used
        if named and (len(named) == 2 or self.column != TEXT_COLUMN):
            both = " and ".join(named if len(named) == 2 else [f"column={self.column}", *named])
            raise ConfigError(
                f"{both} each say where the text stands; use messages for chats, prompt_column with answer_column for pairs, "
                "or column for plain text."
            )

    @property
    def answers_only(self) -> bool:
        return self.messages is not None or self.answer_column is not None

    @property
    def needs_template(self) -> bool:
        return self.messages is not None

    def parts(self) -> list[Part]:
        self.check_columns()
        text = self._text()
        if text is not None:
            return text.parts()
        dataset = self.open()
        if self.streaming:
            # Rows of a stream cannot be addressed, so its parts are its files.
            return [Part(number=n, items=(f"file {n}",)) for n in range(dataset.num_shards)]
        rows = len(dataset)
        if rows == 0:
            raise DataError(f"dataset {self.path} has no rows in split {self.split}; name another split.")
        # Cuts depend on the table only, never on the number of workers.
        cuts = [*range(0, rows, self.rows_per_part), rows]
        return [
            Part(number=n, start=start, stop=stop, weight=stop - start)
            for n, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False))
        ]

    def documents(self, part: Part) -> Documents:
        text = self._text()
        if text is not None:
            yield from self._text_documents(text, part)
            return
        for number, row in self._rows(part):
            document = self.document(row, lambda number=number: self._where(part, number))  # type: ignore[misc]
            if document is not None:
                yield document

    def document(self, row: Mapping[str, Any], where: Callable[[], str]) -> str | Dialogue | BadDocument | None:
        """What a row holds, in turns where only answers are predicted; None where a filter leaves it out, or for a blank line.

        Args:
            row: as the opened dataset gives it.
            where: names the row for a sentence; called only where there is one to write.
        """
        columns = decoded(row, self._text_columns())
        if columns is None:
            return None
        if isinstance(columns, BadRow):
            return BadDocument(where=where(), reason=columns.reason, remedy="mend the row")
        try:
            # Filters go first: a row that is filtered out may lack its text.
            if not all(keeps(check, columns) for check in self.filters):
                return None
        except DataError as error:
            # Types may differ from row to row, so a value without an order is one row's and not the column's.
            reason = f"cannot be filtered: {str(error).rstrip('.')}"
            return BadDocument(where=where(), reason=reason, remedy="mend the row")
        if self.answers_only:
            return self._dialogue(columns, where())
        text = cell(columns, self.column)
        if isinstance(text, str):
            if _is_encodable(text):
                return text
            return BadDocument(where=where(), reason="holds half a surrogate pair", remedy="mend the row's escapes")
        # A null is not an empty text: it mostly means a wrong column, so it counts as a bad document.
        kind = "nothing (null)" if text is None else f"no text but {type(text).__name__}"
        return BadDocument(
            where=where(),
            reason=f"holds {kind} in column {self.column}",
            remedy=f"mend the row, name another column, filter on it (column: {self.column}, at_least: 1)",
        )

    def check_columns(self) -> None:
        """Refuse columns that are not there.

        Raises:
            DataError: names those there are.
        """
        dataset = self.open()
        features = getattr(dataset, "features", None)
        seen: list[Mapping[str, Any]] = [features or {}]
        if is_decoded_later(features):
            rows = (row for _, row in _guarded(iter(dataset), 0, lambda number: f"row {number} of {self.path}"))
            first = next(rows, None)
            seen = [] if first is None else list(sampled_rows(chain([first], rows)))
            # Which columns there are, bad rows do not tell; they are named one by one when they are read.
            if first is not None and not seen:
                return
        columns = list(dict.fromkeys(name for one in seen for name in columns_of(one)))
        if not columns:
            raise DataError(f"dataset {self.path} has no rows in split {self.split}; name another split.")
        for column in (*self._text_columns(), *(check.column for check in self.filters)):
            if column not in columns:
                more = ", ..." if len(columns) > _COLUMNS_SHOWN else ""
                raise DataError(
                    f"dataset {self.path} has no column {column}; it has {', '.join(columns[:_COLUMNS_SHOWN])}{more}."
                )

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """Every row by column, unfiltered.

        Raises:
            DataError: names the first that cannot be read.
        """
        for number, row in _guarded(iter(self.open()), 0, lambda number: f"row {number} of {self.path}"):
            columns = decoded(row)
            if isinstance(columns, BadRow):
                raise DataError(f"row {number} of {self.path} {columns.reason}; mend the row.")
            if columns is not None:
                yield columns

    def settings(self) -> dict[str, Any]:
        # `compare` leaves out the cache of opened objects, which is no setting.
        stated = {one.name: getattr(self, one.name) for one in fields(self) if one.compare}
        # where none is named a folder's settings are those of releases that knew no answers
        of_answers = ("messages", "prompt_column", "answer_column")
        stated = {name: value for name, value in stated.items() if value is not None or name not in of_answers}
        return {"kind": "dataset", **stated, "filters": [asdict(check) for check in self.filters]}

    def describe(self) -> dict[str, Any]:
        return self.settings()

    def identity(self) -> dict[str, Any]:
        return self.settings() | {"identity": self._identity()}

    def stamp(self, part: Part) -> str:
        # Rows of a table cannot be stamped one part at a time: a change anywhere changes the stamp of all parts.
        return str(self._identity())

    def open(self) -> Any:
        """The library's dataset, opened once a process; text files open as a stream.

        Raises:
            DataError: it cannot be opened; the library's own reason is given.
        """
        # Opening a dataset with thousands of files may take seconds, and every part asks for it.
        if "dataset" not in self._opened:
            text = self._text()
            self._opened["dataset"] = open_dataset(self) if text is None else stream_of(text)
        return self._opened["dataset"]

    # Opened datasets hold memory maps and locks; each worker opens its own.
    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": {}}

    def _dialogue(self, columns: Mapping[str, Any], where: str) -> Dialogue | BadDocument:
        if self.messages is not None:
            found = chat_of(cell(columns, self.messages), where)
        else:
            assert self.prompt_column is not None and self.answer_column is not None  # __post_init__
            pair = (self.prompt_column, self.answer_column)
            found = pair_of(cell(columns, pair[0]), cell(columns, pair[1]), pair, where)
        if isinstance(found, Dialogue) and not _is_encodable(found.as_json()):
            return BadDocument(where=where, reason="holds half a surrogate pair", remedy="mend the row's escapes")
        return found

    def _text_columns(self) -> tuple[str, ...]:
        named = tuple(c for c in (self.messages, self.prompt_column, self.answer_column) if c is not None)
        return named or (self.column,)

    def _text(self) -> TextFiles | None:
        if "text" not in self._opened:
            self._opened["text"] = text_files(self)
        found: TextFiles | None = self._opened["text"]
        return found

    def _file_of(self, shard: int) -> str:
        if "files" not in self._opened:
            self._opened["files"] = files_of(self, self.open().num_shards)
        files = self._opened["files"]
        return f"file {shard} of {self.path}" if files is None else str(files[shard])

    def _text_documents(self, text: TextFiles, part: Part) -> Documents:
        for document in text.documents(part):
            if isinstance(document, BadDocument):
                yield document
            # Filters may name the text column of plain files too.
            elif self.document({TEXT_COLUMN: document}, lambda: self.path) is not None:
                yield document

    def _rows(self, part: Part) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """(number, row) of a part; of a table the row's own number, of a stream its number in the file."""
        dataset = self.open()
        if self.streaming:
            first, chosen = 0, dataset.shard(num_shards=dataset.num_shards, index=part.number)
        else:
            first, chosen = part.start, dataset.select(range(part.start, part.stop))
        return _guarded(iter(chosen), first, lambda number: self._where(part, number))

    def _where(self, part: Part, row: int) -> str:
        if self.streaming:
            return f"row {row} of {self._file_of(part.number)}"
        return f"row {row} of {self.path}" + ("" if Path(self.path).is_file() else f" (split {self.split})")

    def _identity(self) -> str | None:
        if "identity" not in self._opened:
            self._opened["identity"] = self._file_identity() or getattr(self.open(), "_fingerprint", None)
        found: str | None = self._opened["identity"]
        return found

    def _file_identity(self) -> str | None:
        """Names, sizes and times of local files; the library's own fingerprint changes with its version."""
        path = Path(self.path)
        if not path.exists():
            return None
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        stated = [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
        return hashlib.sha256(json.dumps(stated).encode()).hexdigest()


def _is_encodable(text: str) -> bool:
    # "\\ud800" alone is an escape that JSON readers let pass, and no tokenizer takes.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _guarded(
    rows: Iterator[Mapping[str, Any]], first: int, where: Callable[[int], str]
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows with their numbers; what the library raises while it reads becomes a sentence that names the row."""
    number = first - 1
    try:
        for number, row in enumerate(rows, first):
            yield number, row
    # Our own refusals carry their remedy and pass through unchanged.
    except BD3Error:
        raise
    except Exception as error:  # parsers raise errors of many kinds
        raise DataError(
            f"{where(number + 1)} cannot be read ({first_line(error)}); mend or remove the file."
        ) from error
