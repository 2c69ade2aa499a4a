"""Attention of the pair of streams by kernels of our own: noisy and clean queries share every load of clean keys.

Chooses tile sizes and turns a visibility into tables of intervals (`intervals`); one forward kernel for the pair, one backward
kernel a query stream, one a key stream. Serves every visibility with contiguous documents, grouped queries without repeating
keys, any strides. Refuses machines without CUDA and Triton, head sizes that are no power of two from 16 to 128, fp32 on CUDA
and fp64. NOT MEASURED on a GPU: Triton's interpreter agrees with the reference on the CPU, nothing more is known.
Source: arXiv 2307.08691 (flash attention 2); the shared prefix loop is the project's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bd3_megatron.attention import intervals, machine
from bd3_megatron.attention.request import AttentionRequest
from bd3_megatron.attention.streams import Stream, check_streams
from bd3_megatron.attention.visibility import Visibility, on_device
from bd3_megatron.errors import BackendError

_HEAD_DIMS = (16, 32, 64, 128)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The kernels work in base 2: exp(x) = exp2(x log2 e).
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Tiles:
    """Rows of a query tile and of a key tile."""

    rows: int = 64
    keys: int = 64


def attend(
    noisy: Stream | None, clean: Stream | None, visibility: Visibility, *, scale: float, tiles: Tiles = Tiles()
) -> tuple[Tensor | None, Tensor | None]:
    """Attention of both streams under the visibility rule.

    Args:
        noisy: queries, keys and values of the noisy rows; None if the stream is absent.
        clean: queries of the clean rows, keys and values of the clean key rows; None if absent.
        visibility: who is here and which documents they belong to.
        scale: factor on the scores, > 0.
        tiles: tile sizes, powers of two from 16.

    Returns:
        Outputs [B, rows, N, H] in the input's dtype, None for an absent stream.

    Raises:
        BackendError: if Triton, the dtype or the head size is missing.
        ShapeError: if the streams do not fit the visibility, or a document id comes back after another document.
    """
    check_streams(noisy, clean, visibility)
    q = next(s.q_BLNH for s in (noisy, clean) if s is not None)
    if (reason := _refusal(q.dtype, q.size(-1))) is not None:
        raise BackendError(reason)
    qkv = [t for s in (noisy, clean) for t in ((None,) * 3 if s is None else (s.q_BLNH, s.k_BLGH, s.v_BLGH))]
    # the kernels take any strides but those of the last dimension, which must be dense
    present = [None if t is None else t if t.stride(-1) == 1 else t.contiguous() for t in qkv]
    return _TritonPair.apply(tables(visibility, q.device, tiles), scale, *present)


def refuse(request: AttentionRequest) -> str | None:
    """Why these kernels cannot serve the request, or None."""
    if request.device_type != "cuda":
        return f"the triton backend needs a CUDA device, not {request.device_type!r}; use structured."
    # exact fp32 products take minutes to compile; the interpreter on CPU does use them
    if request.dtype == torch.float32:
        return "the triton backend compiles for minutes in fp32; use bfloat16 or float16, or structured."
    return _refusal(request.dtype, request.head_dim)


def _refusal(dtype: torch.dtype, head_dim: int) -> str | None:
    if not machine.has("triton"):
        return "the triton backend needs Triton, which is not installed; install triton or use structured."
    if dtype not in _DTYPES:
        return f"the triton backend has no kernel for {dtype}; use bfloat16, float16 or float32, or the dense backend."
    if head_dim not in _HEAD_DIMS:
        return f"the triton backend has no kernel for head_dim={head_dim}; use 16, 32, 64 or 128, or another backend."
    return None


@dataclass(frozen=True)
class Tables:
    """What the kernels read about a visibility; int32 on the device."""

    tiles: Tiles
    packed: bool
    noisy_clean: Tensor
    """[T, 2, noisy rows]: run of clean keys."""
    noisy_noisy: Tensor
    clean_clean: Tensor
    pair_turns: Tensor
    """[T, tiles, 4]: of both query streams over clean keys."""
    noisy_turns: Tensor
    clean_turns: Tensor
    own_turns: Tensor
    """Of noisy queries over noisy keys."""
    clean_keys_noisy: Tensor
    """[T, key tiles, 4]: of clean keys over noisy rows."""
    clean_keys_clean: Tensor
    noisy_keys: Tensor


def tables(visibility: Visibility, device: torch.device, tiles: Tiles = Tiles()) -> Tables:
    """The tables of a visibility, which remembers them."""
    return visibility.table(("triton", tiles, device), lambda: _build(visibility, tiles, device))


def _build(visibility: Visibility, tiles: Tiles, device: torch.device) -> Tables:
    noisy_clean, clean_clean = intervals.noisy_to_clean(visibility), intervals.clean_to_clean(visibility)
    noisy_noisy = intervals.noisy_to_noisy(visibility)
    clean_keys = sum(stop - start for start, stop in visibility.clean_key_rows)
    noisy_keys = noisy_noisy.low.size(1)

    def queries(*runs: intervals.Intervals) -> Tensor:
        some = [run for run in runs if run.low.size(1)]
        # no query rows: one empty tile, because a kernel's pointer must point to something
        if not some:
            return torch.zeros(1, 1, 4, dtype=torch.int32, device=device)
        bounds = intervals.bounds_of_queries(some, row_tile=tiles.rows, key_tile=tiles.keys)
        return on_device(bounds.to(torch.int32).contiguous(), device)

    def keys(run: intervals.Intervals, num_keys: int) -> Tensor:
        bounds = intervals.bounds_of_keys(run, num_keys, row_tile=tiles.rows, key_tile=tiles.keys)
        return on_device(bounds.to(torch.int32).contiguous(), device)

    return Tables(
        tiles=tiles,
        packed=visibility.document_id_BL is not None,
        noisy_clean=noisy_clean.to_rows(device),
        noisy_noisy=noisy_noisy.to_rows(device),
        clean_clean=clean_clean.to_rows(device),
        pair_turns=queries(noisy_clean, clean_clean),
        noisy_turns=queries(noisy_clean),
        clean_turns=queries(clean_clean),
        own_turns=queries(noisy_noisy),
        clean_keys_noisy=keys(noisy_clean, clean_keys),
        clean_keys_clean=keys(clean_clean, clean_keys),
        noisy_keys=keys(noisy_noisy, noisy_keys),
    )


def _kernels() -> ModuleType:
    # Late: the module imports Triton, which not every machine has.
    from bd3_megatron.attention import triton_kernels

    return triton_kernels


class _TritonPair(torch.autograd.Function):
    """The kernels as one node."""

    @staticmethod
    def forward(ctx: Any, table: Tables, scale: float, *qkv: Tensor | None) -> tuple[Tensor | None, ...]:
        call = _Call.of(table, scale, qkv)
        outs = [q.new_empty(q.shape) for q in (call.q_n, call.q_c)]
        # fp32 whatever the inputs' dtype: the backward subtracts them from fp32 scores
        lses = [q.new_empty((q.size(0), q.size(2), q.size(1)), dtype=torch.float32) for q in (call.q_n, call.q_c)]
        # a program works on tiles of the same number of both streams, so the longer stream sets the grid
        rows = max(call.q_n.size(1), call.q_c.size(1))
        grid_tiles = -(-rows // table.tiles.rows)
        noisy, clean = call.q_n.size(1) > 0, call.q_c.size(1) > 0
        if grid_tiles:
            _kernels().forward_pair[grid_tiles, call.q_n.size(0) * call.heads](
                call.q_n, call.k_n, call.v_n, outs[0], lses[0], call.q_c, call.k_c, call.v_c, outs[1], lses[1],
                table.noisy_clean, table.noisy_noisy, table.clean_clean, table.pair_turns, table.own_turns,
                *_strides(call.q_n, call.k_n, call.v_n, call.q_c, call.k_c, call.v_c),
                call.q_n.size(1), call.q_c.size(1), call.k_c.size(1), call.heads, call.share, grid_tiles,
                table.own_turns.size(1), call.scale * _LOG2_E,
                NOISY=noisy, CLEAN=clean, KEYS=call.k_c.size(1) > 0, **call.options,
            )  # fmt: skip
        results = tuple(None if given is None else out for given, out in zip((qkv[0], qkv[3]), outs, strict=True))
        ctx.table, ctx.scale = table, scale
        ctx.save_for_backward(*qkv, *results, *lses)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *douts: Tensor | None) -> tuple[Any, ...]:
        qkv, results, lses = ctx.saved_tensors[:6], ctx.saved_tensors[6:8], ctx.saved_tensors[8:]
        call = _Call.of(ctx.table, ctx.scale, qkv)
        # an absent stream has no gradient; its query tensor, which has no rows, stands in
        grads = [q if d is None else d for q, d in zip((call.q_n, call.q_c), douts, strict=True)]
        grads = [d if d.stride(-1) == 1 else d.contiguous() for d in grads]
        deltas = [
            torch.empty_like(lse) if out is None else (out.float() * d.float()).sum(-1).transpose(1, 2).contiguous()
            for out, d, lse in zip(results, grads, lses, strict=True)
        ]
        rows = [(call.q_n, grads[0], lses[0], deltas[0]), (call.q_c, grads[1], lses[1], deltas[1])]
        dq_n, dq_c = (call.queries(*rows[i], noisy=i == 0) for i in range(2))
        dk_n, dv_n = call.keys(rows, noisy=True)
        dk_c, dv_c = call.keys(rows, noisy=False)
        found = (dq_n, dk_n, dv_n, dq_c, dk_c, dv_c)
        return None, None, *(None if given is None else grad for given, grad in zip(qkv, found, strict=True))


@dataclass(frozen=True)
class _Call:
    """The tensors of one attention; an absent stream stands as tensors without rows."""

    table: Tables
    scale: float
    q_n: Tensor
    k_n: Tensor
    v_n: Tensor
    q_c: Tensor
    k_c: Tensor
    v_c: Tensor

    @classmethod
    def of(cls, table: Tables, scale: float, qkv: tuple[Tensor | None, ...]) -> _Call:
        some = next(i for i in (0, 3) if qkv[i] is not None)
        rows = []
        for i, given in enumerate(qkv):
            # Its partner of the stream that is present has the shape an absent one would have.
            like = qkv[some + i % 3]
            rows.append(given if given is not None else like[:, :0])  # type: ignore[index]
        return cls(table, scale, *rows)

    @property
    def heads(self) -> int:
        return self.q_n.size(2)

    @property
    def share(self) -> int:
        return self.q_n.size(2) // self.k_n.size(2)

    @property
    def options(self) -> dict[str, Any]:
        """Constants of every launch."""
        head_dim = self.q_n.size(3)
        return {
            "PACKED": self.table.packed,
            # Without it fp32 products are rounded to TF32, which the reference would not forgive.
            "PRECISION": "ieee" if self.q_n.dtype == torch.float32 else "tf32",
            "BM": self.table.tiles.rows,
            "BN": self.table.tiles.keys,
            "H": head_dim,
            # Not tuned: no GPU has timed these.
            "num_warps": 4 if head_dim <= 64 else 8,
            "num_stages": 2,
        }

    def queries(self, q: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, *, noisy: bool) -> Tensor:
        """dq of one stream."""
        # new_empty, not empty_like: the kernels write dense rows, whatever the strides of q
        dq = q.new_empty(q.shape)
        tiles = -(-q.size(1) // self.table.tiles.rows)
        t = self.table
        lh, turns = (t.noisy_clean, t.noisy_turns) if noisy else (t.clean_clean, t.clean_turns)
        if tiles:
            _kernels().backward_queries[tiles, q.size(0) * self.heads](
                q, dout, lse, delta, dq, self.k_c, self.v_c, lh, turns, self.k_n, self.v_n, t.noisy_noisy, t.own_turns,
                *_strides(q, dout, self.k_c, self.v_c, self.k_n, self.v_n),
                q.size(1), self.k_c.size(1), self.heads, self.share, tiles, self.scale * _LOG2_E, self.scale,
                KEYS=self.k_c.size(1) > 0, OWN=noisy, **self.options,
            )  # fmt: skip
        return dq

    def keys(self, rows: list[tuple[Tensor, Tensor, Tensor, Tensor]], *, noisy: bool) -> tuple[Tensor, Tensor]:
        """dk, dv of one stream."""
        k, v = (self.k_n, self.v_n) if noisy else (self.k_c, self.v_c)
        dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
        t, (of_noisy, of_clean) = self.table, rows
        lh_n, turns_n = (t.noisy_noisy, t.noisy_keys) if noisy else (t.noisy_clean, t.clean_keys_noisy)
        tiles = -(-k.size(1) // t.tiles.keys)
        if tiles:
            _kernels().backward_keys[tiles, k.size(0) * k.size(2)](
                k, v, dk, dv, *of_noisy, lh_n, turns_n, *of_clean, t.clean_clean, t.clean_keys_clean,
                *_strides(k, v, *of_noisy[:2], *of_clean[:2]),
                k.size(1), self.q_n.size(1), self.q_c.size(1), k.size(2), self.share, tiles, self.scale * _LOG2_E, self.scale,
                # clean queries never see noisy keys
                NOISY=self.q_n.size(1) > 0, CLEAN=not noisy and self.q_c.size(1) > 0, **self.options,
            )  # fmt: skip
        return dk, dv


def _strides(*tensors: Tensor) -> list[int]:
    """Strides of batch, row and head of each tensor [B, rows, heads, H]."""
    return [stride for t in tensors for stride in t.stride()[:3]]
