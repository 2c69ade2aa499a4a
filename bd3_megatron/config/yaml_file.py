"""The only way YAML is read: configurations, overrides, cluster profiles and recipes.

YAML is data here. What a reader of the file could overlook is refused with its line: a key given twice, a date, a number
of base 60 or 8, a tag, an anchor. So is what could exhaust the reader: long files, deep nesting, numbers beyond 64 bits.
Every refusal is one sentence that begins with what was read.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from bd3_megatron.errors import ConfigError, cut, shown
from bd3_megatron.files import reason_of

LONGEST_BYTES = 64 << 10
"""Shipped files have 2 KiB; PyYAML needs a second or two for the longest."""
DEEPEST = 20
"""Levels of nesting; a configuration has 5."""
LARGEST_WHOLE = 2**63 - 1
_TAG = "tag:yaml.org,2002:"


def read_yaml(path: Path, what: str, example: str) -> Any:
    """The content of a YAML file: mappings with text keys, lists, texts, numbers, booleans and None.

    Args:
        path: the file.
        what: names its kind in sentences, for example "config file".
        example: what a user could give instead, for example "the path of a YAML file such as configs/debug_cpu.yaml".

    Raises:
        ConfigError: a file that is missing, unreadable, too long, not UTF-8, not YAML, or refused as the module says.
    """
    source = f"{what} '{cut(str(path))}'"
    content = _read_bytes(path, source, example)
    try:
        # editors of Windows begin a file with a byte order mark
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise ConfigError(
            f"{source} is not UTF-8 (byte 0x{byte:02x} in line {line}); save it in UTF-8, as editors name it."
        ) from error
    return parse_yaml(text, source)


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text.

    Args:
        text: one document.
        source: begins every refusal, for example "override 'optim.lr=1'".

    Raises:
        ConfigError: not YAML, or refused as the module says.
    """
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except _Refusal as refusal:
        where = f", line {refusal.line}," if "\n" in text.strip() else ""
        raise ConfigError(f"{source}{where} {refusal}") from refusal
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        problem = cut(error.problem or error.context or "no document")
        raise ConfigError(f"{source} is not valid YAML ({where}{problem}); mend that line.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML ({cut(str(error))}); remove what is no text.") from error


def _read_bytes(path: Path, source: str, example: str) -> bytes:
    try:
        # before it is opened: opening a pipe waits for a writer
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            raise ConfigError(f"{source} is a folder; give {example}.")
        if not stat.S_ISREG(found.st_mode):
            # the ranks read the file again, and a pipe gives its content once
            raise ConfigError(f"{source} is a device or a pipe, which can be read only once; give {example}.")
        with path.open("rb") as file:
            # /proc names files that have no size and do not end
            content = file.read(LONGEST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"{source} does not exist; give {example}.") from error
    except OSError as error:
        remedy = "check its permissions" if isinstance(error, PermissionError) else f"give {example}"
        raise ConfigError(f"{source} cannot be read ({reason_of(error)}); {remedy}.") from error
    except ValueError as error:
        # a path with a zero byte
        raise ConfigError(f"{source} is no path; give {example}.") from error
    if len(content) > LONGEST_BYTES:
        raise ConfigError(
            f"{source} is longer than {LONGEST_BYTES >> 10} KiB, so it is no configuration; give {example}."
        )
    return content


class _Refusal(Exception):
    """A sentence without its subject, and the line it is about, from 1."""

    def __init__(self, line: int, sentence: str) -> None:
        super().__init__(sentence)
        self.line = line


class _Loader(yaml.SafeLoader):
    """PyYAML's loader of plain data, with the refusals of this module."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """One node of the document; called by PyYAML for each, before anything is built."""
        # events come one by one, so that deep nesting is seen before the recursion is as deep
        event = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if getattr(event, "anchor", None) is not None:
            raise _Refusal(
                line, f"has an anchor or alias ({shown(event.anchor)}); write the value out where it is used."
            )
        if getattr(event, "tag", None) is not None:
            raise _Refusal(line, f"has a tag ({shown(event.tag)}), which nothing here reads; write the plain value.")
        if self._depth >= DEEPEST:
            raise _Refusal(line, f"is nested more than {DEEPEST} levels deep; no key is so deep.")
        self._depth += 1
        node = super().compose_node(parent, index)  # type: ignore[no-untyped-call]
        self._depth -= 1
        if isinstance(node, yaml.ScalarNode):
            _check_scalar(node, line)
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
        return node


def _check_keys(node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.tag != f"{_TAG}str":
            given = shown(key.value) if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            raise _Refusal(line, f"has a key that is no text ({given}); put it in quotes.")
        # PyYAML would keep the last and forget the first without a word
        if key.value in lines:
            raise _Refusal(
                line,
                f"gives the key {shown(key.value)} a second time (first in line {lines[key.value]}), and only one of the two "
                "could count; join them.",
            )
        lines[key.value] = line


def _check_scalar(node: yaml.ScalarNode, line: int) -> None:
    check = _SCALAR_CHECKS.get(node.tag.removeprefix(_TAG))
    if check is not None:
        check(str(node.value), line)


def _check_timestamp(text: str, line: int) -> None:
    # run.dir=2024-01-31 would arrive as a date, and a date is no text
    raise _Refusal(line, f"holds a date ({shown(text)}); put it in quotes if a text is meant.")


def _check_base(text: str, line: int) -> None:
    # time: 12:00:00 would arrive as 43200
    if ":" in text:
        raise _Refusal(line, f"holds {shown(text)}, which YAML reads as a number of base 60; put it in quotes.")


def _check_whole(text: str, line: int) -> None:
    _check_base(text, line)
    # 010 would arrive as 8
    digits = text.lstrip("+-").replace("_", "")
    if digits.startswith("0") and digits.isdecimal() and digits != "0":
        raise _Refusal(line, f"holds {shown(text)}, which YAML reads as a number of base 8; leave out the leading 0.")
    try:
        # 64 binary digits and their 0b; Python takes long for thousands of decimal ones
        too_large = len(digits) > 70 or abs(int(digits, 0)) > LARGEST_WHOLE
    except ValueError:
        raise _Refusal(line, f"holds {shown(text)}, which is no number; put it in quotes if a text is meant.") from None
    if too_large:
        raise _Refusal(line, f"holds {shown(text)}, which does not fit 64 bits; give a smaller number.")


# By YAML's own names of what a plain scalar is taken for.
_SCALAR_CHECKS: Mapping[str, Callable[[str, int], None]] = {
    "timestamp": _check_timestamp,
    "float": _check_base,
    "int": _check_whole,
}
