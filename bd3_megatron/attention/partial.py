"""One unmasked (or causal) rectangle of attention through torch's own kernels, and the exact sum of several.

A rectangle yields an output and the log-sum-exp of its scores; `merge_` adds rectangles of the same rows exactly.
Decides which kernel serves which device and dtype and refuses the rest. Knows nothing of blocks, streams or documents.
The CUDA entries follow the operators' schemas of torch 2.13 and have not been measured on a GPU.
Source: flash attention 2, arXiv 2307.08691; torch 2.13 distributed/tensor/experimental/_context_parallel/_attention.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from bd3_megatron.attention import machine

KernelForward = Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]
KernelBackward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor, Tensor]]

_aten = torch.ops.aten

# Blocks smaller than a cuDNN tile go to the flash kernels: any forward may be followed by any backward.
_CUDNN_MIN_ROWS = 64


# The gradient of the merged result for one rectangle's q, k, v is what its stock backward computes when it is handed
# the merged out and lse: the probabilities exp(s - lse) and the row sums dout . out that it rebuilds are then those of
# the whole row. So no forward runs again and no gradient flows through the statistics.
@dataclass(frozen=True)
class Kernel:
    """A forward/backward pair: q, k, v are [X, Y, rows, H] with any strides but a dense last dim; lse is [X, Y, rows]."""

    name: str
    forward: KernelForward
    backward: KernelBackward


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(dout, q, k, v, out, lse, 0.0, causal, scale=scale)


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    return out, lse


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    backward = _aten._scaled_dot_product_flash_attention_backward
    # Dropout is 0, so the kernel never reads the random state; the operator wants the tensors all the same.
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    sizes = (q.size(2), k.size(2))
    return backward(dout, q, k, v, out, lse.contiguous(), None, None, *sizes, 0.0, causal, state, state, scale=scale)


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    if k.size(2) < _CUDNN_MIN_ROWS:
        return _flash_forward(q, k, v, scale, causal)
    out, lse = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)[:2]
    return out, lse.view(q.shape[:3])


def _cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if k.size(2) < _CUDNN_MIN_ROWS:
        return _flash_backward(dout, q, k, v, out, lse, scale, causal)
    backward = _aten._scaled_dot_product_cudnn_attention_backward
    state = torch.zeros((), dtype=torch.int64, device=q.device)
    sizes = (q.size(2), k.size(2))
    # Statistics are [B, H, rows, 1] since torch 2.9.
    stats = lse.contiguous().unsqueeze(-1)
    return backward(dout, q, k, v, out, stats, state, state, None, None, None, *sizes, 0.0, causal, scale=scale)


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    # The operator's statistics come in rows padded to 32.
    out, lse = _aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
    return out, lse[..., : q.size(2)]


def _efficient_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    backward = _aten._scaled_dot_product_efficient_attention_backward
    state = torch.zeros((), dtype=torch.int64, device=q.device)
    # The kernel reads the statistics in rows padded to 32.
    padded = torch.nn.functional.pad(lse, (0, -lse.size(-1) % 32), value=float("inf"))
    needed = [True, True, True, False]
    return backward(dout, q, k, v, None, out, padded, state, state, 0.0, needed, causal, scale=scale)[:3]


KERNELS = MappingProxyType(
    {
        "cpu": Kernel("cpu", _cpu_forward, _cpu_backward),
        "flash": Kernel("flash", _flash_forward, _flash_backward),
        "cudnn": Kernel("cudnn", _cudnn_forward, _cudnn_backward),
        "efficient": Kernel("efficient", _efficient_forward, _efficient_backward),
    }
)


def kernels_for(device_type: str, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Names of the kernels that can serve, the expected fastest first; empty when there is none."""
    if device_type == "cpu":
        return ["cpu"] if dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16) else []
    # The operators are called below torch's padding front end, so the head size must fit as it is.
    if device_type != "cuda" or head_dim % 8:
        return []
    # Flash and cuDNN kernels are for half precision only.
    if dtype == torch.float32:
        return ["efficient"]
    if dtype not in (torch.bfloat16, torch.float16) or head_dim > 256:
        return []
    return ["cudnn", "flash"] if head_dim <= 128 and machine.capability() >= (9, 0) else ["flash"]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which outputs, statistics and gradients of several rectangles are summed."""
    # A row adds up about log2(blocks) rectangles: in bf16 every addition would round again.
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge_(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Fold one more rectangle into (out, lse), in place.

    Args:
        out: [..., rows, H], statistics dtype. Merged so far.
        lse: [..., rows], statistics dtype, finite.
        part_out: the new rectangle's output, any dtype.
        part_lse: the new rectangle's log-sum-exp.
    """
    # out = sum_i exp(lse_i - lse) out_i with lse = log sum_i exp(lse_i), folded in one rectangle at a time:
    # out + w (part - out) with w = exp(part_lse - new_lse) = sigmoid(part_lse - lse): one pass, no overflow.
    weight = torch.sigmoid(part_lse - lse).unsqueeze(-1)
    out.lerp_(part_out.to(out.dtype), weight)
    torch.logaddexp(lse, part_lse, out=lse)
