"""Rows of JSON-lines and CSV files, one by one, so that a row that is wrong is one row and costs no other.

Contract: the library's table or stream holds a row as it is written; `decoded` gives its columns when it is used. Columns
that nobody reads may hold any mixture of types, as those of many corpora do.
Refuses: rows that are no JSON object or have another number of fields than the header; their reason follows the row's name.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from bd3_megatron.data.text_reading import BOM, COMPRESSIONS, open_unpacked, reading
from bd3_megatron.errors import DataError, counted
from bd3_megatron.files import json_record

# Names of the only column of such a table. They are sentences, which no column of a corpus is called.
_LINE = "a line of a JSON-lines file"
_FIELDS = "the fields of a row of a CSV file"
_ROWS_LOOKED_AT = 1000
_INTEGER = re.compile(r"[-+]?\d{1,18}")
_FRACTION = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,3})?")
_LINE_SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read."""

    reason: str
    """What is wrong, to follow the row's name in a sentence."""


def line_options(builder: Any) -> dict[str, Any] | None:
    """Arguments of load_dataset that read a JSON dataset by its lines; None where it is another kind of dataset.

    Args:
        builder: the library's, of the dataset as it was named.
    """
    import datasets
    from datasets.packaged_modules.json.json import Json

    files = builder.config.data_files
    if not isinstance(builder, Json) or builder.config.field is not None:
        return None
    if not all(_holds_lines(path) for paths in files.values() for path in paths):
        return None
    return {
        "path": "text",
        "data_files": {str(split): list(paths) for split, paths in files.items()},
        "features": datasets.Features({_LINE: datasets.Value("string")}),
        # A byte that is not UTF-8 becomes "\xff", which no JSON text may hold: the row is bad and the file is read on.
        "encoding_errors": "backslashreplace",
    }


def csv_rows(builder: Any, split: str, *, streaming: bool) -> Any | None:
    """One split of local CSV files as the library's table or stream; None where it is another kind of dataset.

    Args:
        builder: the library's, of the dataset as it was named.
        split: its name, without a slice.
        streaming: a stream, a shard a file.
    """
    import datasets
    from datasets.packaged_modules.csv.csv import Csv

    files = [str(path) for path in (builder.config.data_files or {}).get(split, [])]
    if not isinstance(builder, Csv) or not files or not all(Path(path).is_file() for path in files):
        return None
    made: dict[str, Any] = {
        "features": datasets.Features({_FIELDS: datasets.Value("string")}),
        # Size and time, because the library keeps what it made of the same arguments; a list is dealt to shards.
        "gen_kwargs": {"files": [(path, *_stamp(path)) for path in files], "separator": builder.config.sep},
    }
    kind = datasets.IterableDataset if streaming else datasets.Dataset
    return kind.from_generator(_csv_rows, **made)


def decoded(row: Mapping[str, Any], text_columns: Sequence[str] = ()) -> Mapping[str, Any] | BadRow | None:
    """A row by column, whatever it was read from; None for a blank line.

    Args:
        row: as the library gives it.
        text_columns: stay text in CSV files, whose other cells are numbers where they read as one.
    """
    if _LINE in row:
        # Files that were joined have a mark at the head of each.
        line = row[_LINE].removeprefix("\ufeff").strip()
        if not line:
            return None
        columns = json_record(line)
        return BadRow("is no JSON object") if columns is None else columns
    if _FIELDS in row:
        fields = json.loads(row[_FIELDS])
        if not isinstance(fields, dict):
            return BadRow(fields)
        return {name: cell if name in text_columns else _value(cell) for name, cell in fields.items()}
    return row


def sampled_rows(rows: Iterator[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The first rows that can be read, for the names of their columns."""
    for row in islice(rows, _ROWS_LOOKED_AT):
        columns = decoded(row)
        if isinstance(columns, Mapping):
            yield columns


def is_decoded_later(features: Mapping[str, Any] | None) -> bool:
    """Whether the columns are known only when rows are read: of rows kept as written, and of some streams."""
    return features is None or _LINE in features or _FIELDS in features


def _holds_lines(path: str) -> bool:
    name = Path(path)
    suffix = name.with_suffix("").suffix if name.suffix.lower() in COMPRESSIONS else name.suffix
    if suffix.lower() in _LINE_SUFFIXES:
        return True
    # .json may be one array or object over many lines, which only the library reads; elsewhere it cannot be looked at.
    if not name.is_file():
        return False
    with reading(path), open_unpacked(path) as file:
        return json_record(file.readline().removeprefix(BOM)) is not None


def _stamp(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def _csv_rows(files: Sequence[tuple[str, int, int]], separator: str) -> Iterator[dict[str, str]]:
    # The default of 128 KiB is less than many documents; the csv module has one limit for the whole process.
    csv.field_size_limit(sys.maxsize)
    for path, _, _ in files:
        with reading(path), open_unpacked(path) as file:
            # Undecodable bytes become surrogates, which mark their row and no other.
            lines = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
            yield from _csv_file(path, csv.reader(lines, delimiter=separator, strict=True))


def _csv_file(path: str, reader: Any) -> Iterator[dict[str, str]]:
    header: list[str] | None = None
    number = 0
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # All that follows an open quotation mark is inside it: no row can be told from the next any more.
            if header is None or "unexpected end" in str(error):
                raise DataError(
                    f"row {number} of {path} or its header has a quotation mark that nothing closes; mend the file."
                ) from error
            content: dict[str, Any] | str = f"is no CSV ({error})"
        else:
            # A blank line is no row.
            if not fields:
                continue
            if header is None:
                header = fields
                continue
            content = _cells(header, fields)
        yield {_FIELDS: json.dumps(content)}
        number += 1


def _cells(header: Sequence[str], fields: Sequence[str]) -> dict[str, Any] | str:
    if len(fields) != len(header):
        return f"has {counted(len(fields), 'field')} and the header names {counted(len(header), 'column')}"
    if any("\udc80" <= letter <= "\udcff" for field in fields if not field.isascii() for letter in field):
        return "is not UTF-8"
    # An empty cell holds nothing, as it does in the library's own tables.
    return {name: field or None for name, field in zip(header, fields, strict=True)}


def _value(cell: str | None) -> Any:
    """A cell as filters compare it: a number, a truth value, nothing, or its text."""
    stripped = (cell or "").strip()
    if stripped.lower() in ("true", "false"):
        return stripped.lower() == "true"
    if _INTEGER.fullmatch(stripped):
        return int(stripped)
    return float(stripped) if _FRACTION.fullmatch(stripped) else cell
