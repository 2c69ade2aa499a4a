"""Zero-shot perplexity on the paper's seven sets, with error bars.

Contract: a set is a recipe of configs/data, tokenised by the model's own tokenizer and cut by the recipe's rule. A set
that cannot be had is reported as missing with its reason and does not stop the others. Refuses unknown sets.
Costs tokenising each set once under the work folder, then one evaluation a set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bd3_megatron.data.dataset_source import HubDataset
from bd3_megatron.data.loader import TokenDataset
from bd3_megatron.data.prepare import prepare
from bd3_megatron.data.recipe import SourceSpec, load_recipe
from bd3_megatron.data.source import Source
from bd3_megatron.data.text_files import TEXT_SUFFIXES, TextFiles
from bd3_megatron.errors import ConfigError, DataError, TokenizerError, cut, either, shown
from bd3_megatron.evaluate.perplexity import Estimate
from bd3_megatron.evaluate.tables import NORMAL_95, Column

SETS = {
    "ptb": "ptb.yaml",
    "wikitext": "wikitext103.yaml",
    "lm1b": "lm1b_gpt2.yaml",
    "lambada": "lambada.yaml",
    "ag_news": "ag_news.yaml",
    "pubmed": "pubmed.yaml",
    "arxiv": "arxiv.yaml",
}
"""Name and recipe of each set, in the order of the paper's table."""

ZERO_SHOT_COLUMNS = (
    Column("set", "set"),
    Column("perplexity", "perplexity", ".2f"),
    Column("low", "95% low", ".2f"),
    Column("high", "95% high", ".2f"),
    Column("nll_nats_per_token", "nats/token", ".4f"),
    Column("stderr_noise", "noise error", ".4f"),
    Column("stderr_text", "text error", ".4f"),
    Column("num_tokens", "tokens", ","),
    Column("missing", "missing because"),
)


@dataclass(frozen=True)
class SetRow:
    """One row of the table: an estimate, or why there is none."""

    name: str
    estimate: Estimate | None
    missing: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Values by column key; the interval is two-sided over text (and noise), on the scale of perplexity."""
        if self.estimate is None:
            return {"set": self.name, "missing": self.missing}
        found = self.estimate
        # The text error includes the noise; with one sequence only the noise is known.
        half = NORMAL_95 * (found.stderr_text if found.stderr_text is not None else found.stderr_noise)
        ends = {"low": found.shifted(-half), "high": found.shifted(half)}
        return {"set": self.name, **ends, **found.as_dict()}


def check_sets(names: Iterable[str]) -> None:
    """Refuse names of sets that are not known, before anything is loaded or prepared.

    Raises:
        ConfigError: the first of them.
    """
    for name in names:
        if name not in SETS:
            raise ConfigError(f"zero-shot set {shown(name)} is not known; use {either(SETS)}.")


def zero_shot(
    names: Sequence[str],
    score: Callable[[TokenDataset], Estimate],
    *,
    recipes: Path,
    work: Path,
    tokenizer_folder: Path,
    seq_len: int,
    local: Mapping[str, Path] | None = None,
) -> list[SetRow]:
    """Score sets one after the other.

    Args:
        names: of SETS.
        score: perplexity of rows.
        recipes: folder of the recipes (configs/data).
        work: where prepared sets are kept, a folder each.
        tokenizer_folder: the model's tokenizer.
        seq_len: L of the model.
        local: files that stand in for the hub, by set.

    Raises:
        ConfigError: an unknown set.
    """
    check_sets((*names, *(local or {})))
    rows = []
    for name in names:
        try:
            folder = prepare_set(
                recipes / SETS[name], work / name, tokenizer_folder=tokenizer_folder, local=(local or {}).get(name)
            )
            # Not shuffled: sequences are numbered by their row, and so is their noise.
            dataset = TokenDataset.open(folder / "valid", seq_len=seq_len, shuffle=False)
            rows.append(SetRow(name, score(dataset)))
        # offline clusters have some sets and not others: the table says which and why
        except (DataError, TokenizerError) as error:
            rows.append(SetRow(name, None, str(error)))
    return rows


def prepare_set(recipe_path: Path, out: Path, *, tokenizer_folder: Path, local: Path | None) -> Path:
    """Tokenise a set's scored split, or find it done.

    Args:
        recipe_path: of the set; its split `valid` is scored.
        out: prepared folder.
        tokenizer_folder: the model's.
        local: a file or folder instead of the recipe's dataset: text (a document a line) or what `datasets` reads.

    Raises:
        DataError, TokenizerError, ConfigError: what cannot be read or prepared.
    """
    # no held-out share: all of the scored split is scored, in rows with BOS and EOS where the recipe says so
    recipe = load_recipe(recipe_path)
    if "valid" not in recipe.sources:
        raise ConfigError(f"recipe '{cut(str(recipe_path))}' has no split valid, which is scored; add it.")
    request = recipe.request(out, tokenizer=str(tokenizer_folder), valid_fraction=0.0)
    source = request.sources["valid"] if local is None else _local_source(local, recipe.sources["valid"])
    request = recipe.request(out, tokenizer=str(tokenizer_folder), valid_fraction=0.0, sources={"valid": source})
    return prepare(request).folder


def _local_source(local: Path, spec: SourceSpec) -> Source:
    if not local.exists():
        raise DataError(f"{local} does not exist; give the set's file or folder.")
    if local.is_file() and local.suffix in TEXT_SUFFIXES:
        return TextFiles(paths=(str(local),), documents_are="line")
    # A single file has one split, which the library calls train.
    split = spec.split if local.is_dir() else "train"
    return HubDataset(path=str(local), split=split, column=spec.column)
