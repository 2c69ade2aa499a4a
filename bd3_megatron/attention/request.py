"""What one asks of an attention backend before it runs: device, dtype and shape, no tensor.

Every backend answers `refuse(request)`: None if it can serve exactly, or one sentence why not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, kw_only=True)
class AttentionRequest:
    """One attention as a layer will call it, per rank."""

    device_type: str
    """"cpu" or "cuda"."""
    dtype: torch.dtype
    """Of queries, keys and values."""
    batch: int
    """B, sequences per call."""
    length: int
    """L, clean positions of a whole sequence."""
    block_size: int
    """S."""
    num_heads: int
    """N on this rank."""
    num_kv_heads: int
    """G on this rank; divides N."""
    head_dim: int
    """H."""
    streams: Literal["pair", "noisy", "clean"] = "pair"
    """Which streams there are."""
    documents: bool = False
    """Whether sequences are packed with several documents."""
    needs_grad: bool = True
    """Whether a backward will follow."""
    context_parallel: int = 1
    """Ranks that share the rows of a sequence."""
    deterministic: bool = False
    """Whether two runs must agree to the last bit."""
