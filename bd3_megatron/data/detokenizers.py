"""Detokenizers: undo the spacing that benchmark corpora put around punctuation, so that ordinary tokenizers fit them.

Contract: a detokenizer is a table of (pattern, replacement), applied in order over the whole document; plain strings are
replaced as they are, compiled patterns by regular expression.
Source: the official dataloader's wt_, ptb_, lm1b_, lambada_ and scientific_papers_detokenizer; the first goes back to
Megatron-LM's zero-shot GPT evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from re import Pattern

from bd3_megatron.errors import ConfigError, either, shown

Rule = tuple[str | Pattern[str], str]

_WIKITEXT: tuple[Rule, ...] = (
    ("s '", "s'"),
    # Known oddities stay, because published perplexities were measured with them: this line matches only text with the
    # slashes, and " N " -> " 1 " below belongs to PTB.
    (re.compile(r"/' [0-9]/"), "/'[0-9]/"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    (" : ", ": "),
    (" ; ", "; "),
    (" . ", ". "),
    (" ! ", "! "),
    (" ? ", "? "),
    (" , ", ", "),
    (re.compile(r"\(\s*([^\)]*?)\s*\)"), r"(\1)"),
    (re.compile(r"\[\s*([^\]]*?)\s*\]"), r"[\1]"),
    (re.compile(r"{\s*([^}]*?)\s*}"), r"{\1}"),
    (re.compile(r"\"\s*([^\"]*?)\s*\""), r'"\1"'),
    (re.compile(r"'\s*([^']*?)\s*'"), r"'\1'"),
    # Longest first: a later line sees what earlier ones left.
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \u00b0 ", "\u00b0"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)

_PTB: tuple[Rule, ...] = (
    (" 's", "'s"),
    ("s ' ", "s' "),
    (" n't", "n't"),
    (" \n ", "\n"),
    ("\\/", "/"),
    # One pass skips every second of " N N N ", whose spaces are shared; the source makes ten.
    *((" N ", " 1 "),) * 10,
    ("$ 1", "$1"),
    ("# 1", "#1"),
    ("<unk>", "?"),
)

_LM1B: tuple[Rule, ...] = (
    ("http : / / ", "http://"),
    ("https : / / ", "https://"),
    (re.compile(r" '(\w+)"), r"'\1"),
    (re.compile(r" (\w+) \. "), r" \1. "),
    (re.compile(r" (\w+) \.$"), r" \1."),
    (" ? ", "? "),
    (re.compile(r" \?$"), "?"),
    (" ! ", "! "),
    (re.compile(r" !$"), "!"),
    (" , ", ", "),
    (" : ", ": "),
    (" ; ", "; "),
    (" / ", "/"),
    (re.compile(r"\" ([^\"]+) \""), r'"\1"'),
    (re.compile(r"' ([^']+) '"), r"'\1'"),
    (re.compile(r"\( ([^\(\)]+) \)"), r"(\1)"),
    (re.compile(r"\[ ([^\[\]]+) \]"), r"[\1]"),
    ("$ ", "$"),
    ("\u00a3 ", "\u00a3"),
)

_LAMBADA: tuple[Rule, ...] = (
    ("\u201c", '"'),
    ("\u201d", '"'),
    (re.compile(r"\A\s*"), ""),
    (re.compile(r"\s*\Z"), ""),
    # The official code puts a line end before every LAMBADA text; perplexities depend on it.
    (re.compile(r"\A"), "\n"),
)

_TABLES: tuple[tuple[str, tuple[Rule, ...]], ...] = (
    ("none", ()),
    ("wikitext", _WIKITEXT),
    ("ptb", _PTB),
    ("lm1b", _LM1B),
    ("lambada", _LAMBADA),
    ("scientific_papers", (*_WIKITEXT, *_LM1B)),
)


def detokenizer_names() -> list[str]:
    return [name for name, _ in _TABLES]


def detokenizer(name: str) -> tuple[Rule, ...]:
    """The table of a corpus.

    Raises:
        ConfigError: unknown name.
    """
    tables = dict(_TABLES)
    if name not in tables:
        raise ConfigError(f"detokenizer={shown(name)} is not known; use {either(detokenizer_names())}.")
    return tables[name]


def apply_rules(rules: Sequence[Rule], text: str) -> str:
    """The text after all rules, in order."""
    for pattern, replacement in rules:
        if isinstance(pattern, str):
            text = text.replace(pattern, replacement)
        else:
            text = pattern.sub(replacement, text)
    return text
