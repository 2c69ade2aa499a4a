"""Sources: documents and parts cover the text exactly once; bad text is named by file and byte."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import pytest

from bd3_megatron.data.builtin_text import builtin_documents, builtin_items
from bd3_megatron.data.held_out import check_fraction, is_held_out
from bd3_megatron.data.sources import (
    BuiltinText,
    JoinedSources,
    Source,
    TextFiles,
    next_document,
    split_paragraphs,
    text_source,
)
from bd3_megatron.data.tokenizer_sample import sample_documents
from bd3_megatron.errors import ConfigError, DataError
from tests.unit.data.corpora import AWKWARD, english


def all_documents(source: Source) -> list[str]:
    """Documents of all parts, read by a copy that came through pickling."""
    copy = pickle.loads(pickle.dumps(source))
    return [text for part in source.parts() for text in copy.documents(part)]


def random_text(seed: int) -> str:
    chosen = random.Random(seed)
    pieces = ["\n", "\n\n", "\n \t\n", "\r\n\r\n", "a", "bc d", "\u00e9\u4f60", " ", "\n\n\n\n", "line\n", *AWKWARD]
    return "".join(chosen.choice(pieces) for _ in range(chosen.randint(1, 60)))


@pytest.mark.parametrize("part_bytes", [1, 7, 64, 10**6])
def test_paragraphs_join_to_the_file_however_it_is_cut(tmp_path: Path, part_bytes: int) -> None:
    for seed in range(12):
        text = random_text(seed) or "x"
        path = tmp_path / f"{seed}.txt"
        path.write_text(text or "x", encoding="utf-8", newline="")
        if not path.stat().st_size:
            continue
        documents = all_documents(TextFiles(paths=(str(path),), part_bytes=part_bytes))
        assert "".join(documents) == text
        assert documents == list(split_paragraphs(text))


@pytest.mark.parametrize("part_bytes", [1, 5, 33, 10**6])
def test_lines_are_each_read_once_however_the_file_is_cut(tmp_path: Path, part_bytes: int) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo words\r\n\nfour \u4f60\u597d\nlast without end", encoding="utf-8", newline="")
    documents = all_documents(TextFiles(paths=(str(path),), documents_are="line", part_bytes=part_bytes))
    assert [d for d in documents if d] == ["one", "two words", "four \u4f60\u597d", "last without end"]


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


def test_document_starts_are_found_at_any_offset(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\nb\n\n  \nc\nd\n\n\ne")
    found = [next_document(str(path), at, "paragraph") for at in (-1, 0, 1, 4, 8, 9, 14, 15, 99)]
    assert found == [0, 0, 8, 8, 8, 14, 14, 15, 15]
    assert [next_document(str(path), at, "line") for at in (0, 1, 2, 3, 5)] == [0, 2, 2, 4, 5]


def test_bad_text_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin.txt").write_bytes(b"good\n\nmore text\n\ncaf\xe9 here\n")
    cases = [
        ("gone.txt", "text file .*gone.txt does not exist; give existing UTF-8 files or folders"),
        ("empty.txt", "text file .*empty.txt is empty; give files that hold text"),
        ("folder", r"folder .* holds no text \(.txt, .text, .md, .rst\); name the files themselves"),
        ("latin.txt", r"latin.txt is not UTF-8 at byte 20; convert it \(iconv -t UTF-8\) or leave it out"),
    ]
    for name, sentence in cases:
        for part_bytes in (4, 10**6):
            with pytest.raises(DataError, match=sentence):
                all_documents(TextFiles(paths=(str(tmp_path / name),), part_bytes=part_bytes))
    with pytest.raises(ConfigError, match="documents=word is not known; use paragraph, line or file"):
        TextFiles(paths=("x",), documents_are="word")
    with pytest.raises(ConfigError, match="part_bytes=0 is empty"):
        TextFiles(paths=("x",), part_bytes=0)
    with pytest.raises(ConfigError, match="no text was named; give text files, folders or builtin:python-docs"):
        text_source([])


def test_sources_are_joined_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("own\n\ntext")
    joined = text_source([str(tmp_path / "a.txt"), "builtin:python-topics"])
    assert isinstance(joined, JoinedSources)
    documents = all_documents(joined)
    assert documents[-2:] == ["own\n\n", "text"] and len(documents) > 50
    assert isinstance(text_source(["builtin:python-topics"]), BuiltinText)
    assert joined.describe()["kind"] == "joined"


def test_the_builtin_corpus_is_english_and_repeats() -> None:
    items = builtin_items("python-docs")
    assert items[0] == "topics" and items == builtin_items("python-docs") and len(items) > 100
    assert not [i for i in items if "test" in Path(i).parts or "site-packages" in i]
    topics = list(builtin_documents("topics"))
    assert len(topics) > 50 and sum(map(len, topics)) > 300_000
    assert 'The "assert" statement' in topics[0] + topics[1]
    module = next(iter(builtin_documents("argparse.py")))
    assert module.startswith("argparse\n\nCommand-line parsing library") and "argparse.ArgumentParser" in module
    assert builtin_items("python-topics") == ["topics"]


def test_the_builtin_corpus_refuses_other_names_and_bare_installations(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="built-in corpus c-docs is not known; use python-docs or python-topics"):
        builtin_items("c-docs")
    from bd3_megatron.data import builtin_text

    monkeypatch.setattr(builtin_text, "_library", lambda: tmp_path)
    with pytest.raises(DataError, match="holds no pydoc_data/topics.py; install Python's standard library"):
        builtin_items("python-docs")
    (tmp_path / "broken.py").write_text("def (")
    assert list(builtin_documents("broken.py")) == []


def test_held_out_documents_are_spread_evenly_and_never_none() -> None:
    for fraction in (0.01, 0.05, 0.3, 0.5):
        for part in (0, 1, 17):
            held = [is_held_out(part, document, fraction) for document in range(5000)]
            assert abs(sum(held) - 5000 * fraction) <= 6
            window = int(20 / fraction)
            assert all(3 < sum(held[i : i + window]) < 40 for i in range(0, 5000 - window, 97))
        singles = [is_held_out(part, 0, fraction) for part in range(5000)]
        assert abs(sum(singles) - 5000 * fraction) <= 6
    assert is_held_out(0, 0, 0.001) and not is_held_out(0, 1, 0.5) and not is_held_out(0, 0, 0.0)
    with pytest.raises(ConfigError, match=r"valid_fraction=0.6 is outside \[0, 0.5\]"):
        check_fraction(0.6)


def test_a_vocabulary_is_trained_on_an_even_share_without_what_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"document {i} {'x' * 50}\n\n" for i in range(400)))
    source = TextFiles(paths=(str(path),), part_bytes=1000)
    held = {t for p in source.parts() for n, t in enumerate(source.documents(p)) if is_held_out(p.number, n, 0.2)}
    everything = list(sample_documents(source, 10**9, 0.2, "none"))
    assert not held & set(everything) and len(everything) + len(held) == 400
    part = list(sample_documents(source, 5000, 0.0, "none"))
    assert 4000 < sum(map(len, part)) <= 5000
    assert part[0].startswith("document 0 ") and int(part[-1].split()[1]) > 350
