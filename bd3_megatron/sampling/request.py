"""What the sampler is asked and what it answers: prompts, options, results; and the sentences for bad requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bd3_megatron.errors import SamplingError, shown
from bd3_megatron.hf.decoding_options_bd3 import DecodingOptions

Prompt = str | Sequence[int]
MOST = 10**7
"""Samples, tokens of one and samples together; what a machine cannot hold is above it."""


@dataclass(frozen=True)
class SampleResult:
    """One finished text."""

    tokens: list[int]
    """new tokens only; of an infilled text, all of it"""
    text: str | None
    """what the new tokens add to the prompt, without special tokens and stop string; None without a tokenizer"""
    prompt_tokens: list[int]
    prompt_index: int
    """which prompt of the request"""
    sample_index: int
    """which of its samples"""
    num_forwards: int
    """forwards this text took part in until it was finished"""
    seconds: float
    """from the start of its batch until it was finished"""
    stop_reason: str
    """"length", "eos" or "string" """


@dataclass(frozen=True)
class StreamedBlock:
    """A block of a text, as soon as it is decided."""

    tokens: list[int]
    text: str | None
    """None without a tokenizer; a character cut by the block's end comes with the next block"""
    stop_reason: str | None
    """set on the last block"""


@contextmanager
def as_sampling_errors() -> Iterator[None]:
    """The engine travels without this package's errors: its ValueErrors become SamplingErrors."""
    try:
        yield
    except ValueError as error:
        raise SamplingError(str(error)) from None


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list.

    Raises:
        SamplingError: there is none.
    """
    if isinstance(prompts, str):
        return [prompts]
    listed = list(prompts)
    # A list of numbers is one prompt of ids, not several prompts.
    if listed and all(isinstance(item, int) for item in listed):
        return [listed]  # type: ignore[list-item]
    if not listed:
        raise SamplingError("no prompts were given; give at least one (an empty string starts from BOS).")
    return listed  # type: ignore[return-value]


def new_options(seed: int, options: dict[str, Any]) -> DecodingOptions:
    """Checked decoding options.

    Raises:
        SamplingError: an unknown option, or one outside its range.
    """
    # DecodingOptions would raise a TypeError without naming what it knows
    known = sorted(DecodingOptions.__dataclass_fields__)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise SamplingError(f"unknown option {', '.join(unknown)}; use {', '.join(known)}.")
    with as_sampling_errors():
        return DecodingOptions(seed=seed, **options)


def check_count(name: str, value: int) -> None:
    """Refuse a number of things below 1, or of more than can have been meant.

    Raises:
        SamplingError: value, law and remedy.
    """
    if not 1 <= value <= MOST:
        raise SamplingError(f"{name}={shown(value)} is out of range; use 1 to {MOST}.")


def check_text(name: str, text: str) -> None:
    """Refuse a text that has no UTF-8: the shell handed over other bytes.

    Raises:
        SamplingError: names the option.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise SamplingError(f"{name} {shown(text)} is not UTF-8; give it in UTF-8, or token ids.") from None
