"""Plain and compressed text files as a source, cut into parts at document starts.

Documents: `paragraph` (lines between blank lines, with the blank lines that follow, so that documents join to the file),
`line` (without its end), or `file`. Line ends of every kind count: "\n", "\r\n", a lone "\r".
Refuses: missing and empty files, folders without text; documents that are not UTF-8 are named by file and byte.
Costs: memory of a few times 4 MiB, or of the longest document; compressed files are one part each.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from bd3_megatron.data.source import BadDocument, Part, Texts
from bd3_megatron.data.text_reading import BOM, COMPRESSIONS, decode_text, is_compressed, open_unpacked, reading
from bd3_megatron.errors import ConfigError, DataError, either, shown
from bd3_megatron.files import reason_of

DOCUMENT_RULES = ("paragraph", "line", "file")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
# A part has a folder and a rename of its own, which the work on this many bytes still outweighs.
_SMALLEST_PART_BYTES = 1 << 18
_LARGEST_PART_BYTES = 1 << 26
_PARTS_WANTED = 64
# Bytes read at a time; with the documents cut from it, the memory of a part is a few times this.
_STRETCH_BYTES = 1 << 22
_LOOK_BACK_BYTES = 1 << 16
# A "\r" before "\n" is half a line end: taken alone it would make every line of a Windows file look blank.
_LINE_END = rb"(?:\r\n|\n|\r(?!\n))"
_ENDS = {
    "line": re.compile(_LINE_END),
    "paragraph": re.compile(_LINE_END + rb"(?:[ \t\f\v]*" + _LINE_END + rb")+"),
}
# Blank lines at the head of a file follow no document, yet they must belong to one, so that documents join to the
# file.
_BLANK_START = re.compile(rb"(?:[ \t\f\v]*" + _LINE_END + rb")+")


@dataclass(frozen=True, kw_only=True)
class TextFiles:
    """UTF-8 text files, and folders of them (every .txt, .text, .md and .rst inside, plain or compressed)."""

    paths: tuple[str, ...]
    documents_are: str = "paragraph"
    part_bytes: int | None = None
    """Bytes of a part; None: 1/64 of the text to the next power of two, from 256 KiB to 64 MiB."""

    def __post_init__(self) -> None:
        if self.documents_are not in DOCUMENT_RULES:
            raise ConfigError(f"documents={shown(self.documents_are)} is not known; use {either(DOCUMENT_RULES)}.")
        if self.part_bytes is not None and self.part_bytes < 1:
            raise ConfigError(f"part_bytes={self.part_bytes} is empty; use 1 or more.")

    @property
    def answers_only(self) -> bool:
        return False

    @property
    def needs_template(self) -> bool:
        return False

    def parts(self) -> list[Part]:
        sizes = [(path, os.path.getsize(path)) for path in self._files()]
        part_bytes = self.part_bytes or _part_bytes(sum(size for _, size in sizes))
        whole = self.documents_are == "file"
        parts = _grouped(sizes, part_bytes) if whole else _cut(sizes, part_bytes)
        # Numbers are given last, over all files: shards are named in this order.
        return [replace(part, number=number) for number, part in enumerate(parts)]

    def documents(self, part: Part) -> Texts:
        for path in part.items:
            with reading(path), open_unpacked(path) as file:
                start, size = 0, None
                # Only a plain file can be entered in the middle; a compressed one is read from its beginning to its
                # end.
                if self.documents_are != "file" and not is_compressed(path):
                    start, stop = (next_document(path, at, self.documents_are) for at in (part.start, part.stop))
                    file.seek(start)
                    size = stop - start
                for offset, content in _documents_of(file, size, self.documents_are):
                    yield _decoded(path, start + offset, content, self.documents_are)

    def settings(self) -> dict[str, Any]:
        return {
            "kind": "text",
            "documents": self.documents_are,
            "part_bytes": self.part_bytes,
            "paths": list(self.paths),
        }

    def describe(self) -> dict[str, Any]:
        return self.settings() | {"files": [[path, os.path.getsize(path)] for path in self._files()]}

    def identity(self) -> dict[str, Any]:
        # Times belong to the identity and not to the header, whose bytes must not depend on when a file was copied.
        return self.describe() | {"times": [os.stat(path).st_mtime_ns for path in self._files()]}

    def stamp(self, part: Part) -> str:
        found = [os.stat(path) for path in part.items]
        return str([[stat.st_size, stat.st_mtime_ns] for stat in found])

    def _files(self) -> list[str]:
        files: list[str] = []
        for name in self.paths:
            path = Path(name)
            if path.is_dir():
                files += _text_files_in(path)
                continue
            if not path.exists():
                raise DataError(f"text file {name} does not exist; give existing UTF-8 files or folders.")
            # An empty file that is named is a mistake; one found in a folder is passed over.
            if path.is_file() and path.stat().st_size == 0:
                raise DataError(f"text file {name} is empty; give files that hold text.")
            files.append(str(path))
        return files


def next_document(path: str, offset: int, documents_are: str) -> int:
    """First byte at or after `offset` where a document begins (the file's size if none does).

    Both neighbours of a cut call this with the same offset, so each document is read exactly once.
    """
    size = os.path.getsize(path)
    if offset <= 0 or offset >= size:
        return min(max(offset, 0), size)
    # The search begins before the cut: a gap that straddles it would else be seen from its middle, as a shorter one.
    begin, length = max(offset - _LOOK_BACK_BYTES, 0), 2 * _LOOK_BACK_BYTES
    with open(path, "rb") as file:
        while True:
            file.seek(begin)
            window = file.read(length)
            for found in _ENDS[documents_are].finditer(window):
                end = begin + found.end()
                # An end at the window's own edge may go on behind it: half a "\r\n", or more blank lines.
                if end >= offset and (found.end() < len(window) or end == size):
                    return end
            if begin + len(window) >= size:
                return size
            # No document begins in the window: a longer one is read from the same start, since its matches may have
            # changed.
            length *= 2


def split_documents(content: bytes, documents_are: str) -> list[tuple[int, int]]:
    """(start, end) of the documents of a stretch that begins at a document start; they cover it without gaps."""
    if documents_are == "file":
        return [(0, len(content))] if content else []
    spans, start = [], 0
    blank = _BLANK_START.match(content) if documents_are == "paragraph" else None
    if blank:
        spans.append((0, blank.end()))
        start = blank.end()
    for found in _ENDS[documents_are].finditer(content, start):
        spans.append((start, found.end()))
        start = found.end()
    if start < len(content):
        spans.append((start, len(content)))
    return spans


def _documents_of(file: IO[bytes], size: int | None, documents_are: str) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of the documents in the next `size` bytes (None: all) of a file that stands at a document start."""
    offset, buffer, left = 0, b"", size
    whole = documents_are == "file"
    while True:
        # Doubling keeps a document of a gigabyte from being split again for every stretch of it.
        wanted = -1 if whole else max(_STRETCH_BYTES, len(buffer))
        chunk = file.read(wanted if left is None else min(wanted, left))
        left = None if left is None else left - len(chunk)
        is_last = whole or not chunk or left == 0
        buffer += chunk
        spans = split_documents(buffer, documents_are)
        # The last two may change with what follows: white space at the edge belongs to the gap before it.
        keep = 0 if is_last else 2
        done = spans[: len(spans) - keep]
        for start, end in done:
            yield offset + start, buffer[start:end]
        cut = done[-1][1] if done else 0
        offset, buffer = offset + cut, buffer[cut:]
        if is_last:
            return


def _decoded(path: str, offset: int, content: bytes, documents_are: str) -> str | BadDocument:
    # The mark counts only at the head of a file; elsewhere U+FEFF is text.
    start = len(BOM) if offset == 0 and content.startswith(BOM) else 0
    try:
        text = decode_text(content[start:])
    except UnicodeDecodeError as error:
        return BadDocument(
            where=f"{path} at byte {offset + start + error.start}",
            reason="is not UTF-8",
            remedy="convert the file (iconv -t UTF-8)",
        )
    return text.removesuffix("\n") if documents_are == "line" else text


def _part_bytes(total_bytes: int) -> int:
    """A power of two, so that mending a file, which changes the total a little, seldom moves every cut."""
    wanted = 1 << (max(total_bytes // _PARTS_WANTED, 1) - 1).bit_length()
    return min(max(wanted, _SMALLEST_PART_BYTES), _LARGEST_PART_BYTES)


def _cut(sizes: list[tuple[str, int]], part_bytes: int) -> Iterator[Part]:
    for path, size in sizes:
        # Bytes of a compressed file cannot be addressed.
        step = size if is_compressed(path) else part_bytes
        for start in range(0, size, step):
            stop = min(start + step, size)
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


def is_text_file(path: Path) -> bool:
    """Whether the name is that of a text file, plain or compressed, and the file holds anything."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return name.suffix.lower() in TEXT_SUFFIXES and path.is_file() and path.stat().st_size > 0


def _text_files_in(folder: Path) -> list[str]:
    try:
        found = sorted(path for path in folder.rglob("*") if is_text_file(path))
    except OSError as error:
        raise DataError(f"folder {folder} cannot be read ({reason_of(error)}); check its permissions.") from error
    if not found:
        raise DataError(f"folder {folder} holds no text ({', '.join(TEXT_SUFFIXES)}); name the files themselves.")
    return [str(path) for path in found]
