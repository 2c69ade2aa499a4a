"""Files that appear whole or not at all, and errors of the disk as sentences.

Decides: content goes to a temporary name in the same file system, is flushed to the disk (fsync), then renamed; the
folder's entry is flushed too. A reader therefore sees the old file, the new file, or none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bd3_megatron.errors import BD3Error, DataError


def flush_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, final: Path) -> None:
    """Rename a finished file or folder to its final name, durably."""
    os.rename(temporary, final)
    flush_folder(final.parent)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    publish(temporary, path)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.
        remedy: end of the error sentence, what the user should do.

    Raises:
        DataError: missing, unreadable, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({reason_of(error)}); {remedy}.") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged (not JSON); {remedy}.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is damaged (no JSON object); {remedy}.")
    return content


@contextmanager
def disk_errors(doing: str, remedy: str, *, kind: type[BD3Error] = DataError) -> Iterator[None]:
    """Turn errors of the operating system inside the block into one sentence.

    Raises:
        kind: "DOING failed (No space left on device); REMEDY."
    """
    try:
        yield
    except OSError as error:
        raise kind(f"{doing} failed ({reason_of(error)}); {remedy}.") from error


def reason_of(error: OSError) -> str:
    """The operating system's words for an error, without path and number."""
    return os.strerror(error.errno) if error.errno else str(error)
