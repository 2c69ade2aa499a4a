"""The random numbers of decoding: pure functions of (seed, sample, position), never of the batch or the call order.

Contract: a prompt's text is the same alone or in a batch, in any order and at any batch size; repeated prompts give
different texts. Costs one generator call for about 512 positions of a sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .philox import SAMPLE_PURPOSE, uniform

# A generator call costs about as much for 512 positions as for one block.
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
    # A digest, since keys must not depend on the batch; collisions of 31 bits only make two texts share their noise.
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
    """Order and token draws of one sample, kept for a chunk of positions.

    Args:
        key: see `sample_key`.
        block_size: S; chunks are whole blocks.
        num_positions: positions the sample will have; no more are drawn.
    """

    def __init__(self, key: int, block_size: int, num_positions: int) -> None:
        self.key = key
        blocks = -(-min(CHUNK_POSITIONS, num_positions) // block_size)
        self.chunk = blocks * block_size
        self.chunk_start = -1
        self.uniform_2C = torch.empty(0)


def block_draws(seed: int, samples: Sequence[SampleDraws], starts: Sequence[int], size: int) -> Tensor:
    """The order and token draws of one block of each sample: float64 [2, B, size] on the host.

    Chunks that are not at hand are drawn together, in one call of the generator a chunk length.

    Args:
        seed: in [0, 2^48).
        samples: the batch.
        starts: first position of each sample's block, a multiple of its block size.
        size: positions of the block.
    """
    # samples of different lengths have chunks of different sizes: one call for each size that is due
    stale: dict[int, list[tuple[SampleDraws, int]]] = {}
    for sample, start in zip(samples, starts, strict=True):
        chunk_start = start // sample.chunk * sample.chunk
        if chunk_start != sample.chunk_start:
            stale.setdefault(sample.chunk, []).append((sample, chunk_start))
    for chunk, pairs in stale.items():
        key_B11 = torch.tensor([sample.key for sample, _ in pairs])[:, None, None]
        start_B11 = torch.tensor([chunk_start for _, chunk_start in pairs])[:, None, None]
        kind_21 = torch.tensor([[ORDER_KIND], [TOKEN_KIND]])
        drawn_B2C = uniform(seed, SAMPLE_PURPOSE, key_B11, start_B11 + torch.arange(chunk), kind_21)
        for (sample, chunk_start), uniform_2C in zip(pairs, drawn_B2C, strict=True):
            sample.chunk_start, sample.uniform_2C = chunk_start, uniform_2C
    offsets = [start - sample.chunk_start for sample, start in zip(samples, starts, strict=True)]
    blocks = [sample.uniform_2C[:, low : low + size] for sample, low in zip(samples, offsets, strict=True)]
    return torch.stack(blocks, dim=1)


def candidate_draws(seed: int, key_B: Tensor, start_B: Tensor, size: int, forward: int) -> Tensor:
    """float64 [B, size] on the host: the draws of a scored rule's candidates at one forward of a block."""
    position_BS = start_B[:, None] + torch.arange(size)
    return uniform(seed, SAMPLE_PURPOSE, key_B[:, None], position_BS, FIRST_CANDIDATE_KIND + forward)
