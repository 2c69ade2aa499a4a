"""A file or folder is the old one, the new one or absent, whoever is killed and whenever."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bd3_megatron import files
from bd3_megatron.errors import BD3Error, DataError, FileError
from bd3_megatron.files import (
    append_line,
    create,
    discard,
    disk_errors,
    move,
    read_json,
    reason_of,
    remove_leftovers,
    scratch_folder,
    stream,
    temporary_name,
    whole,
    write_bytes,
    write_json,
    write_text,
)


def in_a_child(action: Callable[[], None]) -> int:
    """Run it in a forked process; its wait status."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_is_written_is_there_and_nothing_else(tmp_path: Path) -> None:
    write_bytes(tmp_path / "new" / "a", b"\x00\xff")
    write_text(tmp_path / "new" / "b", "ü\n")
    write_json(tmp_path / "new" / "c", {"z": 1, "a": "ü"}, indent=None)
    write_json(tmp_path / "new" / "c", {"z": 2, "a": "ü"}, indent=None)
    assert (tmp_path / "new" / "a").read_bytes() == b"\x00\xff"
    assert (tmp_path / "new" / "b").read_bytes() == "ü\n".encode()
    assert (tmp_path / "new" / "c").read_text("utf-8") == '{"a": "ü", "z": 2}\n'
    assert sorted(os.listdir(tmp_path / "new")) == ["a", "b", "c"]


def test_of_many_who_create_a_file_one_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "a"
    statuses = [in_a_child(lambda number=n: os._exit(0 if create(path, f"{number}\n") else 1)) for n in range(3)]
    assert statuses == [0, 256, 256] and path.read_text() == "0\n"
    assert os.listdir(tmp_path) == ["a"]
    # a heartbeat that misses its lease must not bring the folder back that its holder has given up
    with pytest.raises(FileError, match="cannot be written"):
        create(tmp_path / "gone" / "a", "text")
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_that_cannot_be_created_whole_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match=r"a cannot be written \(No space left on device\)"):
        create(tmp_path / "a", "text")
    assert os.listdir(tmp_path) == []


def test_files_are_readable_by_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "")
        with whole(tmp_path / "b") as folder:
            folder.mkdir()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o750


@pytest.mark.parametrize("error", [RuntimeError("stop"), OSError("disk"), KeyboardInterrupt()])
def test_an_error_in_between_changes_nothing(error: BaseException, tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    expected = FileError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), stream(tmp_path / "a") as file:
        file.write(b"new")
        raise error
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_a_kill_in_between_changes_nothing_and_its_leftover_is_removed(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")

    def killed() -> None:
        with stream(tmp_path / "a") as file:
            file.write(b"new")
            file.flush()
            die()

    assert in_a_child(killed) == signal.SIGKILL
    assert (tmp_path / "a").read_text() == "old" and len(os.listdir(tmp_path)) == 2
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["a"]


def test_the_bytes_are_on_the_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")

    def noted_replace(path: Path, target: Path) -> None:
        replace(path, target)
        done.append("name")

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_text(tmp_path / "a", "text")
    assert done == ["file", "name", "folder"]
    done.clear()
    with whole(tmp_path / "b") as folder:
        (folder / "inner").mkdir(parents=True)
        (folder / "inner" / "c").touch()
    assert done == ["folder", "file", "folder", "name", "folder"]


def test_a_folder_is_replaced_on_request_only(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with whole(tmp_path / "out", replace_folder=True) as folder:
            folder.mkdir()
            (folder / text).touch()
    assert os.listdir(tmp_path / "out") == ["new"] and os.listdir(tmp_path) == ["out"]
    with pytest.raises(FileError, match=r"out cannot be written \(Directory not empty\); free some space, or name"):
        with whole(tmp_path / "out") as folder:
            folder.mkdir()
    with pytest.raises(FileError, match=r"out cannot be written \(Is a directory\)"):
        write_text(tmp_path / "out", "a file")
    assert os.listdir(tmp_path / "out") == ["new"] and os.listdir(tmp_path) == ["out"]


def test_a_kill_between_the_renames_of_a_swap_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with whole(tmp_path / "out") as folder:
        folder.mkdir()
        (folder / "old").touch()

    def killed() -> None:
        monkeypatch.setattr(files, "move", lambda *_: die())
        with whole(tmp_path / "out", replace_folder=True) as folder:
            folder.mkdir()

    assert in_a_child(killed) == signal.SIGKILL
    assert not (tmp_path / "out").exists()
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["old"]


def test_leftovers_of_the_living_and_of_other_hosts_stay(tmp_path: Path) -> None:
    own = temporary_name(tmp_path / "a")
    foreign, old_foreign = tmp_path / ".a.elsewhere.1.01234567.tmp", tmp_path / ".a.elsewhere.1.01234568.tmp"
    for path in (own, foreign, old_foreign, tmp_path / ".a.tmp", tmp_path / "a"):
        path.touch()
    yesterday = time.time() - files.LEFTOVER_SECONDS - 60
    os.utime(old_foreign, (yesterday, yesterday))
    remove_leftovers(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {own.name, foreign.name, ".a.tmp", "a"}


@pytest.mark.parametrize("name", ["a", "x" * 200, "ü" * 120, "a.b.c"])
def test_temporary_names_are_hidden_beside_the_file_and_never_the_same(name: str, tmp_path: Path) -> None:
    made = {temporary_name(tmp_path / name).name for _ in range(100)}
    assert len(made) == 100 and all(n.startswith(".") and len(n.encode()) < 256 for n in made)
    write_text(tmp_path / name, "fits")
    assert os.listdir(tmp_path) == [name]


def test_processes_that_write_one_file_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    def often(letter: str) -> None:
        for _ in range(20):
            write_text(tmp_path / "a", letter * 10_000)

    children = []
    for letter in "xyz":
        child = os.fork()
        if child == 0:
            try:
                often(letter)
            finally:
                os._exit(0)
        children.append(child)
    texts = set()
    while children:
        if (tmp_path / "a").exists():
            texts.add((tmp_path / "a").read_text())
        children = [child for child in children if os.waitpid(child, os.WNOHANG)[0] == 0]
    assert texts <= {letter * 10_000 for letter in "xyz"} and os.listdir(tmp_path) == ["a"]


def test_devices_pipes_and_places_one_may_not_write_to_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/null"), tmp_path / "pipe"):
        with pytest.raises(FileError, match="is a device or a pipe and would be replaced; name a file"):
            write_text(path, "text")
    with pytest.raises(FileError, match="Not a directory") as caught:
        write_text(tmp_path / "pipe" / "a", "text")
    assert caught.value.errno == errno.ENOTDIR and caught.value.exit_code == 2


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "a").write_text("old")
    (tmp_path / "a").symlink_to(tmp_path / "far" / "a")
    write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").is_symlink() and (tmp_path / "far" / "a").read_text() == "new"


def test_errors_about_other_files_are_not_about_this_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, whole(tmp_path / "out"):
        (tmp_path / "source").read_text()
    assert not isinstance(caught.value, BD3Error)


def test_a_scratch_folder_is_gone_at_the_end(tmp_path: Path) -> None:
    with scratch_folder(tmp_path / "out") as folder:
        assert folder.parent == tmp_path and folder.name.startswith(".out.")
        (folder / "a").touch()
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="Not a directory"), scratch_folder(tmp_path / "file" / "out"):
        pass


def test_moving_and_discarding(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a").write_text("new")
    move(tmp_path / "a", tmp_path / "b" / "c")
    assert (tmp_path / "b" / "c").read_text() == "new"
    discard(tmp_path / "b")
    discard(tmp_path / "b")
    assert os.listdir(tmp_path) == []


def test_lines_are_appended(tmp_path: Path) -> None:
    append_line(tmp_path / "list", "a")
    append_line(tmp_path / "list", "b")
    assert (tmp_path / "list").read_text() == "a\nb\n"
    with pytest.raises(FileError, match=r"cannot be written \(Is a directory\)"):
        append_line(tmp_path, "a")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, r"cannot be read \(No such file or directory\); do better"),
        ("{", "is damaged .not JSON.; do better"),
        ("[" * 100_000, "is damaged .not JSON.; do better"),
        ("[]", "is damaged .no JSON object.; do better"),
    ],
)
def test_json_that_is_none_is_refused(content: str | None, sentence: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=sentence):
        read_json(tmp_path / "a.json", "do better")


def test_json_objects_are_read(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": [1]})
    assert read_json(tmp_path / "a.json", "") == {"b": [1]} == json.loads((tmp_path / "a.json").read_text())


def test_errors_of_the_disk_become_sentences(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="reading it failed .Is a directory.; do better"):
        with disk_errors("reading it", "do better"):
            tmp_path.read_text()
    # a sentence of this file is told again with the caller's remedy, by its reason alone
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"saving failed \(Not a directory\); do better\.$"):
        with disk_errors("saving", "do better"):
            write_text(tmp_path / "file" / "a", "")
    assert reason_of(OSError("odd")) == "odd"
