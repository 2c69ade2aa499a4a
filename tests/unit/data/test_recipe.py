"""Every shipped recipe loads; what a recipe may not say is refused with the nearest name."""

from __future__ import annotations

from pathlib import Path

import pytest

from bd3_megatron.data.dataset_source import HubDataset
from bd3_megatron.data.prepare import prepare
from bd3_megatron.data.recipe import load_recipe
from bd3_megatron.data.row_filter import RowFilter
from bd3_megatron.data.sources import BuiltinText
from bd3_megatron.data.text_files import TextFiles
from bd3_megatron.errors import ConfigError

RECIPES = sorted((Path(__file__).resolve().parents[3] / "configs" / "data").glob("*.yaml"))
ZERO_SHOT = ("ag_news", "arxiv", "lambada", "lm1b_gpt2", "ptb", "pubmed", "wikitext2", "wikitext103")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_sound(path: Path) -> None:
    recipe = load_recipe(path)
    request = recipe.request(Path("out"), tokenizer="bytes")
    assert request.tokenizer == "bytes" and recipe.about and request.sources
    assert "train" in request.sources or "valid" in request.sources
    assert set(request.packing) <= set(request.sources)
    for source in request.sources.values():
        assert isinstance(source, HubDataset | BuiltinText | TextFiles)


def test_the_papers_corpora_are_laid_as_in_the_paper() -> None:
    by_name = {path.stem: load_recipe(path) for path in RECIPES}
    lm1b, owt = by_name["lm1b"], by_name["openwebtext"]
    assert lm1b.tokenizer == "bert-base-uncased" and lm1b.detokenizer == "lm1b"
    assert lm1b.sources["valid"]["split"] == "test"
    assert lm1b.packing["train"] == lm1b.packing["valid"] == {"append_eos": True, "wrap_special": True}
    assert owt.tokenizer == "gpt2" and owt.detokenizer == "none"
    assert (owt.sources["train"]["split"], owt.sources["valid"]["split"]) == ("train[:-100000]", "train[-100000:]")
    assert owt.packing == {
        "train": {"append_eos": True, "wrap_special": False},
        "valid": {"append_eos": False, "wrap_special": False},
    }
    for name in ZERO_SHOT:
        assert by_name[name].packing["valid"] == {"append_eos": False, "wrap_special": True}
        assert by_name[name].tokenizer == "gpt2"


def test_a_recipe_of_own_text_prepares(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "own.yaml").write_text(
        f"about: own\nsources:\n  train: {{text: {tmp_path}/a.txt, documents: line}}\nvalid_fraction: 0.4\n"
    )
    made = prepare(load_recipe(tmp_path / "own.yaml").request(tmp_path / "out"))
    assert made.num_documents["train"] + made.num_documents["valid"] == 3


def test_filters_travel_from_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text(
        "about: f\nsources:\n  train:\n    dataset: some/name\n    streaming: true\n"
        "    filters: [{column: lang, one_of: [en, de]}, {column: text, at_least: 10}]\n"
    )
    source = load_recipe(tmp_path / "f.yaml").request(Path("out")).sources["train"]
    assert isinstance(source, HubDataset) and source.streaming
    assert source.filters == (RowFilter(column="lang", one_of=("en", "de")), RowFilter(column="text", at_least=10))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("about: x\nsources: {}\ntokeniser: bytes", "has an unknown key tokeniser; did you mean tokenizer?"),
        ("about: x\nsources: {}\nzzz: 1", "has an unknown key zzz; use about, sources"),
        ("sources: {}", "has no key about; add it"),
        ("about: x", "has no key sources; add it"),
        ("- a", "holds no keys; see configs/data"),
        ("a: [", "is not valid YAML"),
        ("about: x\nsources: {}\nvocab_size: many", "vocab_size='many' of recipe .* is not int; mend it"),
        ("about: x\nsources: {}\nvalid_fraction: true", "valid_fraction=True of recipe .* is not int or float"),
        ("about: x\nsources: {train: 3}", "source train holds 3, not keys; use text"),
        ("about: x\nsources: {train: {text: 3}}", r"^source train has text=3; give a path, or a list of paths\.$"),
        (f"about: x\nsources: {{}}\n{'z' * 500}: 1", r"has an unknown key z+\.\.\.z+; use about"),
        ("about: x\nsources: {train: {}}", "source train names 0 of text, builtin, dataset; name exactly one"),
        ("about: x\nsources: {train: {text: a, builtin: b}}", "source train names 2 of text, builtin, dataset"),
        ("about: x\nsources: {train: {text: a, colum: b}}", "unknown key colum; did you mean column?"),
        (
            "about: x\nsources: {train: {dataset: a, filters: [{equals: b}]}}",
            "a filter of source train names no column",
        ),
        (
            "about: x\nsources: {train: {dataset: a, filters: [{column: b}]}}",
            "filter on b compares nothing; give equals",
        ),
        (
            "about: x\nsources: {}\npacking: {train: {append_bos: true}}",
            "unknown key append_bos; did you mean append_eos?",
        ),
        ("about: x\nsources: {}\ndetokenizer: brown", "detokenizer=brown is not known"),
    ],
)
def test_recipes_that_cannot_be_are_refused(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(ConfigError, match=sentence):
        load_recipe(tmp_path / "r.yaml")


def test_a_missing_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^recipe '.*none.yaml' does not exist; give one of configs/data"):
        load_recipe(tmp_path / "none.yaml")
