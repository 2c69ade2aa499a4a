"""Sources by the names users give: text files and folders, the built-in corpus, several of them one after the other.

Refuses: no name at all.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bd3_megatron.data.builtin_text import builtin_documents, builtin_items
from bd3_megatron.data.source import Documents, Part, Source
from bd3_megatron.data.text_files import TextFiles
from bd3_megatron.errors import ConfigError

BUILTIN_PREFIX = "builtin:"


@dataclass(frozen=True, kw_only=True)
class BuiltinText:
    """Text every Python has; see builtin_text."""

    name: str
    # Topics or modules; fixed, because parts decide the order of shards.
    items_per_part: int = 40

    @property
    def answers_only(self) -> bool:
        return False

    @property
    def needs_template(self) -> bool:
        return False

    def parts(self) -> list[Part]:
        items = builtin_items(self.name)
        groups = [items[i : i + self.items_per_part] for i in range(0, len(items), self.items_per_part)]
        return [Part(number=n, items=tuple(group), weight=len(group)) for n, group in enumerate(groups)]

    def documents(self, part: Part) -> Documents:
        for item in part.items:
            yield from builtin_documents(item)

    def settings(self) -> dict[str, Any]:
        # The text is part of the Python installation, so its version identifies it.
        return {"kind": "builtin", "name": self.name, "python": platform.python_version()}

    def describe(self) -> dict[str, Any]:
        return self.settings()

    def identity(self) -> dict[str, Any]:
        return self.settings()

    def stamp(self, part: Part) -> str:
        return platform.python_version()


@dataclass(frozen=True, kw_only=True)
class JoinedSources:
    """Several sources one after the other."""

    sources: tuple[Source, ...]

    @property
    def answers_only(self) -> bool:
        # only files of text are joined
        return False

    @property
    def needs_template(self) -> bool:
        return False

    def parts(self) -> list[Part]:
        joined = [(which, part) for which, source in enumerate(self.sources) for part in source.parts()]
        # The original part goes along as text, without its number: a number changes when another file grows.
        return [
            Part(number=n, items=(str(which), _pack(part)), weight=part.weight)
            for n, (which, part) in enumerate(joined)
        ]

    def documents(self, part: Part) -> Documents:
        source, own = self._owner(part)
        yield from source.documents(own)

    def settings(self) -> dict[str, Any]:
        return self._joined(lambda source: source.settings())

    def describe(self) -> dict[str, Any]:
        return self._joined(lambda source: source.describe())

    def identity(self) -> dict[str, Any]:
        return self._joined(lambda source: source.identity())

    def stamp(self, part: Part) -> str:
        source, own = self._owner(part)
        return source.stamp(own)

    def _joined(self, of: Callable[[Source], dict[str, Any]]) -> dict[str, Any]:
        return {"kind": "joined", "sources": [of(source) for source in self.sources]}

    def _owner(self, part: Part) -> tuple[Source, Part]:
        # A part knows only texts and numbers; its owner and its own form travel as text.
        which, packed = part.items
        return self.sources[int(which)], _unpack(packed)


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
        # All paths make one source, so that the size of its parts follows from the whole text.
        sources.append(TextFiles(paths=paths, documents_are=documents_are, part_bytes=part_bytes))
    if not sources:
        raise ConfigError("no text was named; give text files, folders or builtin:python-docs.")
    return sources[0] if len(sources) == 1 else JoinedSources(sources=tuple(sources))


def _pack(part: Part) -> str:
    return json.dumps([list(part.items), part.start, part.stop, part.weight])


def _unpack(text: str) -> Part:
    items, start, stop, weight = json.loads(text)
    return Part(number=0, items=tuple(items), start=start, stop=stop, weight=weight)
