"""Where text comes from: files, folders, the built-in corpus, Hugging Face datasets; cut into parts that workers share.

Decides: a source is a list of parts and a way to read one part's documents. Parts depend on the source alone, never on
the number of workers, so neither does anything made from them. Text files are cut at document starts nearest to multiples
of the part size; datasets every so many rows (or one part per file when streamed).
Documents of a text file: `paragraph` (runs of lines between blank lines, with the blank lines that follow, so that
documents join to the file), `line` (without its end), or `file`.
Refuses: missing, empty or non-UTF-8 files (with the byte), folders without text files.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from bd3_megatron.data.builtin_text import builtin_documents, builtin_items
from bd3_megatron.errors import ConfigError, DataError, either
from bd3_megatron.files import disk_errors, reason_of

DOCUMENT_RULES = ("paragraph", "line", "file")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
BUILTIN_PREFIX = "builtin:"
_SMALLEST_PART_BYTES = 1 << 18
_LARGEST_PART_BYTES = 1 << 24
_PARTS_WANTED = 64
_LOOK_BACK_BYTES = 1 << 16
_BLANK_LINES = re.compile(r"(?:\A|\n)(?:[ \t\r\f\v]*\n)+")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of a source that one worker reads."""

    number: int
    items: tuple[str, ...] = ()
    """Files, modules, or nothing where the source is one table."""
    start: int = 0
    stop: int = 0
    """Bytes of a file or rows of a table."""
    weight: int = 1
    """Work relative to the other parts, for the progress bar."""


class Source(Protocol):
    """Text in parts. Instances travel to worker processes by pickling."""

    def parts(self) -> list[Part]:
        """All parts, in order, numbered from 0."""

    def documents(self, part: Part) -> Iterator[str]:
        """The documents of one part, in order."""

    def describe(self) -> dict[str, Any]:
        """Where the text came from, as JSON, for headers."""

    def identity(self) -> dict[str, Any]:
        """What tells this text from another, as JSON: whether a broken-off run may go on, or is done already."""


@dataclass(frozen=True, kw_only=True)
class TextFiles:
    """Plain UTF-8 text files, and folders of them (every .txt, .text, .md and .rst inside)."""

    paths: tuple[str, ...]
    documents_are: str = "paragraph"
    part_bytes: int | None = None
    """Bytes of a part; None: 1/64 of the text, at least 256 KiB and at most 16 MiB."""

    def __post_init__(self) -> None:
        if self.documents_are not in DOCUMENT_RULES:
            raise ConfigError(f"documents={self.documents_are} is not known; use {either(DOCUMENT_RULES)}.")
        if self.part_bytes is not None and self.part_bytes < 1:
            raise ConfigError(f"part_bytes={self.part_bytes} is empty; use 1 or more.")

    def parts(self) -> list[Part]:
        sizes = [(path, os.path.getsize(path)) for path in self._files()]
        total = sum(size for _, size in sizes)
        wanted = min(max(total // _PARTS_WANTED, _SMALLEST_PART_BYTES), _LARGEST_PART_BYTES)
        part_bytes = self.part_bytes or wanted
        whole = self.documents_are == "file"
        parts = _grouped(sizes, part_bytes) if whole else _cut(sizes, part_bytes)
        return [replace(part, number=number) for number, part in enumerate(parts)]

    def documents(self, part: Part) -> Iterator[str]:
        for path in part.items:
            stop = part.stop if self.documents_are != "file" else os.path.getsize(path)
            text = self._read(path, part.start, stop)
            if self.documents_are == "file":
                yield text
            elif self.documents_are == "line":
                yield from (line.removesuffix("\r") for line in text.split("\n"))
            else:
                yield from split_paragraphs(text)

    def describe(self) -> dict[str, Any]:
        files = [[path, os.path.getsize(path)] for path in self._files()]
        return {"kind": "text", "documents": self.documents_are, "part_bytes": self.part_bytes, "files": files}

    def identity(self) -> dict[str, Any]:
        return self.describe() | {"times": [os.stat(path).st_mtime_ns for path in self._files()]}

    def _files(self) -> list[str]:
        files: list[str] = []
        for name in self.paths:
            path = Path(name)
            if path.is_dir():
                files += _text_files_in(path)
                continue
            if not path.exists():
                raise DataError(f"text file {name} does not exist; give existing UTF-8 files or folders.")
            if path.is_file() and path.stat().st_size == 0:
                raise DataError(f"text file {name} is empty; give files that hold text.")
            files.append(str(path))
        return files

    def _read(self, path: str, start: int, stop: int) -> str:
        if self.documents_are != "file":
            start, stop = (next_document(path, at, self.documents_are) for at in (start, stop))
        with disk_errors(f"reading {path}", "check the file and its permissions"), open(path, "rb") as file:
            file.seek(start)
            content = file.read(stop - start)
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} is not UTF-8 at byte {start + error.start}; convert it (iconv -t UTF-8) or leave it out."
            ) from error


@dataclass(frozen=True, kw_only=True)
class BuiltinText:
    """Text every Python has; see builtin_text."""

    name: str
    items_per_part: int = 40

    def parts(self) -> list[Part]:
        items = builtin_items(self.name)
        groups = [items[i : i + self.items_per_part] for i in range(0, len(items), self.items_per_part)]
        return [Part(number=n, items=tuple(group), weight=len(group)) for n, group in enumerate(groups)]

    def documents(self, part: Part) -> Iterator[str]:
        for item in part.items:
            yield from builtin_documents(item)

    def describe(self) -> dict[str, Any]:
        import platform

        return {"kind": "builtin", "name": self.name, "python": platform.python_version()}

    def identity(self) -> dict[str, Any]:
        return self.describe()


@dataclass(frozen=True, kw_only=True)
class JoinedSources:
    """Several sources one after the other."""

    sources: tuple[Source, ...]

    def parts(self) -> list[Part]:
        joined = [(which, part) for which, source in enumerate(self.sources) for part in source.parts()]
        # The original part goes along as text, because its number means something to its own source only.
        return [
            Part(number=n, items=(str(which), _pack(part)), weight=part.weight)
            for n, (which, part) in enumerate(joined)
        ]

    def documents(self, part: Part) -> Iterator[str]:
        which, packed = part.items
        yield from self.sources[int(which)].documents(_unpack(packed))

    def describe(self) -> dict[str, Any]:
        return {"kind": "joined", "sources": [source.describe() for source in self.sources]}

    def identity(self) -> dict[str, Any]:
        return {"kind": "joined", "sources": [source.identity() for source in self.sources]}


def text_source(names: Sequence[str], *, documents_are: str = "paragraph", part_bytes: int | None = None) -> Source:
    """A source from the names users give: files, folders, and `builtin:NAME`.

    Raises:
        ConfigError: no name at all.
    """
    sources: list[Source] = []
    for name in names:
        if name.startswith(BUILTIN_PREFIX):
            sources.append(BuiltinText(name=name.removeprefix(BUILTIN_PREFIX)))
    paths = tuple(name for name in names if not name.startswith(BUILTIN_PREFIX))
    if paths:
        sources.append(TextFiles(paths=paths, documents_are=documents_are, part_bytes=part_bytes))
    if not sources:
        raise ConfigError("no text was named; give text files, folders or builtin:python-docs.")
    return sources[0] if len(sources) == 1 else JoinedSources(sources=tuple(sources))


def split_paragraphs(text: str) -> Iterator[str]:
    """Documents between blank lines, each with the blank lines after it; they join to `text`."""
    start = 0
    for gap in _BLANK_LINES.finditer(text):
        yield text[start : gap.end()]
        start = gap.end()
    if start < len(text):
        yield text[start:]


def next_document(path: str, offset: int, documents_are: str) -> int:
    """First byte at or after `offset` where a document begins (the file's size if none does).

    Both neighbours of a cut call this with the same offset, so each document is read exactly once.
    """
    size = os.path.getsize(path)
    if offset <= 0 or offset >= size:
        return min(max(offset, 0), size)
    with open(path, "rb") as file:
        file.seek(offset - 1)
        file.readline()
        start = file.tell()
        if documents_are == "line":
            return start
        blank_before = _previous_line_is_blank(path, start)
        while line := file.readline():
            is_blank = not line.strip()
            if blank_before and not is_blank:
                return start
            blank_before = is_blank
            start = file.tell()
    return size


def _previous_line_is_blank(path: str, line_start: int) -> bool:
    with open(path, "rb") as file:
        begin = max(line_start - _LOOK_BACK_BYTES, 0)
        file.seek(begin)
        before = file.read(line_start - begin)
    return not before.removesuffix(b"\n").rpartition(b"\n")[2].strip()


def _cut(sizes: list[tuple[str, int]], part_bytes: int) -> Iterator[Part]:
    for path, size in sizes:
        for start in range(0, size, part_bytes):
            stop = min(start + part_bytes, size)
            yield Part(number=0, items=(path,), start=start, stop=stop, weight=stop - start)


def _grouped(sizes: list[tuple[str, int]], part_bytes: int) -> Iterator[Part]:
    group: list[str] = []
    weight = 0
    for path, size in sizes:
        if group and weight + size > part_bytes:
            yield Part(number=0, items=tuple(group), weight=weight)
            group, weight = [], 0
        group.append(path)
        weight += size
    if group:
        yield Part(number=0, items=tuple(group), weight=max(weight, 1))


def _text_files_in(folder: Path) -> list[str]:
    try:
        found = sorted(p for p in folder.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file() and p.stat().st_size)
    except OSError as error:
        raise DataError(f"folder {folder} cannot be read ({reason_of(error)}); check its permissions.") from error
    if not found:
        raise DataError(f"folder {folder} holds no text ({', '.join(TEXT_SUFFIXES)}); name the files themselves.")
    return [str(path) for path in found]


def _pack(part: Part) -> str:
    return json.dumps([part.number, list(part.items), part.start, part.stop, part.weight])


def _unpack(text: str) -> Part:
    number, items, start, stop, weight = json.loads(text)
    return Part(number=number, items=tuple(items), start=start, stop=stop, weight=weight)
