"""Recipes: a prepared folder described in a YAML file of configs/data/.

Decides: the fields below with their types and ranges, checked as those of a configuration are; how special tokens are laid
when a split is packed, which goes into its header and holds unless training says otherwise.
Refuses: a split with none or several of text, builtin and dataset, options of another kind, packing of a split that is
not made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from bd3_megatron.config.data import DEFAULT_NUM_PIECES, HeldOutShare, NumPieces, TableOptions, options_of
from bd3_megatron.config.load import build_named
from bd3_megatron.config.ranges import Matches, PathText
from bd3_megatron.config.yaml_file import read_yaml
from bd3_megatron.data.dataset_source import HubDataset
from bd3_megatron.data.detokenizers import detokenizer
from bd3_megatron.data.prepare import PrepareRequest
from bd3_megatron.data.source import Source
from bd3_megatron.data.sources import BuiltinText
from bd3_megatron.data.text_files import TextFiles
from bd3_megatron.errors import ConfigError, cut

# a split becomes a folder of its name, beside the one of the tokenizer
SplitName = Annotated[str, Matches(r"(?!tokenizer$)[\w-]{1,100}", "a split's name: letters, digits, _ and -")]


@dataclass(frozen=True, kw_only=True)
class SourceSpec(TableOptions):
    """The text of one split: exactly one of text, builtin and dataset; the options inherited are of a dataset."""

    text: tuple[PathText, ...] | None = None
    """UTF-8 files, or folders of them; one path may stand without a list."""
    documents: str = "paragraph"
    """With text, where a document ends: paragraph, line or file."""
    builtin: str | None = None
    """Text every Python has: python-docs or python-topics."""
    dataset: PathText | None = None
    """File, folder or hub name."""

    def source(self, split: str) -> Source:
        """What reads this text.

        Raises:
            ConfigError: none or several kinds, or options of another kind than the one named.
        """
        kinds = [kind for kind in _OPTIONS if getattr(self, kind) is not None]
        # With two kinds it would be the order of the code that decides which text is used.
        if len(kinds) != 1:
            raise ConfigError(f"source {split} names {len(kinds)} of {', '.join(_OPTIONS)}; name exactly one.")
        [kind] = kinds
        known = (kind, *_OPTIONS[kind])
        for one in fields(self):
            # An option that nothing heeds was meant to do something.
            if one.name not in known and getattr(self, one.name) != one.default:
                raise ConfigError(f"source {split} has {one.name}, which {kind} does not take; use {', '.join(known)}.")
        if self.text is not None:
            return TextFiles(paths=self.text, documents_are=self.documents)
        if self.builtin is not None:
            return BuiltinText(name=self.builtin)
        return HubDataset(path=str(self.dataset), **options_of(self, TableOptions))


_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "text": ("documents",),
    "builtin": (),
    "dataset": tuple(one.name for one in fields(TableOptions)),
}
"""The kinds of sources, and what each takes beside its name."""


@dataclass(frozen=True, kw_only=True)
class PackingSpec:
    """How special tokens are laid in the rows of one split; null: as training says."""

    append_eos: bool | None = None
    """An end token after every document."""
    wrap_special: bool | None = None
    """Rows are BOS, text, EOS."""

    def stated(self) -> dict[str, bool]:
        """What the recipe says, without what it leaves open."""
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One file of configs/data/."""

    about: str
    """What it is, for people."""
    sources: dict[SplitName, SourceSpec]
    """Text by split."""
    tokenizer: PathText = "bytes"
    """bytes, sentencepiece, sentencepiece-bpe (trained on the text), a file, a folder or a hub name."""
    vocab_size: NumPieces = DEFAULT_NUM_PIECES
    """With a trained tokenizer: its number of pieces."""
    valid_fraction: HeldOutShare = 0.0
    """Share of train's documents held out, where no valid is given."""
    detokenizer: str = "none"
    """Table of replacements that undoes a corpus's own spacing."""
    packing: dict[SplitName, PackingSpec] = field(default_factory=dict)
    """By split, where a split has rules of its own."""

    def request(self, out: Path, **changes: Any) -> PrepareRequest:
        """What to prepare.

        Args:
            out: folder to make.
            changes: fields of PrepareRequest that override the recipe's.
        """
        stated: dict[str, Any] = {
            "sources": {split: spec.source(split) for split, spec in self.sources.items()},
            "tokenizer": self.tokenizer,
            "vocab_size": self.vocab_size,
            "valid_fraction": self.valid_fraction,
            "detokenizer": self.detokenizer,
            "packing": {split: spec.stated() for split, spec in self.packing.items()},
        }
        # The command line wins over the recipe.
        return PrepareRequest(out=out, **(stated | changes))


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        ConfigError: see the module's refusals.
    """
    content = read_yaml(path, "recipe", "one of configs/data")
    named = f"recipe '{cut(str(path))}'"
    if not isinstance(content, dict):
        raise ConfigError(f"{named} holds no keys; see configs/data for examples.")
    recipe: Recipe = build_named(Recipe, _with_lists(content), named)
    # Opened and thrown away: an unknown name or a bad source is refused when the recipe is read, not hours later.
    detokenizer(recipe.detokenizer)
    for split, spec in recipe.sources.items():
        spec.source(split)
    for split in recipe.packing:
        # train's documents may give valid too
        if split not in recipe.sources and not (split == "valid" and "train" in recipe.sources):
            raise ConfigError(f"{named} has packing.{split}, and makes no split {split}; leave it out.")
    return recipe


def _with_lists(content: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's tree, a lone path in `text` as a list of one."""
    sources = content.get("sources")
    if not isinstance(sources, Mapping):
        return dict(content)
    # Iterating over a lone path would give its letters.
    wrapped = {
        split: spec | {"text": [spec["text"]]} if isinstance(spec, dict) and isinstance(spec.get("text"), str) else spec
        for split, spec in sources.items()
    }
    return dict(content) | {"sources": wrapped}
