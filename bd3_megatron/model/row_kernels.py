"""Which kernels work on single rows (norms, turns, activations, residuals, experts), and their check before the first step.

Each is held against its formula in fp64 on random rows of the run's own widths, dtype and device, outputs and gradients: a fused
kernel that is wrong here would train a wrong model without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from torch import Tensor

from bd3_megatron.config.experts import ExpertsConfig
from bd3_megatron.config.schema import ModelConfig
from bd3_megatron.errors import BackendError
from bd3_megatron.model.activation import COMPILED, activate, elementwise_kernel
from bd3_megatron.model.experts import ExpertStack, is_grouped
from bd3_megatron.model.norms import LayerNorm, RMSNorm, norm_kernel
from bd3_megatron.model.rotary import rotary_angles, rotary_turn, turned, turning_kernel

# Of the largest value. A result is rounded once from fp32 sums, a gradient of an activation up to three times.
ROW_TOLERANCES = MappingProxyType(
    {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
)
# Few rows: a wrong kernel is wrong on the first one, and the widths are the run's own.
_ROWS, _BATCH = 24, 2
_ROPE_BASE = 10_000.0
# Unequal, with none at one: groups of a grouped product start where the ones before them end.
_EXPERT_ROWS = (7, 0, 16, 1)

_Call = Callable[..., Tensor]


@dataclass(frozen=True)
class RowKernel:
    """One operation on rows: what the model calls, and its formula."""

    name: str
    kernel: str
    """What runs, as the start of a run says it."""
    call: _Call
    formula: _Call
    """Of the same inputs in fp64."""
    inputs: tuple[Tensor, ...]
    """Leaves that want gradients, in the run's dtype."""


def row_kernels(model: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> list[RowKernel]:
    """The operations on rows that a model makes.

    Args:
        model: widths and style.
        dtype, device: of the run's activations.
    """
    return list(_row_kernels(model, _Draw(dtype, device)))


def check_row_kernels(kernels: list[RowKernel]) -> str:
    """Hold each kernel against its formula.

    Returns:
        One line that names the kernels.

    Raises:
        BackendError: one is wrong; with how much, and what to do.
    """
    for one in kernels:
        error = worst_error(one)
        tolerance = ROW_TOLERANCES[one.inputs[0].dtype]
        # written this way round, so that a NaN is refused
        if not error <= tolerance:
            raise BackendError(
                f"{one.name} by {one.kernel} is off by {error:.1e} of its largest value on this machine, and "
                f"{tolerance:.1e} is rounding; report this with the output of `bd3 doctor`."
            )
    return ", ".join(f"{one.name} by {one.kernel}" for one in kernels)


def worst_error(kernel: RowKernel) -> float:
    """Largest error of output and gradients, each relative to its own largest value."""
    return float(torch.stack(errors(kernel)).max())


def errors(kernel: RowKernel) -> list[Tensor]:
    """Largest errors of the output and of each input's gradient, each relative to its own largest value: fp64 []."""
    # its own rows shuffled: as large as they are, and exact in both dtypes
    upstream = kernel.call(*kernel.inputs).detach().flip(0)
    wide = tuple(t.detach().double().requires_grad_() for t in kernel.inputs)
    found, expected = (
        _with_gradients(kernel.call, kernel.inputs, upstream),
        _with_gradients(kernel.formula, wide, upstream),
    )
    return [(a.double() - b).abs().max() / b.abs().max() for a, b in zip(found, expected, strict=True)]


class _Draw:
    """Random leaves of one dtype and device, from a fixed seed."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        # On the CPU and in fp64: the same numbers on every machine, rounded to the run's dtype.
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        return drawn.to(self.device, self.dtype).requires_grad_()


def _row_kernels(model: ModelConfig, draw: _Draw) -> Iterator[RowKernel]:
    width, head_dim, eps = model.hidden_size, model.head_width, model.layer_norm_eps
    modern = model.style == "modern"
    rows = draw(_ROWS, _BATCH, width)
    heads = draw(_ROWS, _BATCH, 3, head_dim)
    if modern:
        yield _rms_norm("RMSNorm", eps, rows, draw(width))
    else:
        norm = LayerNorm(_norm_config(rows), width, eps)
        yield RowKernel(
            "LayerNorm",
            norm_kernel(rows),
            lambda x, weight, bias: torch.func.functional_call(norm, {"weight": weight, "bias": bias}, x),
            lambda x, weight, bias: F.layer_norm(x, (width,), weight, bias, eps),
            (rows, draw(width), draw(width)),
        )
    if model.qk_norm:
        yield _rms_norm("RMSNorm of heads", eps, heads, draw(head_dim))
    positions = torch.arange(_ROWS, device=draw.device)
    yield RowKernel(
        "rotary turn",
        turning_kernel(heads),
        lambda x: turned(x, rotary_turn(rotary_angles(positions, head_dim, _ROPE_BASE, dtype=_wide(x.dtype)))),
        lambda x: _rotate_half(x, rotary_angles(positions, head_dim, _ROPE_BASE, dtype=torch.float64)),
        (heads,),
    )
    # Elementwise: its width decides nothing.
    inner = draw(_ROWS, _BATCH, 32)
    if modern:
        yield RowKernel(
            "SwiGLU",
            elementwise_kernel(inner.device),
            lambda x: activate(x, None, gated=True),
            lambda x: F.silu(x[..., :16]) * x[..., 16:],
            (inner,),
        )
    else:
        yield RowKernel(
            "GELU",
            elementwise_kernel(inner.device),
            lambda x, bias: activate(x, bias, gated=False),
            lambda x, bias: F.gelu(x + bias, approximate="tanh"),
            (inner, draw(32)),
        )
    if model.experts is not None:
        yield _expert_product(model, model.experts, draw)
    kernel = elementwise_kernel(draw.device)
    add = get_bias_dropout_add(True, kernel == COMPILED)
    yield RowKernel(
        "residual",
        kernel,
        lambda x, residual, bias: add((x, bias), residual, 0.0),
        lambda x, residual, bias: x + bias + residual,
        (rows, draw(_ROWS, _BATCH, width), draw(width)),
    )


def _expert_product(model: ModelConfig, experts: ExpertsConfig, draw: _Draw) -> RowKernel:
    """The down matrices of four experts, one of which no row has chosen."""
    counts_e = torch.tensor(_EXPERT_ROWS, device=draw.device)
    rows, weight = draw(sum(_EXPERT_ROWS), experts.width), draw(len(_EXPERT_ROWS), model.hidden_size, experts.width)
    stack = ExpertStack(len(_EXPERT_ROWS), model.hidden_size, experts.width, draw.dtype)
    chosen = [expert for expert, number in enumerate(_EXPERT_ROWS) for _ in range(number)]
    return RowKernel(
        "experts",
        "torch, grouped" if is_grouped(rows, weight) else "torch, one after another",
        lambda x, weight: torch.func.functional_call(stack, {"weight": weight}, (x, counts_e)),
        lambda x, weight: torch.stack([weight[expert] @ row for expert, row in zip(chosen, x, strict=True)]),
        (rows, weight),
    )


def _norm_config(rows: Tensor) -> Any:
    return SimpleNamespace(params_dtype=rows.dtype, sequence_parallel=False)


def _rms_norm(name: str, eps: float, rows: Tensor, weight: Tensor) -> RowKernel:
    norm = RMSNorm(_norm_config(rows), rows.shape[-1], eps)
    return RowKernel(
        name,
        norm_kernel(rows),
        lambda x, weight: torch.func.functional_call(norm, {"weight": weight}, x),
        lambda x, weight: x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight,
        (rows, weight),
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _rotate_half(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


def _with_gradients(call: _Call, inputs: tuple[Tensor, ...], upstream: Tensor) -> list[Tensor]:
    out = call(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]
