"""The only way to write a file: it appears whole or not at all, whoever is killed and whenever.

Content goes to a temporary name beside the final one, is flushed to the disk (fsync), then renamed, and the folder's
list of names is flushed too: a reader sees the old file, the new file, or none. Temporary names hold host, process and
a number of their own, so that no two writers share one. Errors of the disk become one sentence with a remedy.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from bd3_megatron.errors import BD3Error, DataError, FileError

LEFTOVER_SECONDS = 86_400
"""Age at which a temporary name of another host counts as abandoned; no single file takes a day."""
LONGEST_KEPT_NAME_BYTES = 150
"""Longer names are cut in temporary ones: file systems take 255 bytes, host, process and number included."""
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<host>[^.]*)\.(?P<process>\d+)\.[0-9a-f]{8}\.(?P<kind>tmp|old)")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole.

    Args:
        path: the file; replaced if it is one, and its folder is made.
        content: all of it.

    Raises:
        FileError: it cannot be written; the file is as it was.
    """
    with stream(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, content: Any, *, indent: int | None = 2) -> None:
    """`write_text` of JSON with sorted keys, on one line where `indent` is None."""
    write_text(path, json.dumps(content, indent=indent, sort_keys=True, ensure_ascii=False) + "\n")


def create(path: Path, text: str) -> bool:
    """Write a small text file only where there is none: of many writers, on any hosts, one succeeds. Makes no folder.

    Until it returns, readers may see the file empty.

    Returns:
        False where the file is there already.

    Raises:
        FileError: it cannot be written, and is not there.
    """
    try:
        # O_EXCL is atomic on network file systems too, a hard link is not to be had on all of them
        with path.open("x", encoding="utf-8") as file:
            try:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                path.unlink()
                raise
    except FileExistsError:
        return False
    except OSError as error:
        raise _cannot_write(path, error) from error
    return True


@contextmanager
def stream(path: Path) -> Iterator[IO[bytes]]:
    """A binary file to write to, which becomes `path` when the body ends without an error.

    Raises:
        FileError: it cannot be written; `path` is as it was.
    """
    with whole(path) as temporary, temporary.open("wb") as file:
        yield file


def check_writable(path: Path) -> None:
    """Refuse now what `write_bytes` would refuse after hours of work; writes nothing.

    Raises:
        FileError: a folder, a device, or below what is no folder or may not be written to.
    """
    try:
        # /dev/stdout leads to a pipe that has no name
        _check_replaceable(path)
        if path.is_dir():
            raise FileError(f"{path} is a folder; name a file.")
        there = next(parent for parent in Path(os.path.realpath(path)).parents if parent.exists())
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "")
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "")
    except FileError:
        raise
    except OSError as error:
        raise _cannot_write(path, error) from error


@contextmanager
def whole(path: Path, *, replace_folder: bool = False) -> Iterator[Path]:
    """A temporary name at which the body makes a file or a folder, which becomes `path` when the body ends.

    Args:
        path: the final name. A plain file and an empty folder are replaced; a link stays and its target is replaced.
        replace_folder: replace a folder that is not empty, too.

    Yields:
        A name on the same disk at which there is nothing yet.

    Raises:
        FileError: it cannot be written; `path` is as it was.
    """
    given, path = path, Path(os.path.realpath(path))
    # Beside the final name: a rename is atomic only inside one file system.
    temporary = temporary_name(path)
    try:
        # /dev/stdout leads to a pipe that has no name
        _check_replaceable(given)
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        # Before the rename: else a power cut may leave the final name with no content.
        _flush_tree(temporary)
        if replace_folder and path.is_dir() and temporary.is_dir():
            _swap(temporary, path)
        else:
            move(temporary, path)
    except FileError:
        raise
    except OSError as error:
        # the body may fail at a file that it reads: that is its own to explain
        if error.filename is not None and not str(error.filename).startswith((str(temporary), str(path))):
            raise
        raise _cannot_write(path, error) from error
    finally:
        _remove(temporary)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """An empty hidden folder beside `path`, on its disk, that is gone when the body ends."""
    path = Path(os.path.realpath(path))
    folder = temporary_name(path)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        yield folder
    finally:
        _remove(folder)


def move(path: Path, target: Path) -> None:
    """Rename a file or folder within a file system, durably."""
    os.replace(path, target)
    # The new name is an entry of the folder, which has a flush of its own.
    flush(target.parent)
    if path.parent != target.parent:
        flush(path.parent)


def discard(path: Path) -> None:
    """Delete a file or folder that others may be reading; none of them sees half of it. Does nothing if it is absent."""
    if not path.exists():
        return
    hidden = temporary_name(path)
    # Renamed first: a reader finds the whole folder or none, while the deletion takes its time.
    os.rename(path, hidden)
    _remove(hidden)


def append_line(path: Path, line: str) -> None:
    """Add one line to a text file in one write, flushed to the disk.

    Raises:
        FileError: it cannot be written.
    """
    try:
        with path.open("ab") as file:
            # One write in append mode, so that lines of several processes do not mix.
            file.write(f"{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _cannot_write(path, error) from error


def flush(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk, so that it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path, *, kind: str = "tmp") -> Path:
    """A hidden name beside `path` that no other call, process or host has."""
    # Host and process tell `remove_leftovers` whether the writer may still live.
    return path.with_name(f".{_shortened(path.name)}.{_host()}.{os.getpid()}.{os.urandom(4).hex()}.{kind}")


def remove_leftovers(folder: Path, *, no_writers: bool = False) -> None:
    """Remove the temporary names that killed writers left in a folder; nothing of a writer that may still live.

    A folder that was put aside returns to its name if the new one never came.

    Args:
        folder: of the final names.
        no_writers: the caller knows that nobody writes here, so that every temporary name was left.
    """
    for found in sorted(folder.iterdir()):
        parts = _TEMPORARY.fullmatch(found.name)
        if parts is None:
            continue
        if not no_writers and not _is_abandoned(found, parts["host"], int(parts["process"])):
            continue
        if parts["kind"] == "old" and not (folder / parts["name"]).exists():
            move(found, folder / parts["name"])
        else:
            _remove(found)


def read_json(path: Path, remedy: str, *, kind: type[BD3Error] = DataError) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.
        remedy: end of the error sentence, what the user should do.
        kind: of the error.

    Raises:
        kind: missing, unreadable, not JSON, or not an object.
    """
    content = _read_json(path, remedy, kind)
    if not isinstance(content, dict):
        raise kind(f"{path} is damaged (no JSON object); {remedy}.")
    return content


def read_json_list(path: Path, remedy: str, *, kind: type[BD3Error] = DataError) -> list[Any]:
    """As `read_json`, of a JSON list."""
    content = _read_json(path, remedy, kind)
    if not isinstance(content, list):
        raise kind(f"{path} is damaged (no JSON list); {remedy}.")
    return content


def _read_json(path: Path, remedy: str, kind: type[BD3Error]) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise kind(f"{path} cannot be read ({reason_of(error)}); {remedy}.") from error
    except (ValueError, RecursionError) as error:
        raise kind(f"{path} is damaged (not JSON); {remedy}.") from error


def json_record(line: str | bytes) -> dict[str, Any] | None:
    """One line of a record as a JSON object; None where it is none, as a line that was being written."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


@contextmanager
def disk_errors(doing: str, remedy: str, *, kind: type[BD3Error] = DataError) -> Iterator[None]:
    """Turn errors of the operating system inside the block into one sentence.

    Raises:
        kind: "DOING failed (No space left on device); REMEDY."
    """
    try:
        yield
    except OSError as error:
        # the file is in order when the process may not open any more of them
        if error.errno in (errno.EMFILE, errno.ENFILE):
            remedy = "raise the limit with ulimit -n, or let fewer processes share it"
        raise kind(f"{doing} failed ({reason_of(error)}); {remedy}.") from error


def reason_of(error: OSError) -> str:
    """The operating system's words for an error, without path and number."""
    return os.strerror(error.errno) if error.errno else str(error)


def _cannot_write(path: Path, error: OSError) -> FileError:
    sentence = FileError(
        f"{path} cannot be written ({reason_of(error)}); free some space, or name a folder you may write to."
    )
    # callers that explain the same error in words of their own ask for its reason
    sentence.errno = error.errno
    return sentence


def _check_replaceable(path: Path) -> None:
    """A rename would replace /dev/null or a pipe by a plain file."""
    with contextlib.suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise FileError(f"{path} is a device or a pipe and would be replaced; name a file.")


def _swap(finished: Path, path: Path) -> None:
    # a folder cannot be renamed onto another: between the two renames `path` is missing, and remove_leftovers
    # puts the old one back if this process is killed there
    aside = temporary_name(path, kind="old")
    os.rename(path, aside)
    try:
        move(finished, path)
    except OSError:
        os.rename(aside, path)
        raise
    _remove(aside)


def _flush_tree(path: Path) -> None:
    inner = sorted(path.rglob("*")) if path.is_dir() else []
    for found in [*inner, path]:
        if not found.is_symlink():
            flush(found)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _shortened(name: str) -> str:
    if len(name.encode()) <= LONGEST_KEPT_NAME_BYTES:
        return name
    # 30 characters are at most 120 bytes of UTF-8
    return f"{name[:30]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _host() -> str:
    # dots separate the parts of a temporary name
    return socket.gethostname().replace(".", "-")[:32]


def _is_abandoned(path: Path, host: str, process: int) -> bool:
    if host != _host():
        # nobody here can ask another host for its processes
        with contextlib.suppress(OSError):
            return time.time() - path.lstat().st_mtime > LEFTOVER_SECONDS
        return False
    try:
        # Signal 0 sends nothing and only asks whether the process exists; one of another user does exist.
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
