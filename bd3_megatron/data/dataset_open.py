"""Opening what Hugging Face's `datasets` reads: files by suffix, folders, saved datasets, hub names, streams of text.

Contract: text files give the same documents as a stream, as a dataset and by `--text`: paragraphs, read by text_files.
Refuses: names that do not resolve and unknown splits; the library's own reason is given.
"""

from __future__ import annotations

import glob
import importlib.util
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bd3_megatron.config.data import TableOptions
from bd3_megatron.data.dataset_rows import csv_rows, line_options
from bd3_megatron.data.text_files import TEXT_SUFFIXES, TextFiles, is_text_file
from bd3_megatron.data.text_reading import COMPRESSIONS
from bd3_megatron.errors import BD3Error, DataError, either

TEXT_COLUMN = "text"
"""Column of a dataset that is made of text files."""
# Builders of the library by suffix. Plain text is missing on purpose: the library's text builder makes a row of every
# line, which is no document.
_BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
}


@dataclass(frozen=True, kw_only=True)
class NamedDataset(TableOptions):
    """A dataset by its name, and what is read of it."""

    path: str
    """Local file or folder, or hub name."""


def open_dataset(wanted: NamedDataset) -> Any:
    """The library's dataset; its rows are used by dataset_rows.decoded.

    Raises:
        DataError: it cannot be opened.
    """
    import datasets

    datasets.disable_progress_bars()
    # It writes what it raises to stderr as well, in words of Arrow or pandas.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    # The library counts downloads on a server, even for local files; a training node may have no way out.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    path = Path(wanted.path)
    _check_reachable(wanted.path)
    try:
        # load_dataset does not read folders that save_to_disk wrote.
        if path.is_dir() and ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()):
            return _saved(path, wanted.split, streaming=wanted.streaming)
        return _loaded(wanted)
    except Exception as error:  # builders, the hub client and Arrow raise errors of many kinds
        # Our own generators raise inside of the library, which wraps what it meets.
        own = next((cause for cause in _causes(error) if isinstance(cause, BD3Error)), None)
        if own is not None:
            raise own from error
        raise DataError(
            f"dataset {wanted.path} (split {wanted.split}) cannot be opened ({first_line(error)}); "
            "check path, name, split and data files."
        ) from error


def text_files(wanted: NamedDataset) -> TextFiles | None:
    """The text files that a dataset consists of; None where it is another kind of dataset.

    Raises:
        DataError: a part of them was asked for: text files have no splits.
    """
    path = Path(wanted.path)
    chosen: tuple[str, ...] = (wanted.path,)
    if path.is_dir():
        inside = _inside(path, wanted.data_files)
        listed = [found for found in inside if found.is_file() and not found.name.startswith(".")]
        # README and LICENSE files lie beside datasets of every kind.
        if not listed or any(_builder_of(found) for found in listed) or not any(map(is_text_file, listed)):
            return None
        # A saved dataset or a loading script: the texts beside it are its documentation.
        if any(found.suffix == ".arrow" or found.suffix == ".py" for found in listed):
            return None
        if wanted.data_files is not None:
            chosen = tuple(str(found) for found in listed if is_text_file(found))
    elif not is_text_file(path):
        return None
    if wanted.split != "train":
        raise DataError(f"dataset {wanted.path} is made of text files, which have no split {wanted.split}; use train.")
    return TextFiles(paths=chosen)


def stream_of(source: TextFiles) -> Any:
    """Text files as the library's stream, a shard a file, which it can interrupt and resume."""
    import datasets

    # Large files have several parts, but a shard of the stream is a whole file.
    files = list(dict.fromkeys(path for part in source.parts() for path in part.items))
    return datasets.IterableDataset.from_generator(
        _rows_of, gen_kwargs={"files": files}, features=datasets.Features({TEXT_COLUMN: datasets.Value("string")})
    )


def files_of(wanted: NamedDataset, num_shards: int) -> list[str] | None:
    """The files of a stream in order, for sentences; None where the library does not tell."""
    import datasets

    try:
        names, options = _loading(wanted)
        files = list(datasets.load_dataset_builder(*names, **options).config.data_files[wanted.split])
    except Exception:  # a sentence is being written, and nothing may come between
        return None
    return [str(file) for file in files] if len(files) == num_shards else None


def first_line(error: BaseException) -> str:
    """The beginning of another library's error message."""
    # The library says that something failed, and what it was is the error below.
    error = next((cause for cause in _causes(error) if "error occurred while generating" not in str(cause)), error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Messages of other libraries may be pages long; their first line holds the reason as a rule.
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:300]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _inside(folder: Path, data_files: str | None) -> list[Path]:
    """What lies in a folder at any depth, or what the pattern finds below it."""
    if data_files is None:
        return list(folder.rglob("*"))
    # glob's own syntax, as in the library: its patterns may begin with "/", which pathlib refuses
    pattern = os.path.join(glob.escape(str(folder)), data_files)
    return sorted(map(Path, glob.glob(pattern, recursive=True)))


def _rows_of(files: list[str]) -> Iterator[dict[str, str]]:
    source = TextFiles(paths=tuple(files))
    for part in source.parts():
        for document in source.documents(part):
            if not isinstance(document, str):
                # A stream has no count of bad documents that may be left out, so the first one ends it.
                raise DataError(f"{document.where} {document.reason}; {document.remedy}.")
            yield {TEXT_COLUMN: document}


def _check_reachable(name: str) -> None:
    path = Path(name)
    # Without this check a mistyped path is looked up on the hub, and the error speaks of the network.
    looks_local = name.startswith((".", os.sep, "~")) or path.suffix in (*_BUILDERS, *TEXT_SUFFIXES, *COMPRESSIONS)
    if looks_local and not path.exists():
        raise DataError(f"dataset {name} does not exist; give a file, a folder or a hub name.")
    if path.suffix == ".zst" and importlib.util.find_spec("zstandard") is None:
        raise DataError(f"dataset {name} is compressed by zstd; pip install zstandard, or unpack it.")


def _loading(wanted: NamedDataset) -> tuple[tuple[str | None, ...], dict[str, Any]]:
    """Positional and named arguments of load_dataset."""
    path = Path(wanted.path)
    if not path.is_file():
        extra = {"data_files": wanted.data_files, "revision": wanted.revision}
        return (wanted.path, wanted.name), {key: value for key, value in extra.items() if value is not None}
    builder = _builder_of(path)
    if builder is None:
        known = either((*_BUILDERS, *TEXT_SUFFIXES))
        raise DataError(f"dataset file {path} has no known suffix; use {known}, plain or compressed.")
    # The csv builder does not guess the separator.
    separator = {"sep": "\t"} if ".tsv" in path.suffixes else {}
    return (builder,), {"data_files": wanted.path} | separator


def _builder_of(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return _BUILDERS.get(suffixes[-1]) if suffixes else None


def _loaded(wanted: NamedDataset) -> Any:
    """What load_dataset gives, but rows of JSON-lines and CSV files as they are written."""
    import datasets

    names, options = _loading(wanted)
    builder = datasets.load_dataset_builder(*names, **options)
    split, streaming = wanted.split, wanted.streaming
    lines = line_options(builder)
    if lines is not None:
        return datasets.load_dataset(**lines, split=split, streaming=streaming)
    # A stream has no slices, and the library says so.
    name = split if streaming else split.split("[", 1)[0]
    rows = csv_rows(builder, name, streaming=streaming)
    if rows is not None:
        return rows if streaming else _sliced({name: rows}, name, split)
    return datasets.load_dataset(*names, **options, split=split, streaming=streaming)


def _saved(path: Path, split: str, *, streaming: bool) -> Any:
    """A dataset written by save_to_disk: one table (then called train), or a folder of splits; sliced as asked."""
    import datasets

    opened = datasets.load_from_disk(str(path))
    tables = dict(opened) if isinstance(opened, datasets.DatasetDict) else {"train": opened}
    name = split.split("[", 1)[0]
    if name not in tables:
        raise DataError(f"dataset {path} has no split {name}; it has {', '.join(tables)}.")
    chosen = _sliced(tables, name, split)
    if not streaming:
        return chosen
    # A saved table is a table; as a stream it has as many files as it was saved in.
    return chosen.to_iterable_dataset(num_shards=max(1, min(len(tables[name].cache_files), len(chosen))))


def _sliced(tables: Mapping[str, Any], name: str, split: str) -> Any:
    import datasets

    sizes = {key: len(table) for key, table in tables.items()}
    # Opened tables know no slices; the library's own rule is applied to them.
    (piece,) = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    return tables[name].select(range(piece.from_ or 0, sizes[name] if piece.to is None else piece.to))
