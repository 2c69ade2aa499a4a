"""Errors of what is worked out in bf16 or fp32, against fp64 of the same inputs: norms, rotary turns, activations, the head.

    python -m tools.bench.precision [--hidden 2048 --heads 16 --rows 512 --vocab 8192]

The functions are the model's own, as chosen for the device. Errors are relative to the largest value of what is compared, the
head's losses in nats; "bf16 logits" is the head as most code has it, which rounds the logits themselves.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# run as a script from any folder, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bd3_megatron.command import CommandParser
from bd3_megatron.config.schema import ModelConfig
from bd3_megatron.model.head import VocabShard, weighted_nll
from bd3_megatron.model.row_kernels import ROW_TOLERANCES, errors, row_kernels
from tools.bench import harness
from tools.bench.harness import Note

_DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class HeadErrors:
    """Of the loss of some rows and of its gradients, against fp64."""

    mean_nats: float
    """Mean of the absolute errors of the rows' losses."""
    bias_nats: float
    """Mean of the errors themselves: what the reported loss is off by."""
    largest_nats: float
    hidden: float
    """Gradient by the hidden states, relative to its largest value."""
    table: float


def rows_errors(
    model: ModelConfig, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, str, float, float]]:
    """(operation, kernel, error of the output, worst error of a gradient) of each operation on rows that a model makes."""
    for kernel in row_kernels(model, dtype=dtype, device=device):
        output, *gradients = map(float, errors(kernel))
        yield kernel.name, kernel.kernel, output, max(gradients)


def head_errors(
    *, rows: int, hidden: int, vocab: int, device: torch.device, logits_in_bf16: bool = False
) -> HeadErrors:
    """Errors of the head on bf16 inputs whose logits have a spread of about 3, as of a model that has learnt something.

    Args:
        rows, hidden, vocab: R, D, V.
        device: of the tensors.
        logits_in_bf16: of the form that rounds logits to bf16, instead of the product's.
    """
    generator = torch.Generator().manual_seed(0)
    hidden_RD = torch.randn(rows, hidden, generator=generator).to(device, torch.bfloat16)
    table_VD = (torch.randn(vocab, hidden, generator=generator) * 3 / hidden**0.5).to(device, torch.bfloat16)
    target_R = torch.randint(0, vocab, (rows,), generator=generator).to(device)
    weight_R = torch.full((rows,), 1 / rows, device=device)

    # the same inputs, rounded to bf16, on both sides: what differs is the arithmetic
    def solved(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (hidden_RD, table_VD)]
        if logits_in_bf16 and dtype == torch.bfloat16:
            nll_R = F.cross_entropy((leaves[0] @ leaves[1].t()).float(), target_R, reduction="none")
            total = (nll_R * weight_R).sum()
        else:
            shard, wide_R = VocabShard(0, vocab, None, None), weight_R.to(torch.promote_types(dtype, torch.float32))
            total, nll_R, _ = weighted_nll(leaves[0], leaves[1], None, target_R, wide_R, shard=shard)
        return nll_R.detach().double(), [g.double() for g in torch.autograd.grad(total, leaves)]

    (found_R, found), (exact_R, exact) = solved(torch.bfloat16), solved(torch.float64)
    off_R = found_R - exact_R
    # relative to the largest, since small entries of a gradient cancel down to rounding
    gradients = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True)]
    return HeadErrors(float(off_R.abs().mean()), float(off_R.mean()), float(off_R.abs().max()), *gradients)


def build_parser() -> CommandParser:
    """The command line."""
    parser = harness.benchmark_parser("precision", __doc__, repeats=1)
    for name, value in {"hidden": 2048, "heads": 16, "rows": 512, "vocab": 8192}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; returns the exit code."""
    return harness.run_benchmark(build_parser(), measure_precision, arguments)


def measure_precision(options: argparse.Namespace) -> Iterator[Note]:
    """Both tables."""
    device = torch.device(options.device)
    lines: list[tuple[str, ...]] = []
    for style in ("modern", "paper"):
        model = ModelConfig(
            hidden_size=options.hidden,
            num_layers=1,
            num_heads=options.heads,
            style=style,
            qk_norm=style == "modern",
        )
        for dtype in _DTYPES:
            name = str(dtype).removeprefix("torch.")
            lines += [
                (style, operation, kernel, name, f"{output:.1e}", f"{gradient:.1e}")
                for operation, kernel, output, gradient in rows_errors(model, dtype, device)
            ]
    header = ("style", "operation", "kernel", "dtype", "output", "worst gradient")
    heads = []
    for form, rounds in (("fp32 logits (shipped)", False), ("bf16 logits", True)):
        found = head_errors(
            rows=options.rows, hidden=options.hidden, vocab=options.vocab, device=device, logits_in_bf16=rounds
        )
        heads.append((form, *(f"{value:.1e}" for value in vars(found).values())))
    head_header = (
        "head of bf16 inputs",
        "mean absolute error, nats",
        "bias, nats",
        "largest, nats",
        "d hidden",
        "d table",
    )
    shape = f"h{options.hidden}, {options.heads} heads, {options.rows} rows, V{options.vocab}"
    bounds = " and ".join(f"{ROW_TOLERANCES[d]:.1e} in {str(d).removeprefix('torch.')}" for d in _DTYPES)
    limit = f"A run does not start where an operation on rows is off by more than {bounds}."
    tables = [harness.table(header, lines), limit, harness.table(head_header, heads)]
    yield Note(f"errors against fp64, {shape}", "\n\n".join(tables))


if __name__ == "__main__":
    sys.exit(main())
