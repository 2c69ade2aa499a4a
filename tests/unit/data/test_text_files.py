"""Text files: documents and parts cover the text exactly once, whatever its line ends; bad bytes are named."""

from __future__ import annotations

import bz2
import gzip
import lzma
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from bd3_megatron.data import text_files
from bd3_megatron.data.source import BadDocument
from bd3_megatron.data.text_files import TextFiles, next_document
from bd3_megatron.data.text_reading import read_text
from bd3_megatron.errors import ConfigError, DataError
from tests.unit.data.corpora import AWKWARD, english

BOM = "\ufeff"


def all_documents(source: TextFiles) -> list[str | BadDocument]:
    """Documents of all parts, read by a copy that came through pickling."""
    copy = pickle.loads(pickle.dumps(source))
    return [document for part in source.parts() for document in copy.documents(part)]


def random_text(seed: int, pieces: tuple[str, ...] = ()) -> str:
    chosen = random.Random(seed)
    known = ["\n", "\n\n", "\n \t\n", "\r\n\r\n", "a", "bc d", "\u00e9\u4f60", " ", "\n\n\n\n", "line\n", *pieces]
    return "".join(chosen.choice(known) for _ in range(chosen.randint(1, 60))) + "x"


def write(path: Path, text: str) -> str:
    path.write_bytes(text.encode())
    return str(path)


@pytest.mark.parametrize("part_bytes", [1, 7, 64, 10**6])
@pytest.mark.parametrize("ends", [AWKWARD, ("\r", "\r\r", "a\r\n", "\r \r\n")])
def test_paragraphs_join_to_the_file_however_it_is_cut(tmp_path: Path, part_bytes: int, ends: tuple[str, ...]) -> None:
    for seed in range(10):
        path = write(tmp_path / f"{seed}.txt", random_text(seed, ends))
        documents = all_documents(TextFiles(paths=(path,), part_bytes=part_bytes))
        assert "".join(map(str, documents)) == read_text(Path(path))
        assert documents == all_documents(TextFiles(paths=(path,)))


@pytest.mark.parametrize("stretch", [1, 3, 50])
@pytest.mark.parametrize("rule", ["paragraph", "line", "file"])
def test_documents_do_not_depend_on_how_the_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str, stretch: int
) -> None:
    paths = tuple(write(tmp_path / f"{n}.txt", BOM + random_text(n, ("\r", "\r\n", "\n  "))) for n in range(12))
    whole = all_documents(TextFiles(paths=paths, documents_are=rule))
    monkeypatch.setattr(text_files, "_STRETCH_BYTES", stretch)
    assert all_documents(TextFiles(paths=paths, documents_are=rule)) == whole
    assert not any(BOM in str(document) for document in whole)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_kind_of_line_end_ends_a_line(tmp_path: Path, end: str) -> None:
    path = write(tmp_path / "a.txt", end.join(["one", "two words", "", "four \u4f60\u597d", "last without end"]))
    for part_bytes in (1, 5, 33, 10**6):
        lines = all_documents(TextFiles(paths=(path,), documents_are="line", part_bytes=part_bytes))
        assert lines == ["one", "two words", "", "four \u4f60\u597d", "last without end"]
        paragraphs = all_documents(TextFiles(paths=(path,), part_bytes=part_bytes))
        assert paragraphs == ["one\ntwo words\n\n", "four \u4f60\u597d\nlast without end"]


def test_a_byte_order_mark_is_no_text_and_later_ones_are(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", f"{BOM}First line.\n\nSecond{BOM}.\n\n")
    assert all_documents(TextFiles(paths=(path,), part_bytes=4)) == ["First line.\n\n", f"Second{BOM}.\n\n"]
    assert read_text(Path(path)).startswith("First")


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstandard.compress)],
)
def test_compressed_files_are_read_as_what_is_in_them(
    tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "_STRETCH_BYTES", 64)
    plain = write(tmp_path / "a.txt", BOM + english(300, 1))
    (tmp_path / "packed").mkdir()
    packed = tmp_path / "packed" / f"a.txt{suffix}"
    packed.write_bytes(pack(Path(plain).read_bytes()))
    for rule in ("paragraph", "line", "file"):
        wanted = all_documents(TextFiles(paths=(plain,), documents_are=rule))
        for name in (packed, packed.parent):
            assert all_documents(TextFiles(paths=(str(name),), documents_are=rule)) == wanted
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(DataError, match=rf"a\.txt{suffix}"):
        all_documents(TextFiles(paths=(str(packed),)))


def test_a_long_document_is_not_read_again_for_every_stretch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "_STRETCH_BYTES", 100)
    split = text_files.split_documents
    lengths: list[int] = []

    def counted(content: bytes, rule: str) -> list[tuple[int, int]]:
        lengths.append(len(content))
        return split(content, rule)

    monkeypatch.setattr(text_files, "split_documents", counted)
    path = write(tmp_path / "a.txt", "no paragraph ends here " * 5000)
    assert len(all_documents(TextFiles(paths=(path,)))) == 1
    assert sum(lengths) < 5 * 23 * 5000


def test_whole_files_are_documents_and_folders_are_read_in_order(tmp_path: Path) -> None:
    for name, text in (
        ("b.txt", "second\n\nfile"),
        ("a.md", "first"),
        ("c/d.rst", "third"),
        ("e.bin", "no"),
        ("f.txt", ""),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for part_bytes in (1, 12, 10**6):
        source = TextFiles(paths=(str(tmp_path),), documents_are="file", part_bytes=part_bytes)
        assert all_documents(source) == ["first", "second\n\nfile", "third"]
    assert [p.number for p in source.parts()] == [0]


def test_parts_are_numbered_and_do_not_depend_on_anything_but_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(english(20_000, 1))
    parts = TextFiles(paths=(str(path),), part_bytes=5000).parts()
    assert [p.number for p in parts] == list(range(len(parts))) and len(parts) > 10
    assert sum(p.weight for p in parts) == path.stat().st_size
    assert parts == TextFiles(paths=(str(path),), part_bytes=5000).parts()
    assert len(TextFiles(paths=(str(path),)).parts()) == 1


@pytest.mark.parametrize("kilobytes", [1, 200_000, 10**9])
def test_parts_are_neither_tiny_nor_huge_and_their_size_does_not_follow_every_byte(kilobytes: int) -> None:
    sizes = {text_files._part_bytes(kilobytes * 1024 + more) for more in range(-1000, 1000)}
    assert len(sizes) == 1 and (1 << 18) <= sizes.pop() <= 1 << 26


def test_document_starts_are_found_at_any_offset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\nb\n\n  \nc\nd\n\n\ne")
    for look_back in (2, 5, 1 << 16):
        monkeypatch.setattr(text_files, "_LOOK_BACK_BYTES", look_back)
        found = [next_document(str(path), at, "line") for at in (0, 1, 2, 3, 5)]
        assert found == [0, 2, 2, 4, 5]
    found = [next_document(str(path), at, "paragraph") for at in (-1, 0, 1, 4, 8, 9, 14, 15, 99)]
    assert found == [0, 0, 8, 8, 8, 14, 14, 15, 15]
    path.write_bytes(b"a\r\nb\r\r\n\rc")
    assert [next_document(str(path), at, "line") for at in range(9)] == [0, 3, 3, 3, 5, 5, 7, 7, 8]
    assert [next_document(str(path), at, "paragraph") for at in (1, 5, 8)] == [8, 8, 8]


def test_bad_bytes_are_named_and_the_documents_around_them_are_read(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"good\n\nmore text\n\ncaf\xe9 here\n\nlast")
    for part_bytes in (4, 10**6):
        documents = all_documents(TextFiles(paths=(str(path),), part_bytes=part_bytes))
        assert documents[:2] == ["good\n\n", "more text\n\n"] and documents[3:] == ["last"]
        bad = documents[2]
        assert isinstance(bad, BadDocument) and (bad.where, bad.reason) == (f"{path} at byte 20", "is not UTF-8")
    with pytest.raises(DataError, match=r"latin.txt is not UTF-8 at byte 20; convert it \(iconv -t UTF-8\)"):
        read_text(path)


def test_files_that_are_not_there_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    cases = [
        ("gone.txt", "text file .*gone.txt does not exist; give existing UTF-8 files or folders"),
        ("empty.txt", "text file .*empty.txt is empty; give files that hold text"),
        ("folder", r"folder .* holds no text \(.txt, .text, .md, .rst\); name the files themselves"),
    ]
    for name, sentence in cases:
        with pytest.raises(DataError, match=sentence):
            all_documents(TextFiles(paths=(str(tmp_path / name),)))
    with pytest.raises(DataError, match=r"reading .*gone.txt failed \(No such file or directory\); check the file"):
        read_text(tmp_path / "gone.txt")
    with pytest.raises(ConfigError, match="documents='word' is not known; use paragraph, line or file"):
        TextFiles(paths=("x",), documents_are="word")
    with pytest.raises(ConfigError, match="part_bytes=0 is empty"):
        TextFiles(paths=("x",), part_bytes=0)
