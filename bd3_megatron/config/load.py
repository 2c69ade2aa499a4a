"""YAML into typed dataclasses, and back.

A file may name one `base:` parent, relative to itself; overrides `section.key=value` come last, and their values are YAML.
Unknown keys (with the nearest name), wrong types and values outside of their range are refused.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from bd3_megatron.config.schema import Config
from bd3_megatron.config.yaml_file import DEEPEST, parse_yaml, read_yaml
from bd3_megatron.errors import ConfigError, counted, cut, either, shown
from bd3_megatron.files import write_text

RECORD_KEY = "run.overridden"
"""What a command line named; in a file only where a launcher wrote it."""
RENAMED: Mapping[str, str] = types.MappingProxyType(
    {
        "diffusion.count_all_tokens": "diffusion.axes.denominator (`all` for true, left out for false)",
        "data.stream.lanes": "data.stream.shards",
    }
)
"""Keys that older versions had, and what took their part: such files and stored configurations are still about."""
MOST_BASES = 10
"""Files that name each other as base, one after another."""
_WORDS: Mapping[type, str] = types.MappingProxyType(
    {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file and apply overrides.

    Args:
        path: a YAML file.
        overrides: "section.key=value" strings; the value is read as YAML.

    Raises:
        ConfigError: missing or unreadable file, unknown key, wrong type, malformed override, a key given twice.
    """
    tree = _read_tree(Path(path), parents=())
    _refuse_repeated(overrides)
    for override in overrides:
        _apply_override(tree, override)
    config = build(Config, tree, where="")
    # a resumed run may change what was named, and nothing else that matters for training; without overrides the file's
    # record holds, by which a batch job keeps what was named when it was submitted
    return replace_field(config, RECORD_KEY, tuple(map(override_key, overrides))) if overrides else config


def override_key(override: str) -> str:
    """The key that an override "section.key=value" sets; blanks around its parts come with quotes in a shell."""
    return ".".join(part.strip() for part in override.partition("=")[0].split("."))


def config_from_tree(tree: Mapping[str, Any]) -> Config:
    """Build a Config from nested dictionaries (a stored config.yaml, a manifest).

    Raises:
        ConfigError: as `load_config`.
    """
    return build(Config, tree, where="")


def to_tree(config: Any) -> dict[str, Any]:
    """Nested plain dictionaries and lists of a config dataclass: `config_from_tree(to_tree(c)) == c`."""
    return _plain(dataclasses.asdict(config))


def dump_config(config: Config, path: Path) -> None:
    """Write the resolved configuration, whole or not at all."""
    write_text(path, yaml.safe_dump(to_tree(config), sort_keys=False))


def flatten(config: Config) -> dict[str, Any]:
    """`{"section.key": value}` of every field, for listing what differs between two runs."""
    return {f"{s}.{k}": v for s, section in to_tree(config).items() for k, v in section.items()}


def replace_field(config: Config, name: str, value: Any) -> Config:
    """A copy of `config` with `section.key` set to a typed value."""
    section, key = name.split(".")
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{key: value})})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _read_tree(path: Path, parents: tuple[Path, ...]) -> dict[str, Any]:
    tree = read_yaml(path, "config file", "the path of a YAML file such as configs/debug_cpu.yaml")
    named = f"config file '{cut(str(path))}'"
    # two names of one file are one file
    if path.resolve() in parents:
        raise ConfigError(f"{named} names itself as its base; remove the `base:` line from one of them.")
    if len(parents) >= MOST_BASES:
        raise ConfigError(f"{named} is the base of {len(parents)} files in a row; join some of them.")
    if not isinstance(tree, dict):
        raise ConfigError(f"{named} holds no sections; it must map section names to keys.")
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{named} has base={shown(base)}; give the path of one YAML file, relative to this one.")
    return _merge(_read_tree(path.parent / base, (*parents, path.resolve())), tree)


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        # sections are joined key by key; a list or a value of the child replaces the parent's whole
        deeper = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if deeper else value
    return merged


def with_later(overrides: Sequence[str], later: Sequence[str]) -> list[str]:
    """Overrides that hold where others do not say otherwise, and those others.

    Args:
        overrides: kept where `later` does not set the same key.
        later: of one task of a sweep, for example.
    """
    keys = [override_key(override) for override in later]
    return [text for text in overrides if not any(_sets(key, override_key(text)) for key in keys)] + list(later)


def _sets(key: str, name: str) -> bool:
    # a section replaces what was set below it, while keys below a section that was given add to it
    return name == key or name.startswith(f"{key}.")


def _refuse_repeated(overrides: Sequence[str]) -> None:
    given: dict[str, str] = {}
    for override in overrides:
        key = override_key(override)
        earlier = next((text for name, text in given.items() if _sets(key, name)), None)
        if earlier is not None:
            raise ConfigError(
                f"'{cut(earlier)}' and '{cut(override)}' set the same key, and only the last of them could count; leave one "
                "of them out."
            )
        given[key] = override


def _apply_override(tree: dict[str, Any], override: str) -> None:
    _, equals, text = override.partition("=")
    name = override_key(override)
    parts = name.split(".")
    said = f"override '{cut(override)}'"
    if name == RECORD_KEY:
        raise ConfigError(f"{said}: {RECORD_KEY} is the run's own record of what its command line named; leave it out.")
    # no key lies deeper than YAML may be nested
    if not equals or not 2 <= len(parts) <= DEEPEST or not all(parts):
        raise ConfigError(f"{said} is not of the form section.key=value; write for example parallel.tp=2.")
    node = tree
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        # `optim:` with nothing below it reads as null
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{said}: '{cut(part)}' is a value, not a section; write section.key=value.")
        node = child
    node[parts[-1]] = parse_yaml(text, said)


def build_named(cls: type, tree: Any, source: str) -> Any:
    """`build` of what was read from `source`, which begins every refusal.

    Raises:
        ConfigError: "SOURCE: unknown key ..."
    """
    try:
        return build(cls, tree, where="")
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def build(cls: type, tree: Any, where: str) -> Any:
    """An instance of dataclass `cls` from plain data: every key known, every value of its declared type and in its range.

    Raises:
        ConfigError: names the key by its full path `where`, with the nearest legal name, the expected type or the range.
    """
    if tree is None:
        tree = {}
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where or 'config'}={shown(tree)} is not a section; give keys and values below it.")
    # with extras: the ranges are part of the annotation
    hints = typing.get_type_hints(cls, include_extras=True)
    prefix = f"{where}." if where else ""
    for key in tree:
        if key not in hints:
            raise ConfigError(_unknown(prefix, str(key), list(hints)))
    missing = [f.name for f in dataclasses.fields(cls) if _required(f) and f.name not in tree]
    if missing:
        raise ConfigError(
            f"{prefix}{missing[0]} is not set and has no default; add it to the file or the command line."
        )
    return cls(**{key: _typed(value, hints[key], f"{prefix}{key}") for key, value in tree.items()})


def _required(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _unknown(prefix: str, key: str, known: list[str]) -> str:
    replaced = RENAMED.get(f"{prefix}{key}")
    if replaced is not None:
        return f"unknown key {prefix}{key}, which is of an older version; write {replaced} in its place."
    # the search for the nearest name takes time by the square of the length
    near = difflib.get_close_matches(key.strip()[:100], known, n=1, cutoff=0.5)
    remedy = f"did you mean {prefix}{near[0]}?" if near else f"known keys are {', '.join(known)}."
    # blanks around a key are seen only in quotes
    named = cut(key) if key == key.strip() else shown(key)
    return f"unknown key {prefix}{named}; {remedy}"


def _typed(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        typed = _typed(value, args[0], where)
        for law in args[1:]:
            law.check(typed, where)
        return typed
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _typed_member(value, [a for a in args if a is not type(None)], where)
    if origin is typing.Literal:
        # types too: True == 1 and 1.0 == 1, but `zero_stage: true` is a slip
        if any(value == a and type(value) is type(a) for a in args):
            return value
        raise ConfigError(f"{where}={shown(value)} is not allowed; use {either(args)}.")
    if hint is Any:
        return value
    if origin is list:
        return list(_typed_tuple(value, (args[0], ...), where))
    if origin is tuple:
        return _typed_tuple(value, args, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}={shown(value)} is not a mapping; give keys and values.")
        return {_typed(k, args[0], where): _typed(v, args[1], f"{where}.{cut(str(k))}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    return _typed_scalar(value, hint, where)


def _typed_tuple(value: Any, args: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{where}={shown(value)} is not a list; write it as [a, b].")
    if args[-1] is Ellipsis:
        return tuple(_typed(v, args[0], f"{where}[{i}]") for i, v in enumerate(value))
    if len(value) != len(args):
        raise ConfigError(f"{where}={shown(list(value))} has {counted(len(value), 'value')}; it takes {len(args)}.")
    return tuple(_typed(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, args, strict=True)))


def _typed_member(value: Any, members: list[Any], where: str) -> Any:
    if len(members) == 1:
        return _typed(value, members[0], where)
    # exact types: True is an int, and a filter that compares with 1 is another one
    if type(value) in members:
        return value
    raise ConfigError(f"{where}={shown(value)} is none of {either(_WORDS[m] for m in members)}; give one of them.")


def _typed_scalar(value: Any, hint: type, where: str) -> Any:
    if hint is float:
        value = _as_float(value)
        # NaN passes every comparison that a range could make with `not`
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{where}={value!r} is not finite; give a number.")
    # bool is a subclass of int: `steps: true` must not read as 1
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ConfigError(f"{where}={shown(value)} is not {_WORDS[hint]}; give {_WORDS[hint]}.")


def _as_float(value: Any) -> Any:
    """Whole numbers and texts such as 1e-3, which YAML 1.1 reads as text (it has no dot), as a float; others as they are."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return value
    try:
        return float(value)
    except ValueError:
        return value
    except OverflowError:
        # of a stored tree: YAML numbers fit 64 bits
        return math.inf
