"""Sources by name: files, the built-in corpus, several of them one after the other."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from bd3_megatron.data.builtin_text import builtin_documents, builtin_items
from bd3_megatron.data.source import BadDocument, Source
from bd3_megatron.data.sources import BuiltinText, JoinedSources, text_source
from bd3_megatron.errors import ConfigError, DataError


def all_documents(source: Source) -> list[str | BadDocument]:
    """Documents of all parts, read by a copy that came through pickling."""
    copy = pickle.loads(pickle.dumps(source))
    return [text for part in source.parts() for text in copy.documents(part)]


def test_sources_are_joined_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("own\n\ntext")
    joined = text_source([str(tmp_path / "a.txt"), "builtin:python-topics"])
    assert isinstance(joined, JoinedSources)
    documents = all_documents(joined)
    assert documents[-2:] == ["own\n\n", "text"] and len(documents) > 50
    assert isinstance(text_source(["builtin:python-topics"]), BuiltinText)
    assert joined.describe()["kind"] == joined.settings()["kind"] == "joined"
    with pytest.raises(ConfigError, match="no text was named; give text files, folders or builtin:python-docs"):
        text_source([])


def test_a_part_keeps_its_key_when_other_files_grow(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"text {name}\n\n" * 20)
    names = [str(tmp_path / f"{name}.txt") for name in "abc"]
    source = text_source([*names, "builtin:python-topics"], part_bytes=100)
    before = {part.key: source.stamp(part) for part in source.parts()}
    (tmp_path / "a.txt").write_text("text a\n\n" * 60)
    after = {part.key: source.stamp(part) for part in source.parts()}
    kept = {key for key in before if after.get(key) == before[key]}
    assert len(kept) == sum("a.txt" not in key for key in before) and len(after) > len(before) > len(kept)


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
    with pytest.raises(ConfigError, match="built-in corpus 'c-docs' is not known; use python-docs or python-topics"):
        builtin_items("c-docs")
    from bd3_megatron.data import builtin_text

    monkeypatch.setattr(builtin_text, "_library", lambda: tmp_path)
    with pytest.raises(DataError, match="holds no pydoc_data/topics.py; install Python's standard library"):
        builtin_items("python-docs")
    (tmp_path / "broken.py").write_text("def (")
    assert list(builtin_documents("broken.py")) == []
