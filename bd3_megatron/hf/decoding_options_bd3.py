"""Options of decoding: one frozen record, checked once, and the table of rules.

Defaults are the model's own distribution: first-hitting, temperature 1, no filters, the recomputed window, and text of
exactly the length asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .decoding_rules_bd3 import (
    Ancestral,
    ConfidenceThreshold,
    DecodingRule,
    EntropyBounded,
    FirstHitting,
    LeftToRight,
    StaticTopK,
)
from .philox import MAX_SEED
from .token_choice_bd3 import TokenFilters
from .window_bd3 import WINDOWS

# Beyond it the draw is uniform in all but name.
MAX_TEMPERATURE = 100.0
MAX_STEPS = 100_000
"""The paper takes at most 10,000 for 1,024 tokens."""
MAX_TOP_K = 2**31 - 1
PENALTIES = (0.01, 100.0)
"""Logits times or over a number beyond these may leave fp32."""


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How text is decoded.

    Raises:
        ValueError: an unknown rule or window, or a number outside its range.
    """

    seed: int = 0
    """in [0, 2^48); with a sample's key and a position it fixes every draw"""
    rule: str = "first_hitting"
    """see RULES"""
    steps: int | None = None
    """time steps (ancestral) or forwards a block (top_k_static; the most for confidence_threshold); None = S"""
    threshold: float = 0.9
    """probability above which confidence_threshold reveals a candidate, in [0, 1]"""
    entropy_bound: float = 0.1
    """budget of entropy_bounded in nats a forward, >= 0"""
    temperature: float = 1.0
    """0 (greedy) to 100"""
    top_p: float = 1.0
    """mass of the nucleus, in (0, 1]; the token that crosses it is kept"""
    top_k: int = 0
    """number of tokens kept; 0 = all"""
    min_p: float = 0.0
    """least probability relative to the best token, in [0, 1)"""
    repetition_penalty: float = 1.0
    """0.01 to 100; 1 = off; applies to visible tokens"""
    window: str = "recomputed"
    """context beyond the trained length: recomputed or evicted (see window_bd3)"""
    stop_at_eos: bool = False
    """end a text with its first end-of-sequence token"""

    # All ranges in one place: the command line, the sampler and generate() refuse alike, in the same words.
    def __post_init__(self) -> None:
        check_name("rule", self.rule, RULES)
        check_name("window", self.window, WINDOWS)
        check_range("seed", self.seed, "0 to 2^48 - 1", is_inside=0 <= self.seed <= MAX_SEED)
        is_count = self.steps is None or 1 <= self.steps <= MAX_STEPS
        check_range("steps", self.steps, f"1 to {MAX_STEPS}", is_inside=is_count)
        check_range("threshold", self.threshold, "0 to 1", is_inside=0 <= self.threshold <= 1)
        check_range("entropy_bound", self.entropy_bound, "0 nats or more", is_inside=self.entropy_bound >= 0)
        is_temperature = 0 <= self.temperature <= MAX_TEMPERATURE
        check_range("temperature", self.temperature, f"0 (greedy) to {MAX_TEMPERATURE:g}", is_inside=is_temperature)
        check_range("top_p", self.top_p, "more than 0 and at most 1", is_inside=0 < self.top_p <= 1)
        check_range("top_k", self.top_k, "0 (all tokens) or more", is_inside=0 <= self.top_k <= MAX_TOP_K)
        check_range("min_p", self.min_p, "at least 0 and less than 1", is_inside=0 <= self.min_p < 1)
        check_range(
            "repetition_penalty",
            self.repetition_penalty,
            f"{PENALTIES[0]:g} to {PENALTIES[1]:g} (1 = off)",
            is_inside=PENALTIES[0] <= self.repetition_penalty <= PENALTIES[1],
        )

    def new_rule(self, block_size: int) -> DecodingRule:
        """The decoding rule of these options."""
        return RULES[self.rule](self, block_size)

    def new_filters(self, mask_id: int | None) -> TokenFilters:
        """The token filters of these options."""
        return TokenFilters(
            mask_id=mask_id,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )


RULES: dict[str, Callable[[DecodingOptions, int], DecodingRule]] = {
    # Exact whatever the model: one token a forward, in the order in which the process would reveal them.
    "first_hitting": lambda options, block_size: FirstHitting(),
    "left_to_right": lambda options, block_size: LeftToRight(),
    "ancestral": lambda options, block_size: Ancestral(options.steps or block_size),
    "top_k_static": lambda options, block_size: StaticTopK(options.steps or block_size),
    # where steps are given, each forward reveals at least the share that keeps their promise
    "confidence_threshold": lambda options, block_size: ConfidenceThreshold(
        options.threshold, -(-block_size // (options.steps or block_size))
    ),
    "entropy_bounded": lambda options, block_size: EntropyBounded(options.entropy_bound),
}


def check_name(name: str, value: str, known: Iterable[str]) -> None:
    """Refuse a name outside a table."""
    if value not in known:
        raise ValueError(f"{name}={value!r:.80} is unknown; use one of {', '.join(known)}.")


def check_range(name: str, value: object, law: str, *, is_inside: bool) -> None:
    """Refuse a number outside its range."""
    if not is_inside:
        raise ValueError(f"{name}={value!s:.80} is out of range; use {law}.")
