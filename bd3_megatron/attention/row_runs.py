"""How rows lie in memory for the structured backend, so that every rectangle of a cover is a strided view.

A run is [X, rows * R, c, H] with X = B * G folded batch and key heads, R = N / G query heads per key head and c = 1 or
2 streams. Keys and values are [X, rows, H]. Evenly spaced rectangles become the second dimension of a view
[X, count, rows, H]. Costs one re-ordering pass over queries; keys cost one only where batch and heads cannot be folded.
Source: none; a matter of index arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bd3_megatron.attention.rectangles import RectangleSeries, RowRun


def pack_rows(
    runs: tuple[RowRun, ...], noisy_BLNH: Tensor | None, clean_BLNH: Tensor | None, groups: int
) -> list[Tensor]:
    """Query-shaped rows of both streams, run by run.

    Args:
        runs: of a cover.
        noisy_BLNH, clean_BLNH: [B, rows, N, H], None where the stream is absent.
        groups: G, key heads.

    Returns:
        One [X, rows * R, c, H] per run.
    """
    packed = []
    for run in runs:
        # Queries of one position stand side by side: the noisy and the clean one, and all heads that share a key head.
        # Grouped queries are thus ordinary rows: keys are never repeated and kernels need no grouped mode.
        pieces = [
            rows.narrow(1, start, run.num_rows).unflatten(2, (groups, -1)).transpose(1, 2)
            for stream, rows, start in (
                ("noisy", noisy_BLNH, run.noisy_start),
                ("clean", clean_BLNH, run.clean_start),
            )
            if rows is not None and run.who in (stream, "pair")
        ]
        packed.append(torch.stack(pieces, dim=4).flatten(2, 3).flatten(0, 1))
    return packed


def unpack_rows_(
    runs: tuple[RowRun, ...], packed: list[Tensor], noisy_BLNH: Tensor | None, clean_BLNH: Tensor | None, groups: int
) -> None:
    """Write the rows of every run into [B, rows, N, H] tensors (in place), casting to their dtype."""
    for run, rows in zip(runs, packed, strict=True):
        streams = rows.unflatten(0, (-1, groups)).unflatten(2, (run.num_rows, -1)).transpose(1, 2).unbind(4)
        # noisy before clean; in a run of one stream the indices 0 and -1 name the same rows
        if noisy_BLNH is not None and run.who != "clean":
            noisy_BLNH.narrow(1, run.noisy_start, run.num_rows).unflatten(2, (groups, -1)).copy_(streams[0])
        if clean_BLNH is not None and run.who != "noisy":
            clean_BLNH.narrow(1, run.clean_start, run.num_rows).unflatten(2, (groups, -1)).copy_(streams[-1])


def fold_keys(key_BLGH: Tensor) -> Tensor:
    """[B, rows, G, H] -> [X, rows, H], a view where strides allow it (B = 1, or rows outermost as megatron-core has them)."""
    folded = key_BLGH.transpose(1, 2).flatten(0, 1)
    return folded if folded.stride(-1) == 1 else folded.contiguous()


def unfold_keys(folded: Tensor, groups: int) -> Tensor:
    """[X, rows, H] -> [B, rows, G, H], a view."""
    return folded.unflatten(0, (-1, groups)).transpose(1, 2)


def series_rows(run_rows: Tensor, run: RowRun, series: RectangleSeries) -> Tensor:
    """The rows that ask in one series, as a view of the run.

    Args:
        run_rows: [X, rows * R, c, ...].
        run: the run they are.
        series: of the cover.

    Returns:
        [X, count, rows * R * c', ...] with c' the streams that ask; causal series [X, R, rows, ...], because rows of one
        position differ from their neighbours there.
    """
    share = run_rows.size(1) // run.num_rows
    # where all streams of the run ask, they are neighbours in memory and count as rows
    if series.who == run.who:
        rows, unit = run_rows.flatten(1, 2), share * run_rows.size(2)
    else:
        rows, unit = run_rows.select(2, 0 if series.who == "noisy" else 1), share
    if series.causal:
        return rows.narrow(1, series.row * unit, series.num_rows * unit).unflatten(1, (-1, unit)).transpose(1, 2)
    return _windows(rows, series.row * unit, series.num_rows * unit, series.count, series.spacing * unit)


def series_keys(keys: Tensor, series: RectangleSeries, num_calls: int) -> Tensor:
    """The keys (or values) of one series, [X, num_calls, keys, H]; causal series show the same keys to every call (stride 0)."""
    windows = _windows(keys, series.key, series.num_keys, series.count, series.spacing)
    return windows.expand(-1, num_calls, -1, -1) if series.causal else windows


def add_series_keys_(total: Tensor, series: RectangleSeries, part: Tensor) -> None:
    """Add the gradient of one series's keys [X, calls, keys, H] to that of all keys [X, rows, H], in place."""
    windows = _windows(total, series.key, series.num_keys, series.count, series.spacing)
    # windows of one series never overlap, or adding through the view would lose gradients; the calls of a causal
    # series see the same keys, so theirs are summed first
    windows.add_(part.sum(1, keepdim=True) if series.causal and part.size(1) > 1 else part)


def _windows(rows: Tensor, start: int, length: int, count: int, spacing: int) -> Tensor:
    """`count` windows of `length` rows, `spacing` apart: a view [X, count, length, ...]."""
    if count == 1:
        return rows.narrow(1, start, length).unsqueeze(1)
    shape, stride = rows.shape, rows.stride()
    # as_strided counts from the start of the storage, not of this view
    offset = rows.storage_offset() + start * stride[1]
    return rows.as_strided((shape[0], count, length, *shape[2:]), (stride[0], spacing * stride[1], *stride[1:]), offset)
