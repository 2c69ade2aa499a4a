"""Which indices a data-parallel rank takes: arithmetic on the number of samples consumed.

Decides: a step consumes the indices [consumed, consumed + G); row b of micro-batch m on rank r of dp is
    index = consumed + (m * dp + r) * mbs + b
so that the union over ranks and micro-batches is the same G samples for every dp and mbs that divide G. The whole state
is `consumed`: after a change of dp, mbs or G nothing is repeated and nothing is skipped.
Refuses: a global batch that the micro-batches of all ranks do not fill exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bd3_megatron.errors import ConfigError, GridError, check_multiple


@dataclass(frozen=True, kw_only=True)
class BatchShare:
    """One rank's share of every step."""

    global_batch_size: int
    micro_batch_size: int
    dp: int = 1
    """Data-parallel ranks."""
    dp_rank: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.dp_rank < self.dp:
            raise GridError(f"dp_rank={self.dp_rank} is outside [0, {self.dp}); give this rank's own coordinate.")
        if self.micro_batch_size < 1:
            raise ConfigError(f"micro_batch_size={self.micro_batch_size} is empty; use 1 or more.")
        factor = self.micro_batch_size * self.dp
        # A batch that is not filled exactly would give ranks different numbers of micro-batches, and collectives would
        # wait for ever.
        check_multiple("global_batch_size", self.global_batch_size, "micro_batch_size * dp", factor)

    @property
    def num_micro_batches(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.dp)

    def index(self, consumed: int, micro_batch: int) -> Tensor:
        """Indices of one micro-batch.

        Args:
            consumed: samples consumed before the step.
            micro_batch: in [0, num_micro_batches).

        Returns:
            int64 [micro_batch_size].
        """
        # Micro-batches outside, ranks inside: over all of them the step takes G consecutive indices on every grid.
        first = consumed + (micro_batch * self.dp + self.dp_rank) * self.micro_batch_size
        return torch.arange(first, first + self.micro_batch_size, dtype=torch.int64)

    def step(self, consumed: int) -> Iterator[Tensor]:
        """Indices of the micro-batches of one step, in order."""
        for micro_batch in range(self.num_micro_batches):
            yield self.index(consumed, micro_batch)

    def steps(self, consumed: int) -> Iterator[Tensor]:
        """Indices of all micro-batches of all steps from `consumed` on, without end."""
        # `consumed` is the whole state: after a change of dp, mbs or G nothing is repeated and nothing is skipped.
        while True:
            yield from self.step(consumed)
            consumed += self.global_batch_size
