"""Philox4x32-10: random bits as a pure function of (key, counter), in int64 tensor arithmetic.

Contract: the bits are the same on CPU and GPU, for any broadcasting and any chunking of the counters. Refuses seeds,
purposes and integer coordinates that do not fit. Costs about 120 elementwise int64 operations a call.
Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; Random123 1.14, philox.h
(the test holds this file to the known-answer vectors published there).
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = 0xFFFFFFFF
MAX_SEED = 2**48 - 1
MAX_PURPOSE = 2**16 - 1
MAX_INDEX = 2**63 - 1

# The purpose under which text is sampled; rng.Purpose takes it from here, since this file imports torch alone.
SAMPLE_PURPOSE = 9

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Encrypt a counter of four 32-bit words under a key of two, ten rounds.

    Args:
        counter: four int64 tensors that broadcast together, values in [0, 2^32).
        key: two ints in [0, 2^32).

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2^32).

    Source: Random123 philox.h, philox4x32_R(10, ...).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # A 32 x 32 bit product wraps past 2^63 in int64; its 64 bits are still right, and the mask drops the sign
        # that the arithmetic shift drags in.
        left = c0 * MULTIPLIERS[0]
        right = c2 * MULTIPLIERS[1]
        c0, c2 = ((right >> 32) & WORD) ^ c1 ^ k0, ((left >> 32) & WORD) ^ c3 ^ k1
        c1, c3 = right & WORD, left & WORD
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def key_of(seed: int, purpose: int) -> tuple[int, int]:
    """The key of a seed and a purpose.

    Args:
        seed: in [0, 2^48).
        purpose: in [0, 2^16).

    Returns:
        Two ints in [0, 2^32).

    Raises:
        ValueError: either number does not fit its bits.
    """
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed={seed} is outside [0, 2^48); use a seed in that range.")
    if not 0 <= purpose <= MAX_PURPOSE:
        raise ValueError(f"purpose={purpose} is outside [0, 2^16); use a purpose in that range.")
    # The map is injective, so two different draws never share their bits:
    #   key     = (seed mod 2^32, (seed div 2^32) * 2^16 + purpose)
    #   counter = (index mod 2^32, index div 2^32, first, second)
    return seed & WORD, (seed >> 32) << 16 | purpose


def words(
    seed: int,
    purpose: int,
    index: int | Tensor,
    first: int | Tensor = 0,
    second: int | Tensor = 0,
    *,
    device: torch.device | str | None = None,
) -> Words:
    """The four random 32-bit words of every (index, first, second).

    Args:
        seed: in [0, 2^48).
        purpose: in [0, 2^16).
        index: int or int64 tensor, in [0, 2^63).
        first, second: int or int64 tensor, in [0, 2^32); all three broadcast together.
        device: where plain ints become tensors; default: the first tensor's device, else the CPU.

    Returns:
        Four int64 tensors of the broadcast shape.

    Raises:
        ValueError: a plain int out of its range.
    """
    # Coordinates given as tensors are not inspected: reading them would make a GPU wait.
    key = key_of(seed, purpose)
    if device is None:
        device = next((c.device for c in (index, first, second) if isinstance(c, Tensor)), torch.device("cpu"))
    target = torch.device(device)
    index = _tensor("index", index, MAX_INDEX, target)
    first = _tensor("first coordinate", first, WORD, target)
    second = _tensor("second coordinate", second, WORD, target)
    return philox4x32((index & WORD, index >> 32, first, second), key)


def uniform(
    seed: int,
    purpose: int,
    index: int | Tensor,
    first: int | Tensor = 0,
    second: int | Tensor = 0,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """One uniform number for every (index, first, second); arguments as in `words`.

    Returns:
        float64 in [0, 1), a multiple of 2^-53 (all that a float64 below 1 holds on an even grid).

    Raises:
        ValueError: a plain int out of its range.
    """
    high, low, _, _ = words(seed, purpose, index, first, second, device=device)
    return unit(high, low)


def unit(high: Tensor, low: Tensor) -> Tensor:
    """Two random words as a float64 in [0, 1): 27 bits of `high`, then 26 of `low`, exactly."""
    # scaling by a power of two is exact, so every device gives the same number
    return ((high >> 5) * 2**26 + (low >> 6)).to(torch.float64) * 2.0**-53


def _tensor(name: str, value: int | Tensor, largest: int, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=torch.int64)
    if not 0 <= value <= largest:
        raise ValueError(f"{name}={value} is outside [0, {largest}]; use a number in that range.")
    return torch.tensor(value, dtype=torch.int64, device=device)
