"""What a source of text is: parts that workers share, and the documents of a part.

Contract: parts depend on the source alone, never on the number of workers, so neither does anything made from them. A part
has a key that stays when other parts change, which lets a broken-off preparation keep what is finished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol


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

    @property
    def key(self) -> str:
        """What the part reads, as text; its number may change when another file grows."""
        # Without number and weight, so that a preparation that was broken off finds its finished parts after another
        # file grew.
        return json.dumps([self.items, self.start, self.stop])


@dataclass(frozen=True, kw_only=True)
class BadDocument:
    """A document that cannot be read as text."""

    where: str
    """File and byte, or dataset and row."""
    reason: str
    """What is wrong, to follow `where` in a sentence: "is not UTF-8"."""
    remedy: str


@dataclass(frozen=True)
class Dialogue:
    """One document in turns, before it is text; see dialogue.py."""

    where: str
    """File or dataset, and row."""
    messages: tuple[Mapping[str, Any], ...]
    """role and content, and whatever else a template reads."""
    is_chat: bool
    """A template writes it; else its contents stand one after the other as they are."""

    @property
    def text(self) -> str:
        """The contents of all turns: what content keys, decontamination and vocabularies read, whatever the template."""
        return "\n".join(str(message["content"]) for message in self.messages)

    def as_json(self) -> str:
        """What tells this dialogue from others."""
        return json.dumps([self.is_chat, self.messages], ensure_ascii=False, sort_keys=True, default=str)


Texts = Iterator[str | BadDocument]
Documents = Iterator[str | Dialogue | BadDocument]


class Source(Protocol):
    """Text in parts. Instances travel to worker processes by pickling."""

    @property
    def answers_only(self) -> bool:
        """Its documents are dialogues, of which only the answers are predicted."""

    @property
    def needs_template(self) -> bool:
        """A tokenizer's chat template writes them."""

    def parts(self) -> list[Part]:
        """All parts, in order, numbered from 0."""

    def documents(self, part: Part) -> Documents:
        """The documents of one part, in order."""

    def settings(self) -> dict[str, Any]:
        """How the text is named and cut, as JSON; unchanged when a file's content changes."""

    def describe(self) -> dict[str, Any]:
        """Where the text came from, as JSON, for headers."""

    def identity(self) -> dict[str, Any]:
        """What tells this text from another, as JSON: whether it is prepared already."""

    def stamp(self, part: Part) -> str:
        """What tells whether a part's files may have changed, without reading them: names, sizes, times."""


@dataclass(frozen=True, kw_only=True)
class PartTask:
    """One part of one split's source."""

    split: str
    part: Part

    @property
    def stem(self) -> str:
        """Name of what is made of the part: of what it reads, not of its number, which other files may change."""
        # A digest, since paths may hold any letter and be longer than a file's name may be.
        return hashlib.sha256(f"{self.split} {self.part.key}".encode()).hexdigest()[:24]
