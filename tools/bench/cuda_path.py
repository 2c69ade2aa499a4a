"""The path that a CUDA device takes, walked on torch's meta device: every operation is dispatched, none is run.

Contract: the product's own functions choose and call; a kernel's launch and a compiled graph count as one operation each way,
whatever they hold. Shapes and counts are exact, numbers do not exist, and a host read of a tensor is an error.
"""

from __future__ import annotations

import functools
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from megatron.core.fusions import fused_bias_swiglu
from torch import Tensor

from bd3_megatron.attention import flex, machine, triton_pair
from bd3_megatron.attention.select import Backend
from bd3_megatron.model import activation, norms, rotary

META = torch.device("meta")
# their kernels are written with names that only Triton gives
_KERNEL_FILES = ("bd3_megatron.attention.triton_kernels", "bd3_megatron.model.triton_rotary")


@functools.cache
def _library() -> Any:
    """One operator that stands for whatever runs as one: torch's dispatcher then counts it once."""
    library = torch.library.Library("bd3_bench", "DEF")
    library.define("one(Tensor[] like) -> Tensor[]")
    library.impl("one", lambda like: [torch.empty_like(t) for t in like], "CompositeExplicitAutograd")
    return library


def _one(*like: Tensor) -> list[Tensor]:
    _library()
    return torch.ops.bd3_bench.one(list(like))  # type: ignore[no-any-return]


class _Graph(torch.autograd.Function):
    """One operation forward, with an output like the first input, and one backward, with a gradient for each."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return _one(inputs[0])[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(_one(*ctx.saved_tensors))


class _Launcher:
    """A kernel: `kernel[grid](...)` counts."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            _one(*(a for a in arguments if isinstance(a, Tensor)))

        return launch


def _counting_triton() -> dict[str, types.ModuleType]:
    """Triton whose kernels are counted instead of compiled."""
    triton, language = types.ModuleType("triton"), types.ModuleType("triton.language")
    triton.__spec__ = importlib.machinery.ModuleSpec("triton", None)
    vars(triton).update(
        language=language,
        jit=lambda kernel: _Launcher(),
        next_power_of_2=lambda n: 1 << (n - 1).bit_length(),
        cdiv=lambda n, m: -(-n // m),
    )
    language.constexpr = None  # type: ignore[attr-defined]
    return {"triton": triton, "triton.language": language}


def _silu_like(rows: Tensor) -> Tensor:
    return _one(rows[..., : rows.shape[-1] // 2])[0]


@contextmanager
def on_cuda() -> Iterator[None]:
    """Inside, the model takes the kernels that it takes on CUDA with Triton, and each counts as one operation."""
    # a file that real Triton has compiled must not be the one that is counted
    kernels = sys.modules.keys() & set(_KERNEL_FILES)
    with ExitStack() as stack:
        # a module that real Triton made is put back afterwards, one that this Triton made is forgotten
        stack.enter_context(mock.patch.dict(sys.modules, _counting_triton()))
        for name in kernels:
            del sys.modules[name]
        for owner, name, value in (
            (norms, "norm_kernel", lambda rows: norms.FUSED),
            (rotary, "turning_kernel", lambda heads: "triton"),
            (activation, "elementwise_kernel", lambda device: activation.COMPILED),
            (machine, "has", lambda package: True),
            (torch.nn.functional, "rms_norm", lambda rows, shape, weight, eps: _Graph.apply(rows, weight)),
            (fused_bias_swiglu, "swiglu", _silu_like),
            (fused_bias_swiglu, "swiglu_back", lambda grad, rows: _one(rows)[0]),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def backend(name: str) -> Backend:
    """Flex attention around one graph, or the kernels of our own."""
    if name == "triton":
        return Backend(name, triton_pair.attend, "counted", triton_pair.tables)
    rows = functools.partial(flex.flex_rows, call=_flex_graph)
    return Backend(name, functools.partial(flex.attend, call=_flex_graph), "counted", flex.block_mask, rows)


def _flex_graph(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return _Graph.apply(q, k, v)  # type: ignore[no-any-return]
