"""Text from bytes: UTF-8 without a byte order mark, every line end as "\n", unpacked where the file is compressed.

Contract: one way to read text for training, prompts and evaluation, so that a file means the same everywhere.
Refuses: what is not UTF-8, and compressed files that are damaged.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from bd3_megatron.errors import DataError
from bd3_megatron.files import disk_errors

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
BOM = b"\xef\xbb\xbf"
"""U+FEFF in UTF-8; at the beginning of a file it says "this is UTF-8" and is no text."""
# Bytes of a compressed file that are unpacked at a time; they may become a hundred times as many.
_PACKED_BYTES = 1 << 17
_NOT_UTF8 = "convert it (iconv -t UTF-8) or leave it out"


def decode_text(content: bytes) -> str:
    r"""Decode UTF-8; "\r\n" and a lone "\r" become "\n", as in Python's own text files.

    Raises:
        UnicodeDecodeError: not UTF-8.
    """
    # Strict: replacement characters would enter the corpus unseen.
    text = content.decode("utf-8")
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def read_text(path: Path) -> str:
    """A whole text file.

    Raises:
        DataError: missing, unreadable, damaged or not UTF-8 (names the byte).
    """
    with reading(path), open_unpacked(path) as file:
        content = file.read()
    start = len(BOM) if content.startswith(BOM) else 0
    try:
        return decode_text(content[start:])
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {start + error.start}; {_NOT_UTF8}.") from error


def is_compressed(path: Path | str) -> bool:
    """Whether the name says so."""
    return Path(path).suffix.lower() in COMPRESSIONS


def open_unpacked(path: Path | str) -> IO[bytes]:
    """Open a file for reading bytes, unpacked by its suffix."""
    suffix = Path(path).suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if suffix == ".bz2":
        return bz2.open(path, "rb")  # type: ignore[return-value]
    if suffix == ".xz":
        return lzma.open(path, "rb")  # type: ignore[return-value]
    if suffix == ".zst":
        # Python 3.11 cannot read zstd itself.
        return io.BufferedReader(_ZstdFile(path))
    return open(path, "rb")  # noqa: SIM115


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turn errors of the system and of unpacking inside the block into one sentence.

    Raises:
        DataError: names the file and the reason.
    """
    try:
        with disk_errors(f"reading {path}", "check the file and its permissions"):
            yield
    # gzip's and bz2's other errors are OSError, which the block inside has turned into a sentence.
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} is damaged ({error}); copy or pack it again.") from error


class _ZstdFile(io.RawIOBase):
    """Reads a zstd file; the library's own reader ends without a word where the file was cut off."""

    def __init__(self, path: Path | str) -> None:
        import zstandard

        self._error, self._start = zstandard.ZstdError, zstandard.ZstdDecompressor().decompressobj
        self._file = open(path, "rb")  # noqa: SIM115
        self._frame: Any = None
        self._packed = b""
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            self._packed = self._packed or self._file.read(_PACKED_BYTES)
            if not self._packed:
                if self._frame is not None and not self._frame.eof:
                    # A download that was cut off would else pass as a shorter corpus.
                    raise EOFError("it ends in the middle")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._start()
            try:
                self._unpacked = memoryview(self._frame.decompress(self._packed))
            except self._error as error:
                raise EOFError(str(error)) from error
            # A file may hold several frames, one after the other.
            self._packed = self._frame.unused_data
        size = min(len(buffer), len(self._unpacked))
        buffer[:size], self._unpacked = self._unpacked[:size], self._unpacked[size:]
        return size
