"""Times every attention backend, forward and backward, against the form most code ships: SDPA with a dense boolean mask.

    python -m tools.bench.attention                                   # CPU, L 2048, S 16: the target's shape
    python -m tools.bench.attention --length 512 1024 2048 --block-size 4 16 64
    python -m tools.bench.attention --device cuda --dtype bfloat16 --heads 16 --head-dim 128 --length 1024 2048 4096

First every backend that does not refuse is held against the reference, gradients included; one that is wrong is not timed.
Targets: CPU, L 2048, S 16: 3.0x the dense mask at least, 3.7x aimed at (4 L / (L + S) = 3.97 is the pair count's ratio);
H200, head_dim 128, L 4096: 1.5x FlexAttention's Triton kernels, 2x aimed at.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bd3_megatron.attention.probe import TOLERANCES, error_against_reference, sample_streams
from bd3_megatron.attention.request import AttentionRequest
from bd3_megatron.attention.select import backends
from bd3_megatron.attention.streams import Attend, Stream
from bd3_megatron.attention.visibility import Visibility
from bd3_megatron.command import CommandParser
from bd3_megatron.errors import BackendError
from tools.bench import harness
from tools.bench.harness import Note

# What the others are divided by, unless --against names another.
NAIVE = "dense mask"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    return harness.run_benchmark(build_parser(), measure_attention, arguments)


def measure_attention(options: argparse.Namespace) -> Iterator[Note]:
    """Check every backend, then time those that are right."""
    rows: list[list[object]] = []
    # A dictionary as an ordered set: the same refusal at every shape is said once.
    left_out: dict[str, None] = {}
    for length in options.length:
        for block_size in options.block_size:
            timed, lines = time_shape(bench_request(options, length, block_size), options)
            rows += timed
            left_out |= dict.fromkeys(lines)
    against = options.against or NAIVE
    header = ["L", "S", "backend", "error / tolerance", "ms", f"against {against}"]
    what = "forward" if options.forward_only else "forward + backward"
    shape = f"B {options.batch}, heads {options.heads}:{options.kv_heads or options.heads}, head_dim {options.head_dim}"
    title = f"attention {what}, {options.device}, {options.dtype}, {shape}{', packed' if options.documents else ''}"
    yield Note(title, "\n\n".join([harness.table(header, rows), "\n".join(left_out)]))


def build_parser() -> CommandParser:
    """The command line."""
    parser = harness.benchmark_parser("attention", __doc__, repeats=9)
    parser.add_argument("--length", type=int, nargs="+", default=[2048], help="L, clean positions")
    parser.add_argument("--block-size", type=int, nargs="+", default=[16], help="S")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=None, help="default: as many as heads")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--documents", action="store_true", help="pack four documents into every sequence")
    parser.add_argument("--forward-only", action="store_true")
    parser.add_argument("--against", default=None, help=f"candidate that the others are divided by (default {NAIVE!r})")
    return parser


def bench_request(options: argparse.Namespace, length: int, block_size: int) -> AttentionRequest:
    """What the command line asks of a backend."""
    return AttentionRequest(
        device_type=options.device,
        dtype=getattr(torch, options.dtype),
        batch=options.batch,
        rows=Visibility.pair(length, block_size),
        num_heads=options.heads,
        num_kv_heads=options.kv_heads or options.heads,
        head_dim=options.head_dim,
        documents=options.documents,
        needs_grad=not options.forward_only,
    )


def time_shape(request: AttentionRequest, options: argparse.Namespace) -> tuple[list[list[object]], list[str]]:
    """Rows of the table for one shape, and a line for every backend that is not timed."""
    visibility = request.visibility(0)
    noisy, clean = sample_streams(request, visibility)
    if noisy is None or clean is None:
        raise BackendError("the benchmark times a pair; its request must have both streams.")
    candidates: dict[str, Callable[[], object]] = {NAIVE: dense_mask_form(noisy, clean, visibility, request)}
    errors: dict[str, str] = {NAIVE: "-"}
    left_out: list[str] = []
    for label, attend, refusal in backends(request):
        # The reference is what the others are compared with; its speed is of no interest.
        if label == "dense":
            continue
        error, reason = (None, refusal) if refusal is not None else check(attend, request)
        if reason is None:
            errors[label] = f"{error:.2g} x {TOLERANCES[request.dtype]:g}"
            candidates[label] = ours(attend, (noisy, clean), visibility, request)
        else:
            left_out.append(f"- not timed, {label}: {reason}")
    served = {label.partition("/")[0] for label in candidates}
    # A kernel of another device is no news where the backend serves with one of its own.
    left_out = [line for line in left_out if line.split()[3].partition("/")[0] not in served]
    # All candidates in turns, so that a busy neighbour slows all of them alike.
    seconds = harness.interleave(candidates, repeats=options.repeats, device=request.device_type)
    against = options.against or NAIVE
    rows: list[list[object]] = []
    for name in candidates:
        ratio = f"{harness.speedup(seconds, name, against=against):.2f}x"
        shape = [visibility.length, visibility.block_size]
        rows.append([*shape, name, errors[name], harness.milliseconds(seconds[name]), ratio])
    return rows, left_out


def check(attend: Attend, request: AttentionRequest) -> tuple[float | None, str | None]:
    """(error in units of the tolerance, what is wrong or None)."""
    try:
        error = error_against_reference(attend, request)
    except Exception as failure:
        # Compilers and kernels fail in types of their own; the note says so and the others are still timed.
        return None, f"fails: {(str(failure).splitlines() or ['no message'])[0]}"
    return error, None if error <= 1 else f"differs from the reference by {error:.3g} times its tolerance"


def dense_mask_form(
    noisy: Stream, clean: Stream, visibility: Visibility, request: AttentionRequest
) -> Callable[[], object]:
    """SDPA over the 2L rows, which it is given side by side, with the whole mask as a boolean tensor."""
    # Made outside of what is timed: code that ships this form builds it once a run.
    mask = visibility.pair_mask(request.device_type)[:, None]
    pairs = [(noisy.q_BLNH, clean.q_BLNH), (noisy.k_BLGH, clean.k_BLGH), (noisy.v_BLGH, clean.v_BLGH)]
    q, k, v = (torch.cat([t.detach() for t in pair], dim=1).requires_grad_(request.needs_grad) for pair in pairs)
    scale = request.head_dim**-0.5
    grouped = request.num_heads != request.num_kv_heads

    def run() -> object:
        heads = [t.transpose(1, 2) for t in (q, k, v)]
        out = scaled_dot_product_attention(
            heads[0], heads[1], heads[2], attn_mask=mask, scale=scale, enable_gqa=grouped
        )
        return _backward([out], [q, k, v], request)

    return run


def ours(
    attend: Attend, streams: tuple[Stream, Stream], visibility: Visibility, request: AttentionRequest
) -> Callable[[], object]:
    """A backend of this package on the same inputs."""
    inputs = [t for s in streams for t in (s.q_BLNH, s.k_BLGH, s.v_BLGH)]

    def run() -> object:
        outs = attend(*streams, visibility, scale=request.head_dim**-0.5)
        return _backward([out for out in outs if out is not None], inputs, request)

    return run


def _backward(outs: list[Tensor], inputs: list[Tensor], request: AttentionRequest) -> object:
    # The outputs themselves as gradients: no further random numbers, and no zero that a kernel could skip.
    return torch.autograd.grad(outs, inputs, [out.detach() for out in outs]) if request.needs_grad else outs


if __name__ == "__main__":
    raise SystemExit(main())
