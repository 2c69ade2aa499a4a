"""Recipes: a prepared folder described in a YAML file of configs/data/.

Decides: the fields below; sources by split, each with exactly one of `text`, `builtin` or `dataset`; how special tokens
are laid when the split is packed, which goes into its header and holds unless training says otherwise.
Refuses: unknown keys (the nearest name is offered), missing or several sources, values of another type.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from bd3_megatron.config.yaml_file import read_yaml
from bd3_megatron.data.dataset_source import HubDataset
from bd3_megatron.data.detokenizers import detokenizer
from bd3_megatron.data.prepare import PrepareRequest
from bd3_megatron.data.row_filter import RowFilter
from bd3_megatron.data.source import Source
from bd3_megatron.data.sources import BuiltinText
from bd3_megatron.data.text_files import TextFiles
from bd3_megatron.errors import ConfigError, cut, shown

_DATASET_KEYS = (
    "dataset",
    "name",
    "split",
    "column",
    "filters",
    "streaming",
    "data_files",
    "revision",
    "rows_per_part",
)
_SOURCE_KEYS = ("text", "documents", "builtin", *_DATASET_KEYS)
_PACKING_KEYS = ("append_eos", "wrap_special")
_KINDS = ("text", "builtin", "dataset")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One file of configs/data/."""

    about: str
    """What it is, for people."""
    sources: Mapping[str, Mapping[str, Any]]
    """By split: text (list of files), builtin (name) or dataset (file, folder, hub name) with its options."""
    tokenizer: str = "bytes"
    vocab_size: int = 2048
    valid_fraction: float = 0.0
    detokenizer: str = "none"
    packing: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)
    """By split: append_eos and wrap_special."""

    def request(self, out: Path, **changes: Any) -> PrepareRequest:
        """What to prepare.

        Args:
            out: folder to make.
            changes: fields of PrepareRequest that override the recipe's.
        """
        stated: dict[str, Any] = {
            "sources": {split: _source(split, spec) for split, spec in self.sources.items()},
            "tokenizer": self.tokenizer,
            "vocab_size": self.vocab_size,
            "valid_fraction": self.valid_fraction,
            "detokenizer": self.detokenizer,
            "packing": self.packing,
        }
        # The command line wins over the recipe.
        return PrepareRequest(out=out, **(stated | changes))


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        ConfigError: see the module's refusals.
    """
    content = read_yaml(path, "recipe", "one of configs/data")
    if not isinstance(content, dict):
        raise ConfigError(f"recipe {path} holds no keys; see configs/data for examples.")
    _check_keys(content, [f.name for f in fields(Recipe)], str(path))
    for key in ("about", "sources"):
        if key not in content:
            raise ConfigError(f"recipe {path} has no key {key}; add it.")
    _check_types(content, path)
    for split, rule in content.get("packing", {}).items():
        _check_keys(rule, list(_PACKING_KEYS), f"packing.{split} of {path}")
    recipe = Recipe(**content)
    # Opened and thrown away: an unknown name or a bad source is refused when the recipe is read, not hours later.
    detokenizer(recipe.detokenizer)
    # Built and thrown away, for the refusals of the source's own checks.
    for split, spec in recipe.sources.items():
        _source(split, spec)
    return recipe


def _source(split: str, spec: Mapping[str, Any]) -> Source:
    _check_keys(spec, list(_SOURCE_KEYS), f"source {split}")
    kinds = [kind for kind in _KINDS if kind in spec]
    # With two kinds it would be the order of the code that decides which text is used.
    if len(kinds) != 1:
        raise ConfigError(f"source {split} names {len(kinds)} of {', '.join(_KINDS)}; name exactly one.")
    if kinds[0] == "text":
        texts = spec["text"]
        # A lone path is allowed; iterating over it would give its letters.
        paths = (texts,) if isinstance(texts, str) else tuple(texts) if isinstance(texts, list) else ()
        if not paths or not all(isinstance(path, str) for path in paths):
            raise ConfigError(f"source {split} has text={shown(texts)}; give a path, or a list of paths.")
        return TextFiles(paths=paths, documents_are=spec.get("documents", "paragraph"))
    if kinds[0] == "builtin":
        return BuiltinText(name=spec["builtin"])
    options = {key: spec[key] for key in _DATASET_KEYS if key in spec and key not in ("dataset", "filters")}
    filters = tuple(_row_filter(one, f"a filter of source {split}") for one in spec.get("filters", ()))
    return HubDataset(path=spec["dataset"], filters=filters, **options)


def _row_filter(spec: Any, where: str) -> RowFilter:
    if not isinstance(spec, Mapping):
        raise ConfigError(f"{where} holds {str(spec):.80}, not keys; use column and comparisons.")
    return RowFilter.from_dict(spec, where)


def _check_keys(content: Any, known: list[str], where: str) -> None:
    if not isinstance(content, Mapping):
        raise ConfigError(f"{cut(where)} holds {shown(content)}, not keys; use {', '.join(known)}.")
    for key in content:
        if key not in known:
            # Cut, since the search takes quadratic time and keys come from outside.
            near = difflib.get_close_matches(key[:100], known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"use {', '.join(known)}."
            raise ConfigError(f"{cut(where)} has an unknown key {cut(key)}; {hint}")


def _check_types(content: Mapping[str, Any], path: Path) -> None:
    expected: dict[str, tuple[type, ...]] = {
        "about": (str,),
        "sources": (dict,),
        "tokenizer": (str,),
        "vocab_size": (int,),
        "valid_fraction": (int, float),
        "detokenizer": (str,),
        "packing": (dict,),
    }
    for key, value in content.items():
        # True is an int in Python; no key at this level is a switch.
        if not isinstance(value, expected[key]) or isinstance(value, bool):
            wanted = " or ".join(kind.__name__ for kind in expected[key])
            raise ConfigError(f"{key}={shown(value)} of recipe {cut(str(path))} is not {wanted}; mend it.")
