"""Randomness as a function: f(seed, purpose, index, coordinates), the only source of random numbers here.

Contract: nothing has a state: a draw does not depend on the rank, the micro-batch, the order of calls, the device or
what was drawn before, so every rank computes its own and none is sent. All but `normal` have the same bits on CPU and
GPU. Refuses: seeds outside [0, 2^48), more than two coordinates, sizes outside [1, 2^62].
Source: the counter generator in `hf/philox.py`.
"""

from __future__ import annotations

import hashlib
import math
from enum import IntEnum

import torch
from torch import Tensor

from bd3_megatron.errors import RangeError
from bd3_megatron.hf import philox

MAX_SEED = philox.MAX_SEED
MAX_PERMUTATION_SIZE = 2**62
# Philox calls of four words each: twelve round keys.
_FEISTEL_CALLS = 3
_FOLD_MULTIPLIERS = (0x85EBCA6B, 0xC2B2AE35)


class Purpose(IntEnum):
    """What a stream of random numbers is for; part of the key: no two share bits. Append, never renumber."""

    # A number is part of every draw: to change one would change all runs.
    NOISE_LEVEL = 1
    STRATA = 2
    CORRUPT = 3
    RESAMPLE = 4
    DATA_ORDER = 5
    MIXTURE = 6
    INIT = 7
    DROPOUT = 8
    SAMPLE = philox.SAMPLE_PURPOSE
    EVALUATE = 10
    VIEW = 11
    SEARCH = 12


def uniform(
    seed: int,
    purpose: Purpose,
    index: int | Tensor,
    *coords: int | Tensor,
    device: torch.device | None = None,
) -> Tensor:
    """One uniform number for every (index, coords).

    Args:
        seed: in [0, 2^48).
        purpose: which stream.
        index: int or int64 tensor in [0, 2^63): a sample's index in the order of consumption, or a step.
        coords: up to two ints or int64 tensors in [0, 2^32); all broadcast together with `index`.
        device: where plain ints become tensors; default: the first tensor's device, else the CPU.

    Returns:
        float64 in [0, 1), of the broadcast shape, a multiple of 2^-53.

    Raises:
        RangeError: seed, a plain int or the number of coordinates out of range.
    """
    # 53 bits, the whole of a float64: the generator's words come four at a time, so 32 bits would cost the same and
    # would round a probability to 2^-32.
    high, low, _, _ = _words(seed, purpose, index, *coords, device=device)
    return philox.unit(high, low)


def normal(
    seed: int,
    purpose: Purpose,
    index: int | Tensor,
    *coords: int | Tensor,
    device: torch.device | None = None,
) -> Tensor:
    """One standard normal number for every (index, coords), by Box and Muller's transform of two uniforms.

    Args:
        seed, purpose, index, coords, device: as in `uniform`.

    Returns:
        float64, of the broadcast shape.

    Raises:
        RangeError: as in `uniform`.
    """
    words = _words(seed, purpose, index, *coords, device=device)
    # log1p(-u) and not log(u): u may be 0 but never 1. log and cos may differ in their last bit between CPU and GPU.
    radius = torch.sqrt(-2.0 * torch.log1p(-philox.unit(words[0], words[1])))
    return radius * torch.cos(2.0 * math.pi * philox.unit(words[2], words[3]))


def permutation_index(seed: int, purpose: Purpose, key: int | Tensor, size: int, position: int | Tensor) -> Tensor:
    """Where a keyed permutation of [0, size) sends `position`; no table is made, any part may be asked for alone.

    A Feistel network whose round keys are Philox words permutes the smallest power of two that holds `size`;
    whatever lands outside walks on along its cycle until it is inside, which keeps the map one to one.

    Args:
        seed, purpose: as in `uniform`.
        key: which permutation (epoch, group of samples): int or int64 tensor that broadcasts with `position`.
        size: how many elements, in [1, 2^62].
        position: int or int64 tensor, in [0, size).

    Returns:
        int64 in [0, size), of the broadcast shape; for a fixed key a bijection of [0, size).

    Raises:
        RangeError: size, or a position, out of range.

    Source: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002 (cycle walking).
    """
    if not 1 <= size <= MAX_PERMUTATION_SIZE:
        raise RangeError(f"size={size} is outside [1, 2^62]; use a size in that range.")
    position = torch.as_tensor(position, dtype=torch.int64)
    if position.numel() and (int(position.min()) < 0 or int(position.max()) >= size):
        raise RangeError(
            f"position {int(position.min())} to {int(position.max())} leaves [0, {size}); use 0 to {size - 1}."
        )
    key = torch.as_tensor(key, dtype=torch.int64, device=position.device)
    shape = torch.broadcast_shapes(position.shape, key.shape)
    keys = _round_keys(seed, purpose, key, shape)
    # Two bits at least: both parts of the Feistel network need one.
    bits = max((size - 1).bit_length(), 2)
    value = _feistel(position.expand(shape).reshape(-1), keys, bits)
    outside = (value >= size).nonzero().squeeze(1)
    # The power of two is less than twice `size` (for sizes above 2), so a walk takes few steps. To ask whether it is
    # done makes a GPU wait: give CPU positions, they are few.
    while outside.numel():
        walked = _feistel(value[outside], keys if keys.shape[1] == 1 else keys[:, outside], bits)
        value[outside] = walked
        outside = outside[walked >= size]
    return value.reshape(shape)


def generator_seed(seed: int, purpose: Purpose, name: str) -> int:
    """A seed derived from another for a named use (a parameter's initial values, one evaluation draw).

    Args:
        seed: in [0, 2^48).
        purpose: which stream.
        name: what it is for; any text.

    Returns:
        An int in [0, 2^48): it may seed a torch.Generator, or any function of this module.

    Raises:
        RangeError: seed out of range.
    """
    _check_seed(seed)
    # Names have any length and a Philox key has not; the seed and the purpose keep equal names apart.
    digest = hashlib.sha256(f"{seed}/{int(purpose)}/{name}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def _words(
    seed: int, purpose: Purpose, index: int | Tensor, *coords: int | Tensor, device: torch.device | None
) -> philox.Words:
    _check_seed(seed)
    if len(coords) > 2:
        raise RangeError(f"{len(coords)} coordinates were given; use two at most (the counter has two words for them).")
    try:
        return philox.words(seed, int(purpose), index, *coords, device=device)
    except ValueError as error:
        raise RangeError(str(error)) from error


def _check_seed(seed: int) -> None:
    if not 0 <= seed <= MAX_SEED:
        raise RangeError(f"seed={seed} is outside [0, 2^48); use a seed in that range.")


def _round_keys(seed: int, purpose: Purpose, key: Tensor, shape: torch.Size) -> Tensor:
    """Twelve 32-bit round keys: int64 [12, 1] for one permutation, else [12, X], a column for each of X positions."""
    call = torch.arange(_FEISTEL_CALLS, device=key.device)[:, None]
    keys = torch.cat(_words(seed, purpose, key.reshape(-1), call, device=key.device))
    if key.numel() == 1:
        return keys
    # Keys broadcast with positions as tensors do: from the last dimension.
    lead = [1] * (len(shape) - key.dim())
    return keys.reshape(len(keys), *lead, *key.shape).expand(-1, *shape).reshape(len(keys), shape.numel())


def _feistel(value: Tensor, keys: Tensor, bits: int) -> Tensor:
    """A keyed permutation of [0, 2^bits): the two parts take turns in being changed by a hash of the other."""
    low_bits = bits // 2
    low_mask, high_mask = 2**low_bits - 1, 2 ** (bits - low_bits) - 1
    low, high = value & low_mask, value >> low_bits
    for low_key, high_key in zip(keys[0::2], keys[1::2], strict=True):
        low = low ^ (_fold(high, low_key) & low_mask)
        high = high ^ (_fold(low, high_key) & high_mask)
    return high << low_bits | low


def _fold(part: Tensor, key: Tensor) -> Tensor:
    """Hash of a part below 2^32 under a 32-bit key: two multiplications, each folded from 64 bits to 32."""
    mixed = part ^ key
    for multiplier in _FOLD_MULTIPLIERS:
        product = (mixed ^ (mixed >> 15)) * multiplier
        mixed = ((product >> 32) & philox.WORD) ^ (product & philox.WORD)
    return mixed
