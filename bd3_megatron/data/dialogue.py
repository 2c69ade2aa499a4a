"""Documents of which only answers are predicted: a prompt and its answer, or a chat through a tokenizer's template.

Contract: a dialogue becomes spans of text, each supervised (an answer) or not (everything a user of the model will give). The
spans are encoded one by one, so that a prompt has the ids that it has when somebody samples.
Refuses (as bad documents, naming the row): answers without words, chats that no template renders, turns that a template writes
otherwise once more turns follow, contents that spell a control token.
Source: transformers' chat templates, and their {% generation %} mark.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bd3_megatron.data.source import BadDocument, Dialogue
from bd3_megatron.errors import cut

ANSWER_ROLE = "assistant"
PROMPT_ROLE = "user"
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REASON_CHARACTERS = 120


@dataclass(frozen=True)
class TextSpan:
    """A stretch of a document's text."""

    text: str
    is_supervised: bool
    """It is predicted; else it is given."""


Spans = tuple[TextSpan, ...]


def chat_of(messages: Any, where: str) -> Dialogue | BadDocument:
    """The dialogue of a row's list of messages.

    Args:
        messages: what the column holds.
        where: names the row.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return _bad(where, f"holds no list of messages but {type(messages).__name__}")
    turns = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            return _bad(where, f"has a message {number} without a text under role and content")
        # tables fill the keys that other rows have with null; templates ask whether a key is there
        turns.append({key: value for key, value in message.items() if value is not None})
    answers = [turn for turn in turns if turn["role"] == ANSWER_ROLE]
    if not answers:
        return _bad(where, f"has no turn of the {ANSWER_ROLE}, so there is nothing to learn")
    if any(not turn["content"].strip() for turn in answers):
        return _bad(where, f"has an empty answer (a turn of the {ANSWER_ROLE} without words)")
    return Dialogue(where, tuple(turns), is_chat=True)


def pair_of(prompt: Any, answer: Any, columns: tuple[str, str], where: str) -> Dialogue | BadDocument:
    """The dialogue of a row's prompt and answer, which stand one after the other as they are.

    Args:
        prompt, answer: what the columns hold.
        columns: their names.
        where: names the row.
    """
    for column, value in zip(columns, (prompt, answer), strict=True):
        if not isinstance(value, str):
            return _bad(where, f"holds no text but {type(value).__name__} in column {column}")
    if not answer.strip():
        return _bad(where, f"has an empty answer in column {columns[1]}")
    turns = ({"role": PROMPT_ROLE, "content": prompt}, {"role": ANSWER_ROLE, "content": answer})
    return Dialogue(where, turns, is_chat=False)


def plain_spans(dialogue: Dialogue) -> Spans:
    """The contents as they are; answers are supervised."""
    return tuple(
        TextSpan(turn["content"], turn["role"] == ANSWER_ROLE) for turn in dialogue.messages if turn["content"]
    )


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, and the texts in it that become single ids."""

    source: str
    """Jinja, as chat_template.jinja holds it."""
    named: Mapping[str, str]
    """bos_token, eos_token and so on, which templates write."""
    control: frozenset[str]
    """Texts that the tokenizer reads as control tokens; only the template may write them."""

    def spans(self, dialogue: Dialogue) -> Spans | BadDocument:
        """The text of a chat, and what of it is supervised.

        The end token behind the last turn is left out: packing writes the one that ends a document.
        """
        content = json.dumps(dialogue.messages, ensure_ascii=False, default=str)
        # Read as control tokens, such texts would end a turn, or begin one, in the name of somebody else.
        spelled = sorted(text for text in self.control if text in content)
        if spelled:
            return _bad(dialogue.where, f"spells the control token {cut(spelled[0], 40)} in a message")
        try:
            found = self._marked(dialogue) if _MARK.search(self.source) else self._compared(dialogue)
        # templates raise errors of their own, and the library's vary by version
        except Exception as error:
            reason = str(error).strip().splitlines()
            shown = cut(reason[0] if reason else type(error).__name__, _REASON_CHARACTERS)
            return _bad(dialogue.where, f"cannot be written by the chat template ({shown})")
        return found if isinstance(found, BadDocument) else self._without_end(found)

    def _marked(self, dialogue: Dialogue) -> Spans | BadDocument:
        """By the template's own marks around what the model generates."""
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, marks = render_jinja_template(
            [list(dialogue.messages)], chat_template=self.source, return_assistant_tokens_mask=True, **self.named
        )
        return _cut(texts[0], [(start, stop) for start, stop in marks[0] if stop > start], dialogue)

    def _compared(self, dialogue: Dialogue) -> Spans | BadDocument:
        """By what the template writes up to each answer, and with it."""
        messages, whole = dialogue.messages, self._text(dialogue.messages)
        marks = []
        for number, message in enumerate(messages):
            if message["role"] != ANSWER_ROLE:
                continue
            prompt = self._text(messages[:number], asks=True)
            through = self._text(messages[: number + 1])
            if not (whole.startswith(prompt) and through.startswith(prompt)):
                return _unclear(dialogue, number)
            answer = through[len(prompt) :]
            if not whole.startswith(answer, len(prompt)):
                # Earlier turns may lose what only the last one shows, as Qwen3's empty thoughts: then the answer is its
                # own content and what closes the turn.
                content = message["content"].strip()
                answer = content + answer.rpartition(content)[2]
                if not whole.startswith(answer, len(prompt)):
                    return _unclear(dialogue, number)
            marks.append((len(prompt), len(prompt) + len(answer)))
        return _cut(whole, marks, dialogue)

    def _text(self, messages: Sequence[Mapping[str, Any]], *, asks: bool = False) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, _ = render_jinja_template(
            [list(messages)], chat_template=self.source, add_generation_prompt=asks, **self.named
        )
        return str(texts[0])

    def _without_end(self, spans: Spans) -> Spans:
        end = self.named["eos_token"]
        kept = list(spans)
        while kept:
            text = kept[-1].text.rstrip().removesuffix(end)
            if text == kept[-1].text:
                break
            kept[-1] = TextSpan(text, kept[-1].is_supervised)
            if text:
                break
            kept.pop()
        return tuple(kept)


def _cut(text: str, marks: Sequence[tuple[int, int]], dialogue: Dialogue) -> Spans | BadDocument:
    """The text between and inside marks; adjacent marks stay separate spans."""
    if not marks:
        return _bad(dialogue.where, "has no answer that the chat template marks")
    spans, done = [], 0
    for start, stop in marks:
        spans += [TextSpan(text[done:start], False), TextSpan(text[start:stop], True)]
        done = stop
    return tuple(span for span in (*spans, TextSpan(text[done:], False)) if span.text)


def _unclear(dialogue: Dialogue, number: int) -> BadDocument:
    return BadDocument(
        where=dialogue.where,
        reason=f"has an answer (message {number}) that the chat template writes otherwise once more follows",
        remedy="mark what the model generates in the template with {% generation %}",
    )


def _bad(where: str, reason: str) -> BadDocument:
    return BadDocument(where=where, reason=reason, remedy="mend the row, or filter on it")
