"""Between text and tokens: what a continuation adds to its prompt, piece by piece, and where a stop string ends it.

Source: decoding new tokens beside the ones before them is what transformers' own streamers do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

# Tokens before the new ones that are decoded along: what a token looks like depends on its neighbours only.
CONTEXT_TOKENS = 16


class Decodes(Protocol):
    """A tokenizer, as far as it makes text of tokens."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...


def continuation_text(tokenizer: Decodes, given: Sequence[int], new: Sequence[int]) -> str:
    """What `new` adds to the text of `given`."""
    # decoding new tokens alone would lose the space that many vocabularies keep in front of a word
    context = list(given[-CONTEXT_TOKENS:])
    before = tokenizer.decode(context, skip_special_tokens=True)
    whole = tokenizer.decode([*context, *new], skip_special_tokens=True)
    if whole.startswith(before):
        return whole[len(before) :]
    return tokenizer.decode(new, skip_special_tokens=True)


class StopStrings:
    """Ends a text at the first stop string of its continuation; the token that completes it is the last one kept."""

    def __init__(self, tokenizer: Decodes, strings: Sequence[str], given: Sequence[Sequence[int]]) -> None:
        self._tokenizer, self._strings, self._given = tokenizer, tuple(strings), given
        # A token is at least one byte of the text, and a character at most four bytes.
        self._reach = 4 * max(map(len, strings)) + CONTEXT_TOKENS

    def __call__(self, request: int, tokens: Sequence[int], num_fresh: int) -> tuple[int, str] | None:
        """(tokens to keep, "string") once a stop string is complete; only what the fresh tokens can add is decoded."""
        first = max(0, len(tokens) - num_fresh - self._reach)
        if not self._holds(request, tokens, first, len(tokens)):
            return None
        for keep in range(len(tokens) - num_fresh + 1, len(tokens) + 1):
            if self._holds(request, tokens, first, keep):
                return keep, "string"
        return None

    def _holds(self, request: int, tokens: Sequence[int], first: int, stop: int) -> bool:
        before = [*self._given[request][-CONTEXT_TOKENS:], *tokens[max(0, first - CONTEXT_TOKENS) : first]]
        text = continuation_text(self._tokenizer, before, tokens[first:stop])
        return any(string in text for string in self._strings)
