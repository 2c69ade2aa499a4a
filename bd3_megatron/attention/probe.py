"""Holds a backend against the reference on a run's own shapes, and times it there, before training starts.

"Agrees" is defined per dtype; a time is the median of repeats after a warm-up, device idle before and after, with documents
packed anew each time, since a run packs anew for every micro-batch. Inputs come from fixed seeds; no global random state is
touched.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from bd3_megatron.attention.dense import masked_softmax_attention
from bd3_megatron.attention.request import AttentionRequest
from bd3_megatron.attention.streams import Attend, Stream
from bd3_megatron.attention.visibility import Visibility, num_rows

# Largest difference from the reference, relative to the largest value of the tensor compared.
TOLERANCES = MappingProxyType({torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3})
_WARM_UPS, _REPEATS = 3, 7
# Scores of the reference that exist at a time: 256 MiB in fp32.
_REFERENCE_SCORES = 2**26


def sample_streams(
    request: AttentionRequest, visibility: Visibility, *, seed: int = 0
) -> tuple[Stream | None, Stream | None]:
    """Random noisy and clean streams of the kind a request describes, None where the visibility has no such rows.

    Args:
        request: heads, dtype, device.
        visibility: rows.
        seed: of the inputs.
    """
    generator = torch.Generator(device=request.device_type).manual_seed(seed)

    def draw(rows: int, num_heads: int) -> Tensor:
        shape = (request.batch, rows, num_heads, request.head_dim)
        values = torch.randn(shape, generator=generator, device=request.device_type, dtype=torch.float32)
        # drawn in fp32 and rounded: one seed means the same inputs in every dtype
        return values.to(request.dtype).requires_grad_(request.needs_grad)

    def stream(q_rows: int, k_rows: int) -> Stream | None:
        if not k_rows:
            return None
        kv = (draw(k_rows, request.num_kv_heads) for _ in range(2))
        return Stream(draw(q_rows, request.num_heads), *kv)

    noisy = num_rows(visibility.noisy_rows)
    return stream(noisy, noisy), stream(num_rows(visibility.clean_rows), num_rows(visibility.clean_key_rows))


def calls_of(visibility: Visibility) -> list[Visibility]:
    """The calls that layers make: all rows, and where there are both streams the noisy rows alone (last layer, views)."""
    both = visibility.noisy_rows and visibility.clean_key_rows
    return [visibility, visibility.without_clean_queries] if both else [visibility]


def error_against_reference(attend: Attend, request: AttentionRequest) -> float:
    """Largest difference from the dense backend, outputs and gradients, in units of the dtype's tolerance."""
    worst = []
    for visibility in calls_of(request.visibility(0)):
        noisy, clean = sample_streams(request, visibility)
        expected = _reference(noisy, clean, visibility, request)
        actual = _run(attend, noisy, clean, visibility, request)
        for a, e in zip(actual, expected, strict=True):
            # relative to the tensor's largest value: entries near zero would make any single error look large
            if e.numel():
                worst.append(((a - e).abs().max() / e.abs().max()).item())
    # A NaN must not be hidden by max(): NaN compares false.
    return max(worst) / TOLERANCES[request.dtype] if all(w == w for w in worst) else float("nan")


def measure_seconds(attend: Attend, request: AttentionRequest) -> float:
    """Median seconds of one forward, with its backward if the request needs gradients."""
    noisy, clean = sample_streams(request, request.rows)
    times = []
    for repeat in range(_WARM_UPS + _REPEATS):
        # a visibility remembers its tables: what a micro-batch pays once must be paid here each time
        visibility = replace(request.visibility(repeat))
        _wait(request.device_type)
        start = time.perf_counter()
        _run(attend, noisy, clean, visibility, request)
        _wait(request.device_type)
        if repeat >= _WARM_UPS:
            times.append(time.perf_counter() - start)
    # the median: one slow repeat must not choose the backend
    return sorted(times)[len(times) // 2]


def _run(
    attend: Attend, noisy: Stream | None, clean: Stream | None, visibility: Visibility, request: AttentionRequest
) -> list[Tensor]:
    inputs = _inputs(noisy, clean)
    outs = [o for o in attend(noisy, clean, visibility, scale=request.head_dim**-0.5) if o is not None]
    grads = torch.autograd.grad(outs, inputs, [_weights(o) for o in outs]) if request.needs_grad else ()
    # a difference taken in bf16 would itself be rounded
    wide = torch.promote_types(request.dtype, torch.float32)
    return [t.detach().to(wide) for t in (*outs, *grads)]


def _reference(
    noisy: Stream | None, clean: Stream | None, visibility: Visibility, request: AttentionRequest
) -> list[Tensor]:
    """As `_run` of the dense backend, query rows in chunks: at the run's own length all scores would not fit."""
    wide, grad = torch.promote_types(request.dtype, torch.float32), request.needs_grad
    streams = [s for s in (noisy, clean) if s is not None]
    keys, values = (
        torch.cat(parts, dim=1).detach().to(wide).requires_grad_(grad)
        for parts in ([s.k_BLGH for s in streams], [s.v_BLGH for s in streams])
    )
    # key gradients add up over all chunks of query rows; a query's belongs to one chunk
    d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
    outs, d_queries = [], []
    for stream in streams:
        queries = stream.q_BLNH.detach().to(wide)
        mask_BQK = visibility.queries_mask(q_is_noisy=stream is noisy, device=queries.device)
        out, d_query, weights = torch.empty_like(queries), torch.empty_like(queries), _weights(stream.q_BLNH).to(wide)
        for part in _chunks(queries.shape, keys.shape[1]):
            rows = queries[:, part].clone().requires_grad_(grad)
            made = masked_softmax_attention(rows, keys, values, mask_BQK[:, part], scale=request.head_dim**-0.5)
            out[:, part] = made.detach()
            if grad:
                d_query[:, part], d_k, d_v = torch.autograd.grad(made, (rows, keys, values), weights[:, part])
                d_keys += d_k
                d_values += d_v
        outs.append(out)
        d_queries.append(d_query)
    sizes = [s.k_BLGH.shape[1] for s in streams]
    per_stream = zip(d_queries, d_keys.split(sizes, 1), d_values.split(sizes, 1), strict=True)
    return [*outs, *(t for three in per_stream for t in three)] if grad else outs


def _chunks(shape: torch.Size, num_keys: int) -> Iterator[slice]:
    rows = max(1, _REFERENCE_SCORES // (shape[0] * shape[2] * max(1, num_keys)))
    return (slice(start, start + rows) for start in range(0, shape[1], rows))


def _inputs(noisy: Stream | None, clean: Stream | None) -> list[Tensor]:
    return [t for s in (noisy, clean) if s is not None for t in (s.q_BLNH, s.k_BLGH, s.v_BLGH)]


def _weights(out: Tensor) -> Tensor:
    """Smooth fixed weights on an output: the output itself would leave some gradients near zero."""
    return torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)


def _wait(device_type: str) -> None:
    if device_type == "cuda":
        torch.accelerator.synchronize()
