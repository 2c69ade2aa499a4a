"""Which documents are held out: a fixed, evenly spread choice by place, with no random numbers.

Decides: document j of part p is held out when a Weyl sequence of (p, j) falls below the fraction. The sequence is
equidistributed, so any n consecutive documents of a part lose n * fraction of theirs up to O(log n), and it has no period
that could follow one of the corpus. Document 0 of part 0 is always held out: every fraction above 0 yields something.
Source: Weyl sequences with the golden ratio and the square root of 2, in 64-bit arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from bd3_megatron.errors import ConfigError

_GOLDEN = 0x9E3779B97F4A7C15
_ROOT_TWO = 0x6A09E667F3BCC908
_MODULUS = 1 << 64


def check_fraction(fraction: float) -> None:
    """Refuse fractions that leave nothing to train on.

    Raises:
        ConfigError: outside [0, 0.5].
    """
    if not 0.0 <= fraction <= 0.5:
        raise ConfigError(f"valid_fraction={fraction} is outside [0, 0.5]; use for example 0.05.")


def is_held_out(part: int, document: int, fraction: float) -> bool:
    """Whether a document belongs to the held-out split.

    Args:
        part: number of its part, from 0.
        document: its number inside the part, from 0, white space not counted (`placed`).
        fraction: in [0, 0.5].
    """
    return (document * _GOLDEN + part * _ROOT_TWO) % _MODULUS < int(fraction * _MODULUS)


def placed(texts: Iterable[str]) -> Iterator[tuple[int | None, str]]:
    """Documents with their number among those that hold more than white space; None for those that do not."""
    place = 0
    for text in texts:
        if text.strip():
            yield place, text
            place += 1
        else:
            yield None, text
