"""FlexAttention's tile table from the visibility rule by arithmetic on runs of rows: no mask is ever evaluated.

A tile is a square of `tile` query rows by `tile` key rows of [noisy; clean]; it is empty, partial or full. Costs (runs
of queries x runs of keys) once per shape, or per batch with documents. `sees` in `visibility` stays the rule; a test
holds this table against it, row by row.
Source: torch 2.13 nn/attention/flex_attention.py, `_convert_mask_to_block_mask`, for what full and partial mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from bd3_megatron.attention.visibility import Rows, Visibility, num_rows

TILE = 128


def tile_table(visibility: Visibility, *, tile: int = TILE) -> tuple[Tensor, Tensor]:
    """Which tiles of [noisy; clean] queries x [noisy; clean] keys must be computed, and which need no mask.

    Args:
        visibility: rows and documents.
        tile: side of a tile in rows.

    Returns:
        partial, full: bool [B or 1, query tiles, key tiles], disjoint, on the CPU; B = 1 without documents.
    """
    layouts: Sequence[list[int] | None] = visibility.document_layouts or [None]
    # sequences with the same documents share one table
    tables: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
    picked = []
    for ids_L in layouts:
        key = tuple(ids_L or ())
        if key not in tables:
            tables[key] = _table(visibility, ids_L, tile)
        picked.append(tables[key])
    return torch.stack([partial for partial, _ in picked]), torch.stack([full for _, full in picked])


def executed_tiles(visibility: Visibility, *, batch: int = 1, tile: int = TILE) -> int:
    """Tiles that FlexAttention computes for one head, summed over `batch` sequences (times tile^2: pairs, for HFU)."""
    partial, full = tile_table(visibility, tile=tile)
    return int((partial | full).sum()) * (batch if visibility.document_id_BL is None else 1)


def _table(visibility: Visibility, ids_L: list[int] | None, tile: int) -> tuple[Tensor, Tensor]:
    queries = _runs(visibility, visibility.clean_rows, ids_L, tile)
    keys = _runs(visibility, visibility.clean_key_rows, ids_L, tile)
    some, every = _between(queries[:, None], keys[None, :])
    shape = [-(-(num_rows(visibility.noisy_rows) + num_rows(clean)) // tile) for clean in _clean_rows(visibility)]
    place = (queries[:, None, 0].expand_as(some), keys[None, :, 0].expand_as(some))
    # accumulated as numbers, because many pairs of runs fall into one tile: it is full if no pair says no
    seen = torch.zeros(shape, dtype=torch.int32).index_put_(place, some.int(), accumulate=True) > 0
    unseen = torch.zeros(shape, dtype=torch.int32).index_put_(place, (~every).int(), accumulate=True)
    for axis, clean in enumerate(_clean_rows(visibility)):
        if (num_rows(visibility.noisy_rows) + num_rows(clean)) % tile and unseen.numel():
            # The rows that fill up the last tile do not exist, and nobody sees them.
            unseen.select(axis, -1).add_(1)
    full = seen & (unseen == 0)
    return seen & ~full, full


def _clean_rows(visibility: Visibility) -> tuple[Rows, Rows]:
    return visibility.clean_rows, visibility.clean_key_rows


def _between(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Whether some pair, and whether every pair, of two runs is allowed (columns of `_runs`)."""
    _, q_noisy, q_first, q_last, q_document = q.unbind(-1)
    _, k_noisy, k_first, k_last, k_document = k.unbind(-1)
    # Rows of a run lie in one stream, one document and neighbouring positions, so its first and last block alone say
    # whether none, some or all pairs of two runs are allowed.
    same_document = q_document == k_document
    # Clean queries see their own block too: one block further than noisy ones.
    reach = 1 - q_noisy
    some_past, every_past = k_first < q_last + reach, k_last < q_first + reach
    meet = (k_first <= q_last) & (q_first <= k_last)
    # A noisy query sees all of a noisy run only where both lie in one and the same block.
    one_block = (q_first == q_last) & (k_first == k_last) & meet
    some = torch.where(k_noisy == 1, (q_noisy == 1) & meet, some_past)
    every = torch.where(k_noisy == 1, (q_noisy == 1) & one_block, every_past)
    return some & same_document, every & same_document


def _runs(visibility: Visibility, clean_rows: Rows, ids_L: Sequence[int] | None, tile: int) -> Tensor:
    """Runs of rows as int64 [runs, 5]: tile, is noisy, first block, last block, document."""
    runs: list[tuple[int, int, int, int, int]] = []
    row = 0
    for is_noisy, rows in ((1, visibility.noisy_rows), (0, clean_rows)):
        for start, stop in rows:
            runs += _range_runs((start, stop), row, ids_L, tile, (is_noisy, visibility.block_size))
            row += stop - start
    return torch.tensor(runs, dtype=torch.int64).view(-1, 5)


def _range_runs(
    span: tuple[int, int], row: int, ids_L: Sequence[int] | None, tile: int, kind: tuple[int, int]
) -> Iterator[tuple[int, int, int, int, int]]:
    """Cut positions [start, stop), whose first one is `row` of the pair, at tile edges and document changes."""
    (start, stop), (is_noisy, block_size) = span, kind
    # Tiles are counted along the pair's rows, not along positions: `row` shifts the edges.
    cuts = {start, stop, *range(start + (-row) % tile, stop, tile)}
    if ids_L is not None:
        cuts |= {p for p in range(start + 1, stop) if ids_L[p] != ids_L[p - 1]}
    for a, b in pairwise(sorted(cuts)):
        document = 0 if ids_L is None else ids_L[a]
        yield (row + a - start) // tile, is_noisy, a // block_size, (b - 1) // block_size, document
