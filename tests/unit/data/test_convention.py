"""The evaluation convention: what it refuses, what an override changes, and that a record reads back as it was."""

from __future__ import annotations

import json

import pytest

from bd3_megatron.data.convention import EvaluationConvention, convention_from_json
from bd3_megatron.errors import ConfigError


def test_a_record_reads_back_as_it_was() -> None:
    convention = EvaluationConvention(packing="isolated", aligned_block=16, first_token_given=True, min_t=0.01)
    assert convention_from_json(json.loads(json.dumps(convention.to_json())), "config.json") == convention
    assert convention_from_json({}, "config.json") == EvaluationConvention()


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"pack": "wrap"}, "config.json: evaluation.pack='wrap' is no part of an evaluation convention; use packing"),
        ({"append_eos": 1}, "evaluation.append_eos='1' is no part"),
        ({"aligned_block": True}, "evaluation.aligned_block='True' is no part"),
        ({"min_t": "0.1"}, "evaluation.min_t='0.1' is no part"),
        ({"packing": "stack"}, "packing='stack' is not known; use wrap, isolated or pad"),
        ({"min_t": 1}, r"min_t=1 is outside \[0.001, 1\); use 0.001 as in the paper"),
        ({"min_t": 0.0009}, "min_t=0.0009 is outside"),
    ],
)
def test_what_no_evaluation_can_have_is_refused(record: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        convention_from_json(record, "config.json")


def test_an_override_says_what_differs_and_only_that() -> None:
    own = EvaluationConvention(wrap_special=True)
    assert own.changed(packing=None, min_t=None) == (own, ())
    other, names = own.changed(packing="wrap", first_token_given=True)
    assert (other.wrap_special, names) == (True, ("first_token_given",))
    # rows between BOS and EOS exist under wrap only
    other, names = own.changed(packing="pad")
    assert (other.wrap_special, names) == (False, ("packing", "wrap_special"))
    with pytest.raises(ConfigError, match="wrap_special=True needs packing=wrap"):
        own.changed(packing="pad", wrap_special=True)[0].packing_rule(8)


def test_the_sentence_names_every_part() -> None:
    assert EvaluationConvention().sentence() == (
        "wrap packing, an end token after every document, every token of a row counted, noise levels from 0.001"
    )
    isolated = EvaluationConvention(packing="isolated", aligned_block=4, append_eos=False, first_token_given=True)
    assert isolated.sentence() == (
        "isolated packing aligned to 4, no end tokens, the first token of a row given, noise levels from 0.001"
    )
