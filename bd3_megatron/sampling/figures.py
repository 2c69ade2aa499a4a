"""What a run of the sampler cost: tokens a second, forwards a token, cache, share of the weight-read bound."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn

from bd3_megatron.sampling.packed_linear import PackedLinear

# Larger than the caches, so that memory is measured and not they.
COPY_BYTES = 64 * 2**20
COPY_REPEATS = 4


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """Costs of one `generate`."""

    num_samples: int
    num_tokens: int
    """new tokens of all samples"""
    seconds: float
    seconds_to_first_block: float
    num_forwards: int
    """forwards of whole batches, those for long prompts included"""
    cache_bytes: int
    weight_bytes: int
    """weights that every forward reads"""

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all samples a second."""
        return self.num_tokens / max(self.seconds, 1e-9)

    @property
    def forwards_per_token(self) -> float:
        """Forwards of a batch for each new token in it."""
        return self.num_forwards / max(self.num_tokens, 1)

    def share_of_bound(self, bytes_per_second: float) -> float:
        """Least time for reading the weights over the time taken, in [0, 1] up to measuring noise."""
        # A forward must read every weight once (of the token table a few rows), so this is the least time it can take.
        return self.num_forwards * self.weight_bytes / bytes_per_second / max(self.seconds, 1e-9)

    def lines(self, bytes_per_second: float) -> list[str]:
        """The summary, a fact a line."""
        return [
            f"{self.num_samples} samples, {self.num_tokens} tokens in {self.seconds:.2f} s: "
            f"{self.tokens_per_second:.1f} tokens/s",
            f"{self.num_forwards} forwards, {self.forwards_per_token:.3f} a token; "
            f"first block after {self.seconds_to_first_block:.3f} s",
            f"cache {self.cache_bytes / 2**20:.1f} MiB, weights {self.weight_bytes / 2**20:.1f} MiB a forward; "
            f"{self.share_of_bound(bytes_per_second):.1%} of the weight-read bound "
            f"(copy bandwidth measured: {bytes_per_second / 1e9:.1f} GB/s)",
        ]


def weight_bytes(stack: nn.Module, lm_head: nn.Module, token_table: torch.Tensor) -> int:
    """Bytes of the weights that every forward reads; a tied output table counts, since the head reads it whole."""
    # By identity: a tied table is two modules' parameter and is read once.
    weights = {id(p): p for p in (*stack.parameters(), *lm_head.parameters())}
    total = sum(p.numel() * p.element_size() for p in weights.values())
    total += sum(m.num_bytes for part in (stack, lm_head) for m in part.modules() if isinstance(m, PackedLinear))
    is_tied = any(p is token_table for p in lm_head.parameters())
    # Of an untied token table a forward reads only the rows of its ids.
    return total if is_tied else total - token_table.numel() * token_table.element_size()


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read a second by a copy on the device (a copy reads and writes; both are counted), best of a few."""
    # Measured on the device at hand, never looked up: an unknown device is measured like a known one.
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(COPY_REPEATS):
        start = time.perf_counter()
        target.copy_(source)
        # Reading one element waits for the copy on any device.
        target[-1].item()
        best = min(best, time.perf_counter() - start)
    return 2 * COPY_BYTES / max(best, 1e-9)
