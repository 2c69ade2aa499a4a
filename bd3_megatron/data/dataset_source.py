"""Hugging Face `datasets` as a source: local files and folders, saved datasets, hub names, streams.

Decides: a local file is read by its suffix (.jsonl, .json, .parquet, .arrow, .csv, .tsv, .txt, also .gz and .zst); a
folder is what `load_from_disk` or `load_dataset` makes of it; anything else is a hub name. A table is cut every
`rows_per_part` rows; a stream into its own shards (files), one part each, because rows of a stream cannot be addressed.
Filters are data, not code: one column, one comparison.
Refuses: names that do not resolve, unknown splits and columns (naming those there are), columns that hold no text.
Costs: `datasets` writes an Arrow copy of local text-like files to its cache; `streaming` avoids that.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bd3_megatron.config.schema import FilterConfig
from bd3_megatron.data.sources import Part
from bd3_megatron.errors import ConfigError, DataError, either

_BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
}
_COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
_COMPARISONS = ("equals", "one_of", "at_least", "at_most", "matches")


@dataclass(frozen=True, kw_only=True)
class RowFilter(FilterConfig):
    """Keep rows whose column passes every comparison given."""

    def __post_init__(self) -> None:
        if all(getattr(self, name) is None for name in _COMPARISONS):
            raise ConfigError(f"filter on {self.column} compares nothing; give {either(_COMPARISONS)}.")
        if self.matches is not None:
            try:
                re.compile(self.matches)
            except re.error as error:
                raise ConfigError(
                    f"filter pattern {self.matches!r} is no regular expression ({error}); mend it."
                ) from error

    def keeps(self, row: Mapping[str, Any]) -> bool:
        value = row[self.column]
        size = len(value) if isinstance(value, str) else value
        return (
            (self.equals is None or value == self.equals)
            and (self.one_of is None or value in self.one_of)
            and (self.at_least is None or (size is not None and size >= self.at_least))
            and (self.at_most is None or (size is not None and size <= self.at_most))
            and (self.matches is None or re.search(self.matches, str(value)) is not None)
        )


@dataclass(frozen=True, kw_only=True)
class HubDataset:
    """One split and column of a dataset."""

    path: str
    """Local file or folder, or hub name."""
    name: str | None = None
    """Configuration of the dataset, where it has several."""
    split: str = "train"
    """Split, with datasets' slicing: train[:-100000]."""
    column: str = "text"
    filters: tuple[RowFilter, ...] = ()
    streaming: bool = False
    data_files: str | None = None
    """Pattern of files inside the dataset."""
    revision: str | None = None
    rows_per_part: int = 4096
    _opened: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.rows_per_part < 1:
            raise ConfigError(f"rows_per_part={self.rows_per_part} is empty; use 1 or more.")

    def parts(self) -> list[Part]:
        dataset = self.open()
        self._check_columns(dataset)
        if self.streaming:
            return [Part(number=n) for n in range(dataset.num_shards)]
        rows = len(dataset)
        if rows == 0:
            raise DataError(f"dataset {self.path} has no rows in split {self.split}; name another split.")
        cuts = [*range(0, rows, self.rows_per_part), rows]
        return [
            Part(number=n, start=start, stop=stop, weight=stop - start)
            for n, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False))
        ]

    def documents(self, part: Part) -> Iterator[str]:
        for row in self._rows(part):
            if all(check.keeps(row) for check in self.filters):
                text = row[self.column]
                if not isinstance(text, str):
                    raise DataError(
                        f"column {self.column} of {self.path} holds {type(text).__name__}, not text; "
                        "name another column or filter such rows out."
                    )
                yield text

    def describe(self) -> dict[str, Any]:
        stated = asdict(self)
        del stated["_opened"]
        return {"kind": "dataset", **stated}

    def identity(self) -> dict[str, Any]:
        files = self._file_identity() or getattr(self.open(), "_fingerprint", None)
        return self.describe() | {"identity": files}

    def open(self) -> Any:
        """The dataset, opened once a process.

        Raises:
            DataError: it cannot be opened; the library's own reason is given.
        """
        if "dataset" not in self._opened:
            self._opened["dataset"] = self._load()
        return self._opened["dataset"]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": {}}

    def _load(self) -> Any:
        import datasets

        datasets.disable_progress_bars()
        # The library counts downloads on a server, even for local files; a training node may have no way out.
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
        path = Path(self.path)
        if _looks_local(self.path) and not path.exists():
            raise DataError(f"dataset {self.path} does not exist; give a file, a folder or a hub name.")
        if path.suffix == ".zst" and importlib.util.find_spec("zstandard") is None:
            raise DataError(f"dataset {self.path} is compressed by zstd; pip install zstandard, or unpack it.")
        try:
            if path.is_dir() and ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()):
                return _saved(path, self.split)
            options: dict[str, Any] = {"split": self.split, "streaming": self.streaming}
            if path.is_file():
                return datasets.load_dataset(_builder(path), data_files=self.path, **_csv_options(path), **options)
            extra = {"data_files": self.data_files, "revision": self.revision}
            given = {key: value for key, value in extra.items() if value is not None}
            return datasets.load_dataset(self.path, self.name, **given, **options)
        except DataError:
            raise
        except Exception as error:  # builders, the hub client and Arrow raise errors of many kinds
            raise DataError(
                f"dataset {self.path} (split {self.split}) cannot be opened ({_first_line(error)}); "
                "check path, name, split and data files."
            ) from error

    def _rows(self, part: Part) -> Iterator[Mapping[str, Any]]:
        dataset = self.open()
        if self.streaming:
            return iter(dataset.shard(num_shards=dataset.num_shards, index=part.number))
        return iter(dataset.select(range(part.start, part.stop)))

    def _check_columns(self, dataset: Any) -> None:
        columns = dataset.column_names
        if columns is None:  # a stream whose schema is not known before its first row
            columns = list(next(iter(dataset), {}))
        for column in (self.column, *(check.column for check in self.filters)):
            if column not in columns:
                raise DataError(f"dataset {self.path} has no column {column}; it has {', '.join(columns)}.")

    def _file_identity(self) -> str | None:
        """Names, sizes and times of local files; the library's own fingerprint changes with its version."""
        path = Path(self.path)
        if not path.exists():
            return None
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        stated = [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
        return hashlib.sha256(json.dumps(stated).encode()).hexdigest()


def _saved(path: Path, split: str) -> Any:
    """A dataset written by save_to_disk: one table (then called train), or a folder of splits; sliced as asked."""
    import datasets

    opened = datasets.load_from_disk(str(path))
    tables = dict(opened) if isinstance(opened, datasets.DatasetDict) else {"train": opened}
    name = split.split("[", 1)[0]
    if name not in tables:
        raise DataError(f"dataset {path} has no split {name}; it has {', '.join(tables)}.")
    sizes = {key: len(table) for key, table in tables.items()}
    (piece,) = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    return tables[name].select(range(piece.from_ or 0, sizes[name] if piece.to is None else piece.to))


def _builder(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    builder = _BUILDERS.get(suffixes[-1]) if suffixes else None
    if builder is None:
        raise DataError(f"dataset file {path} has no known suffix; use {either(_BUILDERS)}, plain or compressed.")
    return builder


def _csv_options(path: Path) -> dict[str, str]:
    return {"sep": "\t"} if ".tsv" in path.suffixes else {}


def _looks_local(name: str) -> bool:
    return name.startswith((".", os.sep, "~")) or Path(name).suffix in (*_BUILDERS, *_COMPRESSIONS)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
