"""Holds a backend against the reference on a small problem, and times it on the real one, before training starts.

Decides: what "agrees" means per dtype, and how a kernel is timed (median of repeats after a warm-up, device idle before and
after). Draws its own inputs from fixed seeds and touches no global random state.
"""

from __future__ import annotations

import time
from types import MappingProxyType

import torch
from torch import Tensor

from bd3_megatron.attention import dense
from bd3_megatron.attention.request import AttentionRequest
from bd3_megatron.attention.streams import Attend, Stream
from bd3_megatron.attention.visibility import Visibility

# Largest difference from the reference, relative to the largest value of the tensor compared.
TOLERANCES = MappingProxyType({torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3})
_WARM_UPS, _REPEATS = 3, 7


def sample_problem(
    request: AttentionRequest, *, small: bool, seed: int = 0
) -> tuple[Stream | None, Stream | None, Visibility]:
    """Random streams of the kind a request describes.

    Args:
        request: shapes, dtype, device.
        small: a few hundred positions and one group of heads, for comparing; else the request's own shape.
        seed: of the inputs.

    Returns:
        noisy, clean (None where the request has no such stream) and their visibility.
    """
    length = (
        min(request.length, max(2, -(-512 // request.block_size)) * request.block_size) if small else request.length
    )
    groups = 1 if small else request.num_kv_heads
    heads = request.num_heads // request.num_kv_heads * groups
    batch = min(2, request.batch) if small else request.batch
    documents = None
    if request.documents:
        # Four documents whose borders fall inside blocks, shifted from sequence to sequence.
        positions = torch.arange(length) + 3 * torch.arange(batch)[:, None]
        documents = positions * 4 // (length + 3 * batch)
    generator = torch.Generator(device=request.device_type).manual_seed(seed)

    def draw(num_heads: int) -> Tensor:
        shape = (batch, length, num_heads, request.head_dim)
        values = torch.randn(shape, generator=generator, device=request.device_type, dtype=torch.float32)
        return values.to(request.dtype).requires_grad_(request.needs_grad)

    noisy, clean = (
        Stream(draw(heads), draw(groups), draw(groups)) if request.streams in ("pair", name) else None
        for name in ("noisy", "clean")
    )
    if request.streams == "pair":
        return noisy, clean, Visibility.pair(length, request.block_size, documents)
    if request.streams == "clean":
        return noisy, clean, Visibility.clean_only(length, request.block_size, documents)
    return noisy, clean, Visibility.noisy_only(length, documents)


def error_against_reference(attend: Attend, request: AttentionRequest) -> float:
    """Largest difference from the dense backend, outputs and gradients, in units of the dtype's tolerance."""
    noisy, clean, visibility = sample_problem(request, small=True)
    expected = _run(dense.attend, noisy, clean, visibility, request)
    actual = _run(attend, noisy, clean, visibility, request)
    worst = [((a - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected, strict=True)]
    # A NaN must not be hidden by max(): NaN compares false.
    return max(worst) / TOLERANCES[request.dtype] if all(w == w for w in worst) else float("nan")


def measure_seconds(attend: Attend, request: AttentionRequest) -> float:
    """Median seconds of one forward, with its backward if the request needs gradients."""
    noisy, clean, visibility = sample_problem(request, small=False)
    times = []
    for repeat in range(_WARM_UPS + _REPEATS):
        _wait(request.device_type)
        start = time.perf_counter()
        _run(attend, noisy, clean, visibility, request)
        _wait(request.device_type)
        if repeat >= _WARM_UPS:
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _run(
    attend: Attend, noisy: Stream | None, clean: Stream | None, visibility: Visibility, request: AttentionRequest
) -> list[Tensor]:
    inputs = [t for s in (noisy, clean) if s is not None for t in (s.q_BLNH, s.k_BLGH, s.v_BLGH)]
    outs = [o for o in attend(noisy, clean, visibility, scale=request.head_dim**-0.5) if o is not None]
    # Smooth fixed weights: the outputs themselves would leave some gradients near zero.
    weights = [torch.linspace(-1, 1, o.numel(), device=o.device).view(o.shape).to(o.dtype) for o in outs]
    grads = torch.autograd.grad(outs, inputs, weights) if request.needs_grad else ()
    return [t.detach().double() for t in (*outs, *grads)]


def _wait(device_type: str) -> None:
    if device_type == "cuda":
        torch.accelerator.synchronize()
