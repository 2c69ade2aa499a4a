"""The reference of every configuration key, generated from the schema: `bd3 config KEY` and `bd3 config --reference`.

Type, default and range come from the annotations, the text from the docstring under each field, so nothing is said twice.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bd3_megatron.config import axes, data, experts, schema
from bd3_megatron.config.ranges import FilePath, Range
from bd3_megatron.config.schema import Config
from bd3_megatron.errors import ConfigError, cut

HEADING = "## Every key"
_KINDS: Mapping[Any, str] = types.MappingProxyType({int: "whole number", float: "number", bool: "boolean", str: "text"})


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a configuration as a person reads about it."""

    name: str
    """With its section: optim.lr; `[]` stands for any entry of a list."""
    kind: str
    """Type in words, legal range included."""
    default: str
    """As YAML; "required" where there is none."""
    text: str
    """What it does, one paragraph."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `bd3 config`."""
    parser.add_argument("key", metavar="KEY", nargs="?", help="a key such as optim.lr, or a section such as optim")
    parser.add_argument("--reference", action="store_true", help="print every key as Markdown")


def run(options: argparse.Namespace) -> int:
    """`bd3 config`.

    Raises:
        ConfigError: neither or both of KEY and --reference, or an unknown key.
    """
    if options.reference == (options.key is not None):
        raise ConfigError(
            "bd3 config takes a KEY such as optim.lr, or --reference for all of them; give one of the two."
        )
    print(markdown() if options.reference else explain(options.key), end="")
    return 0


def explain(name: str) -> str:
    """Type, range, default and text of a key, or of each key of a section.

    Args:
        name: "optim.lr", "optim", or "lr" where only one section has it.

    Raises:
        ConfigError: no such key; names the nearest.
    """
    known = keys()
    # a section's name stands for all that is below it
    found = [key for key in known if key.name == name or key.name.startswith((f"{name}.", f"{name}[]"))]
    found = found or [key for key in known if key.name.endswith(f".{name}")]
    if not found:
        names = [key.name for key in known]
        # the search for the nearest name takes time by the square of the length
        near = difflib.get_close_matches(name[:100], names, n=3, cutoff=0.5)
        near = near or [full for full in names if name and name.rpartition(".")[2] in full][:3]
        remedy = f"did you mean {' or '.join(near)}?" if near else "bd3 config --reference lists all of them."
        raise ConfigError(f"no key {cut(name)}; {remedy}")
    return "\n".join(f"{key.name}: {key.kind}; {_default_words(key)}\n    {key.text}" for key in found) + "\n"


def markdown() -> str:
    """The reference: a heading, then a table for each section."""
    # this heading is where configs/README.md stops being written by hand
    lines = [HEADING, "", "Printed by `bd3 config --reference`; `bd3 config KEY` explains one key.", ""]
    known = keys()
    for section in dict.fromkeys(key.name.partition(".")[0] for key in known):
        lines += [f"### {section}", "", "| key | value | default | meaning |", "|---|---|---|---|"]
        rows = [key for key in known if key.name.partition(".")[0] == section]
        cells = (
            [f"`{k.name}`", k.kind, f"`{k.default}`" if k.default != "required" else k.default, k.text] for k in rows
        )
        lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells]
        lines.append("")
    return "\n".join(lines)


def keys() -> list[Key]:
    """Every key, in the order of the schema."""
    return list(_keys_of(Config, "", _field_texts()))


def _keys_of(cls: type, prefix: str, texts: Mapping[str, Mapping[str, str]]) -> Iterator[Key]:
    hints = typing.get_type_hints(cls, include_extras=True)
    # what a section inherits are options of what its own keys name
    for field in sorted(dataclasses.fields(cls), key=lambda field: field.name not in cls.__annotations__):
        hint = hints[field.name]
        nested = _nested(hint)
        is_list = nested is not None and any(typing.get_origin(h) is tuple for h in (hint, *typing.get_args(hint)))
        name = f"{prefix}{field.name}"
        # a section has no text of its own: its keys have
        if nested is None or prefix:
            # a field that the class inherits is documented where it is declared
            text = next(
                (texts[c.__name__][field.name] for c in cls.__mro__ if field.name in texts.get(c.__name__, {})), ""
            )
            yield Key(name=name, kind=_kind(hint), default=_default(field), text=text)
        if nested is not None:
            yield from _keys_of(nested, f"{name}{'[]' if is_list else ''}.", texts)


def _nested(hint: Any) -> type | None:
    """The dataclass inside an annotation."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint
    return next((inner for inner in map(_nested, typing.get_args(hint)) if inner is not None), None)


def _kind(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        # one law an annotation: a range, a path or a form
        law = args[1]
        if not isinstance(law, Range):
            return "path" if isinstance(law, FilePath) else _kind(args[0])
        return f"{'0 or ' if law.or_zero else ''}{'even ' if law.even else ''}{_kind(args[0])} in {law.interval}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_kind(a) for a in args if a is not type(None)) + (" or null" if type(None) in args else "")
    if origin is typing.Literal:
        return ", ".join(str(a) for a in args)
    if origin is tuple:
        size = "" if args[-1] is Ellipsis else f"{len(args)} x "
        return f"list of {size}{_kind(args[0])}"
    if origin is dict:
        return f"mapping from {_kind(args[0])} to {_kind(args[1])}"
    return "section" if dataclasses.is_dataclass(hint) else _KINDS[hint]


def _default(field: dataclasses.Field[Any]) -> str:
    # sections, and mappings that begin empty
    if field.default_factory is not dataclasses.MISSING:
        return "{}"
    if field.default is dataclasses.MISSING:
        return "required"
    return _as_yaml(field.default)


def _default_words(key: Key) -> str:
    return key.default if key.default == "required" else f"default {key.default}"


def _as_yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_as_yaml, value))}]"
    names = {None: "null", True: "true", False: "false"}
    return names[value] if value is None or isinstance(value, bool) else str(value)


def _field_texts() -> dict[str, dict[str, str]]:
    """Class -> field -> the docstring under it, from the sources of the schema."""
    # Python drops strings under fields, so they are read from the source
    found: dict[str, dict[str, str]] = {}
    modules = (schema, axes, experts, data)
    for node in (node for module in modules for node in ast.parse(inspect.getsource(module)).body):
        if isinstance(node, ast.ClassDef):
            found[node.name] = {
                field.target.id: " ".join(text.value.value.split())
                for field, text in zip(node.body, node.body[1:], strict=False)
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                if isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            }
    return found
