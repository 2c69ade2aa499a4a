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

# Views are cut by one as_strided each, from sizes and strides: at small shapes the host pays for every view it takes, and the
# same cut by slices, flattenings and selections took three.


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
        pieces = [rows for rows, _ in _streams(run, noisy_BLNH, clean_BLNH, groups)]
        batch, _, count, share, width = pieces[0].shape
        packed.append(torch.stack(pieces, dim=4).view(batch * groups, count * share, len(pieces), width))
    return packed


def unpack_rows_(
    runs: tuple[RowRun, ...], packed: list[Tensor], noisy_BLNH: Tensor | None, clean_BLNH: Tensor | None, groups: int
) -> None:
    """Write the rows of every run into [B, rows, N, H] tensors (in place), casting to their dtype."""
    for run, rows in zip(runs, packed, strict=True):
        row_stride, stream_stride, channel_stride = rows.stride()[1:]
        for target, stream in _streams(run, noisy_BLNH, clean_BLNH, groups):
            batch, _, count, share, width = target.shape
            strides = (
                groups * rows.stride(0),
                rows.stride(0),
                share * row_stride,
                row_stride,
                channel_stride,
            )
            # noisy before clean; a run of one stream has only stream 0
            at = rows.storage_offset() + stream * stream_stride
            target.copy_(rows.as_strided((batch, groups, count, share, width), strides, at))


def _streams(
    run: RowRun, noisy_BLNH: Tensor | None, clean_BLNH: Tensor | None, groups: int
) -> list[tuple[Tensor, int]]:
    """The rows of a run in each of its streams as a view [B, G, rows, R, H], and the stream's number in the run."""
    given = (("noisy", noisy_BLNH, run.noisy_start), ("clean", clean_BLNH, run.clean_start))
    present = [(rows, start) for stream, rows, start in given if rows is not None and run.who in (stream, "pair")]
    views = []
    for number, (rows, start) in enumerate(present):
        batch, _, heads, width = rows.shape
        of_batch, of_row, of_head, of_channel = rows.stride()
        shape = (batch, groups, run.num_rows, heads // groups, width)
        strides = (of_batch, heads // groups * of_head, of_row, of_head, of_channel)
        views.append((rows.as_strided(shape, strides, rows.storage_offset() + start * of_row), number))
    return views


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
    of_fold, of_row, of_stream, *of_rest = run_rows.stride()
    unit, offset = run_rows.size(1) // run.num_rows, run_rows.storage_offset()
    # where all streams of the run ask, they are neighbours in memory and count as rows
    if series.who == run.who:
        unit, of_row = unit * run_rows.size(2), of_stream
    elif series.who == "clean":
        offset += of_stream
    offset += series.row * unit * of_row
    middle = (series.count, series.num_rows * unit), (series.spacing * unit * of_row, of_row)
    if series.causal:
        middle = (unit, series.num_rows), (of_row, unit * of_row)
    shape = (run_rows.size(0), *middle[0], *run_rows.shape[3:])
    return run_rows.as_strided(shape, (of_fold, *middle[1], *of_rest), offset)


def series_keys(keys: Tensor, series: RectangleSeries, num_calls: int) -> Tensor:
    """The keys (or values) of one series, [X, num_calls, keys, H]; causal series show the same keys to every call (stride 0)."""
    of_fold, of_key, of_channel = keys.stride()
    # spacing is 0 where there is one rectangle, and so where all calls share its keys
    shape = (keys.size(0), num_calls, series.num_keys, keys.size(2))
    strides = (of_fold, series.spacing * of_key, of_key, of_channel)
    return keys.as_strided(shape, strides, keys.storage_offset() + series.key * of_key)


def add_series_keys_(total: Tensor, series: RectangleSeries, part: Tensor) -> None:
    """Add the gradient of one series's keys [X, calls, keys, H] to that of all keys [X, rows, H], in place."""
    # windows of one series never overlap, or adding through the view would lose gradients; the calls of a causal
    # series see the same keys, so theirs are summed first
    part = part.sum(1, keepdim=True) if series.causal and part.size(1) > 1 else part
    series_keys(total, series, part.size(1)).add_(part)
