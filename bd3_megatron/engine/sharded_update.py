"""Gradient norm, clipping and Adam on the part of the parameters that a rank owns, without a host read.

Contract: every element of the model counts once in the norm; an update with a norm that is not finite is left out on the
device. Source: Loshchilov and Hutter 2019 (AdamW, arXiv 1711.05101); torch's fused AdamW and its `found_inf`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bd3_megatron.parallel.topology import Topology

# added to the norm before it divides, as DeepSpeed and torch do
NORM_EPS = 1e-6


def counted_once(root: nn.Module, topology: Topology) -> list[nn.Parameter]:
    """The parameters whose gradients this rank puts into the global norm: copies on other ranks are not counted again."""
    return [
        parameter
        for parameter in root.parameters()
        # DeepSpeed's mark for a tied copy, and megatron's for a part of a matrix
        if not getattr(parameter, "ds_pipe_replicated", False)
        and (topology.tp_rank == 0 or getattr(parameter, "tensor_model_parallel", False))
    ]


def global_norm(counted: Sequence[Tensor], device: torch.device) -> Tensor:
    """Norm of all ranks' gradients together. Collective over the world.

    Args:
        counted: this rank's share; every element of the model is in exactly one rank's.
        device: of the result, where this rank counts nothing.

    Returns:
        [] float64.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    if counted:
        # fp32 norms of pieces, added in fp64: how the model is cut over ranks hardly shows
        total += torch.stack(torch._foreach_norm(list(counted))).double().square().sum()
    dist.all_reduce(total)
    return total.sqrt()


@torch.no_grad()
def update_owned(
    optimizer: torch.optim.Optimizer,
    owned: Sequence[Tensor],
    grads: Sequence[Tensor],
    counted: Sequence[Tensor],
    *,
    clip: float,
) -> tuple[Tensor, Tensor]:
    """Clip and step. Collective over the world.

    Args:
        optimizer: over `owned`.
        owned: this rank's parameters, flat.
        grads: their mean gradients; scaled in place.
        counted: those parts of `grads` that this rank puts into the norm.
        clip: largest norm; 0: none.

    Returns:
        (norm before clipping, 1 where the update was made), [] each, on the device.
    """
    norm = global_norm(counted, grads[0].device)
    finite = torch.isfinite(norm)
    if clip > 0:
        factor = (clip / (norm + NORM_EPS)).clamp_max(1.0)
        # 0 x padding stays 0, where nan would stay in it for good
        torch._foreach_mul_(list(grads), torch.where(finite, factor, 0.0).to(grads[0].dtype))
    for parameter, grad in zip(owned, grads, strict=True):
        parameter.grad = grad
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        optimizer.step()
    # Apex has no such switch: asked for by name, it costs a host read a step
    elif bool(finite):
        optimizer.step()
    return norm, finite.to(norm.dtype)
