"""Attention of the pair of streams as unmasked rectangles on torch's own kernels: exact, with no mask tensor.

`rectangles` cuts the visibility rule, `row_runs` lays the rows out, `partial` names the kernel and merges; this file runs
them as one autograd node, so that the backward of every rectangle is given the merged output and statistics. Executes
exactly the allowed pairs. Serves packed documents, context-parallel rows, absent streams and grouped queries; refuses dtypes
and devices without a stock kernel, documents that are not contiguous, and on CUDA documents at all.
Source: measured on CPU in tools/bench/results; see `partial` for why the partial gradients are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bd3_megatron.attention import partial, row_runs
from bd3_megatron.attention.rectangles import RectangleCover, RectangleSeries, cover_of, document_ends
from bd3_megatron.attention.request import AttentionRequest
from bd3_megatron.attention.streams import Stream, check_streams, empty_neighbours
from bd3_megatron.attention.visibility import Visibility, num_rows
from bd3_megatron.errors import BackendError

# Queries of both streams that are worked on together on CPU: 4 MiB in fp32, so that they stay in cache.
_CACHED_ELEMENTS = 2**20

Keys = dict[str, tuple[Tensor, Tensor]]
"""Keys and values, folded, of the streams that are present."""


@dataclass(frozen=True)
class _Job:
    """Sequences [start, stop) of the batch, which share one cover."""

    start: int
    stop: int
    cover: RectangleCover

    def part(self, rows: Tensor | None) -> Tensor | None:
        if rows is None or self.stop - self.start == rows.size(0):
            return rows
        return rows[self.start : self.stop]


def attend(
    noisy: Stream | None, clean: Stream | None, visibility: Visibility, *, scale: float, kernel: str | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Attention of both streams under the visibility rule.

    Args:
        noisy: q [B, rows, N, H], k and v [B, rows, G, H] of `visibility.noisy_rows`; None if the stream is absent.
        clean: q of `visibility.clean_rows` (it may have no rows), k and v of `visibility.clean_key_rows`; None if absent.
        visibility: who is here and which documents they belong to.
        scale: factor on the scores, > 0.
        kernel: name in `partial.KERNELS`; None takes the first that serves.

    Returns:
        Outputs [B, rows, N, H] in the input's dtype, None for an absent stream.

    Raises:
        BackendError: if no stock kernel serves this device and dtype.
        ShapeError: if the streams do not fit the visibility, or a document id comes back after another document.
    """
    check_streams(noisy, clean, visibility)
    q = next(stream.q_BLNH for stream in (noisy, clean) if stream is not None)
    names = partial.kernels_for(q.device.type, q.dtype, q.size(-1))
    chosen = kernel if kernel is not None else next(iter(names), None)
    if chosen not in names:
        raise BackendError(_no_kernel(q.device.type, q.dtype, q.size(-1), kernel))
    at_once = _sequences_at_once(q, visibility)
    # integers on the host, kept with the visibility: all layers of a micro-batch share them
    jobs = visibility.table(("structured", q.size(0), at_once), lambda: _jobs(visibility, q.size(0), at_once))
    # noisy before clean: in this file index 0 and 3 are queries, 1 and 4 keys, 2 and 5 values
    qkv = [t for s in (noisy, clean) for t in ((None,) * 3 if s is None else (s.q_BLNH, s.k_BLGH, s.v_BLGH))]
    return _Structured.apply(jobs, partial.KERNELS[chosen], scale, *qkv)


def refuse(request: AttentionRequest) -> str | None:
    """Why this backend cannot serve the request, or None."""
    if request.documents and request.device_type == "cuda":
        # every sequence has its own rectangles: 1,261 kernels a layer forward and 2,355 backward were counted
        return (
            "structured attention launches thousands of small kernels a layer for packed documents, which leaves a GPU "
            "idle; use flex or triton, or data.packing=wrap."
        )
    return None if kernels(request) else _no_kernel(request.device_type, request.dtype, request.head_dim, None)


def kernels(request: AttentionRequest) -> list[str]:
    """Names of the stock kernels that can serve the request, the expected fastest first."""
    names = partial.kernels_for(request.device_type, request.dtype, request.head_dim)
    # cuDNN's backward adds in no fixed order; the others obey torch.use_deterministic_algorithms.
    return [name for name in names if not (request.deterministic and name == "cudnn")]


def executed_pairs(visibility: Visibility, *, batch: int = 1) -> int:
    """Query-key pairs of one head that this backend computes: exactly the allowed ones.

    Args:
        visibility: rows and documents.
        batch: sequences B; with documents it must be their first dimension.

    Returns:
        Pairs summed over the batch (multiply by 4 N H for forward FLOPs).
    """
    return sum((job.stop - job.start) * job.cover.num_pairs for job in _jobs(visibility, batch, batch))


def _no_kernel(device_type: str, dtype: torch.dtype, head_dim: int, kernel: str | None) -> str:
    asked = f"named {kernel!r} " if kernel is not None else ""
    return (
        f"structured attention has no stock kernel {asked}for {device_type}, {dtype}, head_dim={head_dim}; on CUDA use "
        "bfloat16, float16 (head_dim at most 256) or float32, and a head_dim that is a multiple of 8; else use dense."
    )


def _jobs(visibility: Visibility, batch: int, at_once: int) -> tuple[_Job, ...]:
    """Neighbouring sequences with the same documents, at most `at_once` together."""
    rows = (visibility.block_size, visibility.noisy_rows, visibility.clean_rows)
    layouts = visibility.document_layouts
    if layouts is None:
        covers = [cover_of(*rows, (visibility.length,))] * batch
    else:
        covers = [cover_of(*rows, document_ends(ids_L)) for ids_L in layouts]
    # `cover_of` is cached, so equal documents give the same object
    edges = [b for b in range(1, batch) if covers[b] is not covers[b - 1]]
    runs = [(start, stop) for first, stop in pairwise((0, *edges, batch)) for start in range(first, stop, at_once)]
    return tuple(_Job(start, min(start + at_once, stop), covers[start]) for start, stop in runs)


def _sequences_at_once(q_BLNH: Tensor, visibility: Visibility) -> int:
    """On CPU as many sequences as stay in cache together; elsewhere all, for fewer and larger launches."""
    if q_BLNH.device.type != "cpu":
        return max(1, q_BLNH.size(0))
    rows = num_rows(visibility.noisy_rows) + num_rows(visibility.clean_rows)
    return max(1, _CACHED_ELEMENTS // max(1, rows * q_BLNH.size(2) * q_BLNH.size(3)))


class _Structured(torch.autograd.Function):
    """All rectangles of one attention as a single node."""

    @staticmethod
    def forward(
        ctx: Any, jobs: tuple[_Job, ...], kernel: partial.Kernel, scale: float, *qkv: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        noisy_out, clean_out = empty_neighbours([qkv[0], qkv[3]])
        results = (noisy_out, clean_out)
        groups = _num_groups(qkv)
        saved_lses: list[Tensor] = []
        for job in jobs:
            queries, keys = _inputs(job, qkv, groups)
            # sums stay in fp32 over all rectangles and are cast once, when they are unpacked
            outs = [torch.empty_like(q, dtype=partial.statistics_dtype(q.dtype)) for q in queries]
            lses = [out.new_empty(out.shape[:-1]) for out in outs]
            for series in job.cover.series:
                run = job.cover.runs[series.run]
                q, out, lse = (row_runs.series_rows(t[series.run], run, series) for t in (queries, outs, lses))
                k, v = (row_runs.series_keys(t, series, q.size(1)) for t in keys[series.keys])
                part_out, part_lse = kernel.forward(q, k, v, scale, series.causal)
                # own blocks come first and touch every row, so nothing needs to be initialised
                if series.first:
                    out.copy_(part_out)
                    lse.copy_(part_lse)
                else:
                    partial.merge_(out, lse, part_out, part_lse)
            row_runs.unpack_rows_(job.cover.runs, outs, job.part(results[0]), job.part(results[1]), groups)
            saved_lses += lses
        ctx.jobs, ctx.kernel, ctx.scale = jobs, kernel, scale
        # outputs are saved in the input's dtype, not as the fp32 sums: half the memory under bf16
        ctx.save_for_backward(*qkv, *results, *saved_lses)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *douts: Tensor | None) -> tuple[Any, ...]:
        qkv, results, lses = ctx.saved_tensors[:6], ctx.saved_tensors[6:8], iter(ctx.saved_tensors[8:])
        groups = _num_groups(qkv)
        dq_noisy, dq_clean = empty_neighbours([qkv[0], qkv[3]])
        # many rectangles see a key: its gradient is summed in fp32 and cast once
        dkeys = _zero_keys(qkv, groups)
        for job in ctx.jobs:
            queries, keys = _inputs(job, qkv, groups)
            outs, grads = (
                row_runs.pack_rows(job.cover.runs, job.part(noisy), job.part(clean), groups)
                for noisy, clean in (results, douts)
            )
            dqs = [torch.empty_like(q, dtype=partial.statistics_dtype(q.dtype)) for q in queries]
            rows = (queries, outs, grads, [next(lses) for _ in queries], dqs)
            fold = slice(job.start * groups, job.stop * groups)
            job_dkeys = {
                stream: both if len(ctx.jobs) == 1 else tuple(t[fold] for t in both) for stream, both in dkeys.items()
            }
            for series in job.cover.series:
                run = job.cover.runs[series.run]
                tensors = [row_runs.series_rows(t[series.run], run, series) for t in rows]
                _backward_series(ctx, series, tensors, keys[series.keys], job_dkeys[series.keys])
            row_runs.unpack_rows_(job.cover.runs, dqs, job.part(dq_noisy), job.part(dq_clean), groups)
        dk_noisy, dv_noisy = _unfolded(dkeys.get("noisy"), groups, qkv[1])
        dk_clean, dv_clean = _unfolded(dkeys.get("clean"), groups, qkv[4])
        return None, None, None, dq_noisy, dk_noisy, dv_noisy, dq_clean, dk_clean, dv_clean


def _backward_series(
    ctx: Any, series: RectangleSeries, tensors: list[Tensor], keys: tuple[Tensor, ...], dkeys: tuple[Tensor, ...]
) -> None:
    """Gradients of one series, added to `dq` (last of `tensors`) and `dkeys` in place."""
    q, out, dout, lse, dq = tensors
    k, v = (row_runs.series_keys(t, series, q.size(1)) for t in keys)
    # out and lse are the merged ones of all rectangles, which makes this part's gradient exact (see `partial`)
    part_q, *part_keys = ctx.kernel.backward(dout, q, k, v, out, lse, ctx.scale, series.causal)
    (dq.copy_ if series.first else dq.add_)(part_q)
    for total, part in zip(dkeys, part_keys, strict=True):
        row_runs.add_series_keys_(total, series, part)


def _inputs(job: _Job, qkv: tuple[Tensor | None, ...], groups: int) -> tuple[list[Tensor], Keys]:
    queries = row_runs.pack_rows(job.cover.runs, job.part(qkv[0]), job.part(qkv[3]), groups)
    folded = {
        (stream, which): row_runs.fold_keys(part)
        for t, stream, which in _named_keys(qkv)
        if (part := job.part(t)) is not None
    }
    return queries, {stream: (folded[stream, 0], folded[stream, 1]) for stream, which in folded if which == 0}


def _named_keys(qkv: tuple[Tensor | None, ...]) -> list[tuple[Tensor | None, str, int]]:
    return [(qkv[1], "noisy", 0), (qkv[2], "noisy", 1), (qkv[4], "clean", 0), (qkv[5], "clean", 1)]


def _num_groups(qkv: tuple[Tensor | None, ...]) -> int:
    return next(k.size(2) for k in (qkv[1], qkv[4]) if k is not None)


def _zero_keys(qkv: tuple[Tensor | None, ...], groups: int) -> Keys:
    """Sums for the gradients of keys and values, [X, rows, H] of each stream; both streams are neighbours in memory."""
    present = [(stream, key) for stream, key in (("noisy", qkv[1]), ("clean", qkv[4])) if key is not None]
    first, sizes = present[0][1], [key.size(1) for _, key in present]
    shape = (first.size(0) * groups, sum(sizes), first.size(3))
    both = [first.new_zeros(shape, dtype=partial.statistics_dtype(first.dtype)).split(sizes, dim=1) for _ in range(2)]
    return {stream: (dk, dv) for (stream, _), dk, dv in zip(present, *both, strict=True)}


def _unfolded(
    sums: tuple[Tensor, Tensor] | None, groups: int, key: Tensor | None
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Gradients of a stream's keys and values [B, rows, G, H], in the keys' dtype."""
    if sums is None or key is None:
        return None, None
    dk, dv = (row_runs.unfold_keys(t, groups).to(key.dtype) for t in sums)
    return dk, dv
