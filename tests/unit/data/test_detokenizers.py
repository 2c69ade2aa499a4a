"""Detokenizers undo a corpus' spacing as the published ones do."""

from __future__ import annotations

import pytest

from bd3_megatron.data.detokenizers import apply_rules, detokenizer, detokenizer_names
from bd3_megatron.errors import ConfigError

CASES = [
    ("none", " a , b ", " a , b "),
    ("wikitext", " = Title = \n It was 1 @,@ 000 @.@ 5 well @-@ known .", " = Title =\nIt was 1,000.5 well-known ."),
    ("wikitext", 'the dog \'s ( big ) [ red ] { old } " bone " , and ; so : it ! is ? end . More', None),
    ("ptb", "mr. <unk> is n't N N the company 's $ N \\/ # N the dogs ' N", None),
    ("lm1b", 'He said , " go ( now ) " : it \'s $ 5 / day ! http : / / x . y .', None),
    ("lambada", "  \u201cHi,\u201d she said. \n", '\n"Hi," she said.'),
    ("scientific_papers", "a @-@ b ( c ) 's $ 5 / day ?", None),
]


def published(name: str, text: str) -> str:
    """The official functions' behaviour on the cases, worked out by hand."""
    by_hand = {
        "wikitext": 'the dog\'s (big) [red] {old} "bone", and; so: it! is? end. More',
        "ptb": "mr. ? isn't 1 1 the company's $1 / #1 the dogs' N",
        "lm1b": 'He said, "go (now)": it\'s $5/day! http://x . y.',
        "scientific_papers": "a-b (c)'s $5/day?",
    }
    return by_hand[name]


@pytest.mark.parametrize(("name", "text", "expected"), CASES)
def test_spacing_is_undone(name: str, text: str, expected: str | None) -> None:
    assert apply_rules(detokenizer(name), text) == (published(name, text) if expected is None else expected)


def test_ptb_numbers_that_share_their_spaces_are_all_replaced() -> None:
    assert apply_rules(detokenizer("ptb"), "a N N N N N b") == "a 1 1 1 1 1 b"


def test_unknown_detokenizers_are_refused() -> None:
    assert "wikitext" in detokenizer_names()
    with pytest.raises(ConfigError, match="detokenizer='brown' is not known; use none, wikitext, ptb"):
        detokenizer("brown")
