"""Every rule of the data section has its sentence."""

from __future__ import annotations

from typing import Any

import pytest

from bd3_megatron.config.load import config_from_tree, to_tree
from bd3_megatron.config.schema import Config
from bd3_megatron.config.validate import validate
from bd3_megatron.errors import ConfigError
from tests.unit.cost.cases import case

STREAM = {"dataset": "corpus", "shards": 4, "filters": [{"column": "score", "at_least": 3}]}


def run(**data: Any) -> Config:
    return case(data=data)


@pytest.mark.parametrize(
    "data",
    [
        {"mixture": {"web": 2, "books": 0}},
        {"stages": [{"mixture": {"web": 1}, "tokens": 9}, {"mixture": {"books": 1}}]},
        {"path": "sample", "stream": STREAM},
        {
            "text": ["a"],
            "stream": {"dataset": "a", "filters": [{"column": "keep", "equals": True, "one_of": [1, "b"]}]},
        },
    ],
)
def test_sources_of_every_kind_are_configured_and_survive_their_own_dump(data: dict[str, Any]) -> None:
    config = run(**data)
    validate(config)
    assert config_from_tree(to_tree(config)) == config


def test_folders_of_all_stages_are_sources_in_the_order_of_their_names() -> None:
    stages = [{"mixture": {"web": 1, "books": 1}, "steps": 2}, {"mixture": {"code": 2, "web": 1}}]
    assert run(stages=stages).data.mixed_folders == ("web", "books", "code")
    assert run(mixture={"b": 1, "a": 1}).data.mixed_folders == ("b", "a")
    assert run(path="a").data.mixtures == ()


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (
            {"mixture": {"a": 1}, "stream": STREAM},
            r"^data\.mixture and data\.stream each say what to train on; keep one of them\.$",
        ),
        (
            {"mixture": {"a/b": 1, "./a/b/": 2}},
            r"^data\.mixture names one folder twice, as a/b and \./a/b/; give it one weight\.$",
        ),
        ({"mixture": {"a": 0}}, r"^data\.mixture has no positive weight; give at least one folder a weight above 0\.$"),
        ({"stages": [{"mixture": {}}]}, r"^data\.stages\[0\]\.mixture has no positive weight; give"),
        (
            {"stages": [{"mixture": {"a": 1}, "steps": 1, "tokens": 2}]},
            r"^data\.stages\[0\] gives both steps=1 and tokens=2; give one\.$",
        ),
        (
            {"stages": [{"mixture": {"a": 1}}, {"mixture": {"b": 1}}]},
            r"^data\.stages\[0\] gives neither steps nor tokens and is not the last; give one\.$",
        ),
        (
            {"stages": [{"mixture": {"a": 1}, "steps": 1}, {"mixture": {"b": 1}, "tokens": 1}]},
            r"^data\.stages gives some lengths in steps and some in tokens; give all in one of them\.$",
        ),
        ({"stream": STREAM}, r"^data\.stream has neither data\.path nor data\.text, and tokenizer and held-out rows"),
        (
            {"path": "a", "stream": {"dataset": "a", "filters": [{"column": "c"}]}},
            r"^a filter on column c compares nothing; give equals, one_of, at_least, at_most or matches\.$",
        ),
        (
            {"path": "a", "stream": {"dataset": "a", "filters": [{"column": "c", "equals": [1]}]}},
            r"^data\.stream\.filters\[0\]\.equals=\[1\] is none of text, a whole number, a number or true or false; give",
        ),
        (
            {"path": "a", "stream": {"datset": "a"}},
            r"^unknown key data\.stream\.datset; did you mean data\.stream\.dataset",
        ),
    ],
)
def test_data_that_cannot_be_read_is_refused(data: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        validate(run(**data))
