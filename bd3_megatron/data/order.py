"""Which row a source gives for its n-th sample: epochs of keyed permutations, with no state.

Contract: sample n of a source is in epoch n div R at position n mod R, R = its rows; each epoch visits every row once,
in an order that is a function of (seed, source, epoch).
Refuses: more than 2^22 sources, counts of 2^62 and more.
Costs: about 3 microseconds a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bd3_megatron.errors import RangeError
from bd3_megatron.rng import Purpose, permutation_index

# A permutation's key is the source above 40 bits of epoch, which stays inside int64.
_EPOCH_BITS = 40
_MAX_SOURCES = 1 << 22
# A permutation call takes milliseconds whatever its size, so positions are permuted this many at a time.
_CHUNK_ROWS = 2048
_MAX_CHUNKS = 16


@dataclass(frozen=True, kw_only=True)
class EpochOrder:
    """The order in which one source's rows are consumed."""

    num_rows: int
    """R, rows of the source."""
    seed: int
    """run.seed."""
    source: int = 0
    """Number of the source in its mixture; sources of equal size get different orders."""
    shuffle: bool = True
    """False: rows in the order of the split, epoch after epoch."""
    # A cache of a pure function, not a state: a run may resume anywhere without it.
    _chunks: dict[tuple[int, int], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.source < _MAX_SOURCES:
            raise RangeError(f"source={self.source} is outside [0, {_MAX_SOURCES}); mix fewer sources.")
        if self.num_rows < 1:
            raise RangeError(f"num_rows={self.num_rows} leaves nothing to order; use 1 or more.")

    def row_ids(self, count: Tensor) -> Tensor:
        """Rows of the samples with these counts.

        Args:
            count: int64 [B], how many samples of this source came before; in [0, 2^62).

        Returns:
            int64 [B] in [0, num_rows).

        Raises:
            RangeError: a negative count.
        """
        if count.numel() and int(count.min()) < 0:
            raise RangeError(f"sample count {int(count.min())} is negative; use 0 or more.")
        epoch, position = torch.div(count, self.num_rows, rounding_mode="floor"), count % self.num_rows
        if not self.shuffle:
            return position
        chunk = torch.div(position, _CHUNK_ROWS, rounding_mode="floor")
        keys = sorted(set(zip(epoch.tolist(), chunk.tolist(), strict=True)))
        # The usual case: a batch is much smaller than a chunk.
        if len(keys) == 1:
            return self._chunk(*keys[0])[position - keys[0][1] * _CHUNK_ROWS]
        rows = torch.empty_like(position)
        for key in keys:
            chosen = (epoch == key[0]) & (chunk == key[1])
            rows[chosen] = self._chunk(*key)[position[chosen] - key[1] * _CHUNK_ROWS]
        return rows

    def _chunk(self, epoch: int, chunk: int) -> Tensor:
        """Rows of a run of positions: int64 [2048], fewer at the end of an epoch."""
        found = self._chunks.get((epoch, chunk))
        if found is None:
            first = chunk * _CHUNK_ROWS
            position = torch.arange(first, min(first + _CHUNK_ROWS, self.num_rows), dtype=torch.int64)
            key = self.source << _EPOCH_BITS | epoch
            found = permutation_index(self.seed, Purpose.DATA_ORDER, key, self.num_rows, position)
            # The oldest chunk goes; indices increase, so it is seldom asked for again.
            while len(self._chunks) >= _MAX_CHUNKS:
                self._chunks.pop(next(iter(self._chunks)))
            self._chunks[epoch, chunk] = found
        return found
