"""The random numbers of decoding: pure functions of (seed, sample, position), never of the batch or the call order.

A sample's key is made of its given tokens and of how often they occurred before in the same request: a prompt's text is
the same alone or in a batch, in any order and at any batch size, and repeated prompts give different texts. The key and
the position are Philox counters, so a draw is the same on every device.
Costs one generator call for about 512 positions of a sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .philox import SAMPLE_PURPOSE, uniform

CHUNK_POSITIONS = 512
ORDER_KIND = 0
TOKEN_KIND = 1
# A scored rule draws new candidates at every forward; its kinds follow the two above.
FIRST_CANDIDATE_KIND = 2


def sample_key(ids: Sequence[int], occurrence: int) -> int:
    """Key of a sample in [0, 2^63): 31 bits of its given tokens' digest, 32 of its occurrence.

    Args:
        ids: the given tokens.
        occurrence: how many earlier samples of the request have the same ones, in [0, 2^32).
    """
    text = ",".join(map(str, ids)).encode()
    digest = int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") >> 1
    return digest << 32 | occurrence


def sample_keys(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Keys of the samples of one request, in order."""
    counts: dict[tuple[int, ...], int] = {}
    keys = []
    for prompt in map(tuple, prompts):
        keys.append(sample_key(prompt, counts.get(prompt, 0)))
        counts[prompt] = counts.get(prompt, 0) + 1
    return keys


class SampleDraws:
    """Order and token draws of one sample, block by block."""

    def __init__(self, seed: int, key: int, block_size: int) -> None:
        self.key = key
        self._seed = seed
        self._chunk = -(-CHUNK_POSITIONS // block_size) * block_size
        self._chunk_start = -1
        self._uniform_2C = torch.empty(0)

    def block(self, start: int, size: int) -> Tensor:
        """float64 [2, size] on the host: the order and token draws of positions [start, start + size)."""
        chunk_start = start // self._chunk * self._chunk
        if chunk_start != self._chunk_start:
            position_C = chunk_start + torch.arange(self._chunk)
            kind_21 = torch.tensor([[ORDER_KIND], [TOKEN_KIND]])
            self._uniform_2C = uniform(self._seed, SAMPLE_PURPOSE, self.key, position_C, kind_21)
            self._chunk_start = chunk_start
        return self._uniform_2C[:, start - chunk_start : start - chunk_start + size]


def candidate_draws(seed: int, key_B: Tensor, start_B: Tensor, size: int, forward: int) -> Tensor:
    """float64 [B, size] on the host: the draws of a scored rule's candidates at one forward of a block."""
    position_BS = start_B[:, None] + torch.arange(size)
    return uniform(seed, SAMPLE_PURPOSE, key_B[:, None], position_BS, FIRST_CANDIDATE_KIND + forward)
