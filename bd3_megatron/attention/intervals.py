"""The visibility rule as intervals of keys per query row, and the tile bounds a kernel loops between.

Every row sees one run of clean keys, a noisy row one run of noisy keys as well; both ends of a run rise with the row.
Serves every visibility; documents must be contiguous. `sees` in `visibility` stays the rule; a test holds these tables
against it. Costs a few sorted searches once per shape, or once per batch of documents.
Source: none; the intervals are the rectangles of `rectangles`, row by row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bd3_megatron.attention.rectangles import document_ends
from bd3_megatron.attention.visibility import Rows, Visibility, on_device, positions


@dataclass(frozen=True)
class Intervals:
    """Half-open runs of keys, int64 [T, rows] (T = B with documents, else 1), both rising along the rows."""

    low: Tensor
    high: Tensor

    def to_rows(self, device: torch.device) -> Tensor:
        """int32 [T, 2, rows] as kernels read them."""
        return on_device(torch.stack([self.low, self.high], dim=1).to(torch.int32).contiguous(), device)


def noisy_to_clean(visibility: Visibility) -> Intervals:
    """The clean keys (counted by position) that each noisy row sees."""
    position, start, _ = _documents_of(visibility, visibility.noisy_rows)
    block_start = position // visibility.block_size * visibility.block_size
    # clean [document start, block start): a document that begins inside the block leaves an empty run, not a negative
    # one
    return Intervals(start, torch.maximum(start, block_start))


def clean_to_clean(visibility: Visibility) -> Intervals:
    """The clean keys (counted by position) that each clean row sees."""
    position, start, stop = _documents_of(visibility, visibility.clean_rows)
    block_stop = (position // visibility.block_size + 1) * visibility.block_size
    # clean [document start, block end): the document may end inside the block
    return Intervals(start, torch.minimum(stop, block_stop))


def noisy_to_noisy(visibility: Visibility) -> Intervals:
    """The noisy keys (counted as the tensor holds them) that each noisy row sees."""
    position, start, stop = _documents_of(visibility, visibility.noisy_rows)
    block_start = position // visibility.block_size * visibility.block_size
    # A noisy block is whole in memory, so row and position differ by the same number throughout it.
    shift = torch.arange(position.size(-1)) - position
    # noisy [block start, block end), cut to the document on both sides
    low, high = torch.maximum(start, block_start), torch.minimum(stop, block_start + visibility.block_size)
    return Intervals(low + shift, high + shift)


def bounds_of_queries(intervals: list[Intervals], *, row_tile: int, key_tile: int) -> Tensor:
    """Where the loops over keys turn, for tiles of query rows that share their loads.

    Args:
        intervals: of each stream whose tile of the same number is worked on together.
        row_tile, key_tile: rows of a tile.

    Returns:
        int64 [T, tiles, 4]: first key, first key all rows see, end of those, end of keys; all but the last are multiples
        of `key_tile`. Where no whole key tile is seen by all, the middle two equal the first.
    """
    parts = []
    tiles = max(-(-each.low.size(1) // row_tile) for each in intervals)
    for each in intervals:
        rows = each.low.size(1)
        # beyond the shorter stream's end its last row stands in: bounds may then be wider than needed, never too
        # narrow
        first = (torch.arange(tiles) * row_tile).clamp_max(max(rows - 1, 0))
        last = (first + row_tile - 1).clamp_max(max(rows - 1, 0))
        if rows:
            parts.append((each.low[:, first], each.low[:, last], each.high[:, first], each.high[:, last]))
    # both ends rise along the rows, so the first and last row of a tile bound all rows between; what every row sees
    # lies between the last row's low and the first row's high
    start = torch.stack([p[0] for p in parts]).amin(0) // key_tile * key_tile
    full_start = -(-torch.stack([p[1] for p in parts]).amax(0) // key_tile) * key_tile
    full_stop = torch.stack([p[2] for p in parts]).amin(0) // key_tile * key_tile
    stop = torch.stack([p[3] for p in parts]).amax(0)
    return _bounds(start, full_start, full_stop, stop)


def bounds_of_keys(intervals: Intervals, num_keys: int, *, row_tile: int, key_tile: int) -> Tensor:
    """Where the loops over query rows turn, for tiles of keys.

    Returns:
        int64 [T, key tiles, 4]: first row that sees some key of the tile, first that sees all, end of those, end of
        rows; all but the last are multiples of `row_tile`.
    """
    first = torch.arange(0, num_keys, key_tile).expand(intervals.low.size(0), -1).contiguous()
    stop_key = (first + key_tile).clamp_max(num_keys)
    low, high = intervals.low.contiguous(), intervals.high.contiguous()
    # right: a row whose run ends at the tile's first key sees none of the tile
    start = torch.searchsorted(high, first, right=True) // row_tile * row_tile
    full_start = -(-torch.searchsorted(high, stop_key) // row_tile) * row_tile
    full_stop = torch.searchsorted(low, first, right=True) // row_tile * row_tile
    return _bounds(start, full_start, full_stop, torch.searchsorted(low, stop_key))


def _bounds(start: Tensor, full_start: Tensor, full_stop: Tensor, stop: Tensor) -> Tensor:
    some = full_stop > full_start
    return torch.stack([start, torch.where(some, full_start, start), torch.where(some, full_stop, start), stop], dim=-1)


def _documents_of(visibility: Visibility, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Positions [rows], and first position and end of each one's document [T, rows]."""
    position = positions(rows)
    layouts = visibility.document_layouts
    if layouts is None:
        return (
            position,
            torch.zeros(1, len(position), dtype=torch.int64),
            torch.full((1, len(position)), visibility.length),
        )
    starts, stops = [], []
    for ids_L in layouts:
        ends = torch.tensor(document_ends(ids_L))
        # right: a position equal to a document's end belongs to the next document
        which = torch.searchsorted(ends, position, right=True)
        starts.append(torch.cat([torch.zeros(1, dtype=torch.int64), ends])[which])
        stops.append(ends[which])
    return position, torch.stack(starts), torch.stack(stops)
