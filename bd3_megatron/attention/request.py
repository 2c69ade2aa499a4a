"""What one asks of an attention backend before it runs: device, dtype, heads and rows, no tensor.

Every backend answers `refuse(request)`: None if it can serve exactly, or one sentence why not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bd3_megatron.attention.visibility import Visibility


@dataclass(frozen=True, kw_only=True)
class AttentionRequest:
    """One attention as a layer will call it, per rank."""

    device_type: str
    """"cpu" or "cuda"."""
    dtype: torch.dtype
    """Of queries, keys and values."""
    batch: int
    """B, sequences per call."""
    rows: Visibility
    """Block size, length and the rows of this rank, without documents."""
    num_heads: int
    """N on this rank."""
    num_kv_heads: int
    """G on this rank; divides N."""
    head_dim: int
    """H."""
    documents: bool = False
    """Whether sequences are packed with several documents."""
    needs_grad: bool = True
    """Whether a backward will follow."""
    deterministic: bool = False
    """Whether two runs must agree to the last bit."""

    def visibility(self, packing: int) -> Visibility:
        """The rows with documents as a run may pack them, or the rows alone where it packs none.

        Args:
            packing: each number packs differently.
        """
        if not self.documents:
            return self.rows
        return replace(self.rows, document_id_BL=ragged_documents(self.batch, self.rows.length, packing))


def ragged_documents(batch: int, length: int, packing: int) -> Tensor:
    """Documents of every kind that packing makes: int64 [B, L] on the host, rising.

    Borders fall anywhere, blocks included, and differ from sequence to sequence; one document is a single token, and with
    two sequences or more the last is one document throughout.
    """
    # a generator of its own: probing must not move the run's random state
    generator = torch.Generator().manual_seed(packing)
    starts = torch.zeros(batch, length, dtype=torch.int64)
    for row in starts if batch == 1 else starts[:-1]:
        # from 1, since position 0 begins a document anyway
        borders = torch.randint(1, length, (4,), generator=generator)
        row[borders] = 1
        # the token after the first border is a document of its own
        row[(borders[0] + 1).clamp_max(length - 1)] = 1
    return starts.cumsum(1)
