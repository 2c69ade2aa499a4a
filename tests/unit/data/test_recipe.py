"""Every shipped recipe loads; what a recipe may not say is refused with the nearest name."""

from __future__ import annotations

from pathlib import Path

import pytest

from bd3_megatron.config.data import RowFilter
from bd3_megatron.data.dataset_source import HubDataset
from bd3_megatron.data.prepare import prepare
from bd3_megatron.data.recipe import load_recipe
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
    assert lm1b.sources["valid"].split == "test"
    laid = {name: recipe.request(Path("out")).packing for name, recipe in by_name.items()}
    assert laid["lm1b"]["train"] == laid["lm1b"]["valid"] == {"append_eos": True, "wrap_special": True}
    assert owt.tokenizer == "gpt2" and owt.detokenizer == "none"
    assert (owt.sources["train"].split, owt.sources["valid"].split) == ("train[:-100000]", "train[-100000:]")
    assert laid["openwebtext"] == {
        "train": {"append_eos": True, "wrap_special": False},
        "valid": {"append_eos": False, "wrap_special": False},
    }
    for name in ZERO_SHOT:
        assert laid[name]["valid"] == {"append_eos": False, "wrap_special": True}
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
        (
            "about: x\nsources: {}\ntokeniser: bytes",
            r"^recipe '.*r\.yaml': unknown key tokeniser; did you mean tokenizer\?$",
        ),
        ("about: x\nsources: {}\nzzz: 1", "unknown key zzz; known keys are about, sources"),
        ("sources: {}", "about is not set and has no default; add it"),
        ("about: x", "sources is not set and has no default; add it"),
        ("- a", "holds no keys; see configs/data"),
        ("a: [", "is not valid YAML"),
        ("about: x\nsources: {}\nvocab_size: many", "vocab_size='many' is not a whole number; give a whole number"),
        ("about: x\nsources: {}\nvalid_fraction: true", "valid_fraction=True is not a number; give a number"),
        ("about: x\nsources: {train: 3}", r"sources\.train=3 is not a section; give keys"),
        ("about: x\nsources: {train: {text: 3}}", r"sources\.train\.text=3 is not a list; write it as"),
        (f"about: x\nsources: {{}}\n{'z' * 500}: 1", r"unknown key z+\.\.\.z+; known keys are about"),
        ("about: x\nsources: {train: {}}", "source train names 0 of text, builtin, dataset; name exactly one"),
        ("about: x\nsources: {train: {text: a, builtin: b}}", "source train names 2 of text, builtin, dataset"),
        (
            "about: x\nsources: {train: {text: a, colum: b}}",
            r"unknown key sources\.train\.colum; did you mean sources\.train\.column\?",
        ),
        (
            "about: x\nsources: {train: {dataset: a, filters: [{equals: b}]}}",
            r"sources\.train\.filters\[0\]\.column is not set and has no default",
        ),
        (
            "about: x\nsources: {train: {dataset: a, filters: [{column: b}]}}",
            "filter on column b compares nothing; give equals",
        ),
        (
            "about: x\nsources: {}\npacking: {train: {append_bos: true}}",
            r"unknown key packing\.train\.append_bos; did you mean packing\.train\.append_eos\?",
        ),
        ("about: x\nsources: {}\ndetokenizer: brown", "detokenizer='brown' is not known"),
        ("about: x\nsources: {}\nvocab_size: 1", r"vocab_size=1 is outside \[2, 1e7\]; give a whole number"),
        ("about: x\nsources: {}\nvalid_fraction: 0.6", r"valid_fraction=0\.6 is outside \[0, 0\.5\]"),
        (
            "about: x\nsources: {train: {dataset: a, rows_per_part: 0}}",
            r"sources\.train\.rows_per_part=0 is outside \[1, 1e9\]",
        ),
        (
            "about: x\nsources: {train: {dataset: a, filters: [{column: b, matches: '('}]}}",
            r"filters\[0\]\.matches='\(' is no regular expression",
        ),
        (
            "about: x\nsources: {train: {dataset: a, filters: [{column: b, equals: [1]}]}}",
            r"filters\[0\]\.equals=\[1\] is none of",
        ),
        (
            "about: x\nsources: {train: {text: a, column: b}}",
            "^source train has column, which text does not take; use text, documents",
        ),
        ("about: x\nsources: {../x: {text: a}}", "sources='../x' is not a split's name"),
        ("about: x\nsources: {tokenizer: {text: a}}", "sources='tokenizer' is not a split's name"),
        (
            "about: x\nsources: {train: {text: a}}\npacking: {test: {append_eos: true}}",
            r"packing\.test, and makes no split test",
        ),
    ],
)
def test_recipes_that_cannot_be_are_refused(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(ConfigError, match=sentence):
        load_recipe(tmp_path / "r.yaml")


def test_a_missing_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^recipe '.*none.yaml' does not exist; give one of configs/data"):
        load_recipe(tmp_path / "none.yaml")
