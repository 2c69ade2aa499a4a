"""What megatron's own DDP wrapper would do to gradients between the last backward and the optimizer.

Three sums, each over one named group: norm weights under sequence parallelism, q and k norm weights under tensor
parallelism, and a tied table's two copies (first and last stage). The data-parallel mean is taken elsewhere: in
sharded_gradients, or by DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bd3_megatron.model.bd3_model import Root
from bd3_megatron.model.partition import EMBEDDING
from bd3_megatron.parallel.topology import Topology

GradientsOf = Callable[[nn.Parameter], list[Tensor]]
"""The accumulated gradient of a parameter, in the pieces it is kept in; none where it took no part."""


def deepspeed_gradients(parameter: nn.Parameter) -> list[Tensor]:
    """The accumulated gradient where DeepSpeed keeps it: its own accumulator, or .grad."""
    held = getattr(parameter, "grad_accum", None)
    found = parameter.grad if held is None else held
    return [] if found is None else [found]


def needs_tensor_sum(name: str, parameter: nn.Parameter, topology: Topology) -> bool:
    """True for replicated parameters of which every tensor-parallel rank has a partial gradient."""
    if topology.tp == 1:
        return False
    # Each tp rank normed its own heads with the same weight.
    per_head = ".q_layernorm." in name or ".k_layernorm." in name
    # Under sequence parallelism each tp rank saw its own rows only (the mark is set in model/norms).
    return per_head or bool(getattr(parameter, "sequence_parallel", False))


def finish_gradients(root: Root, topology: Topology, gradients_of: GradientsOf) -> None:
    """Make the accumulated gradients whole over tp and over tied copies, in place. Entry: partial; exit: summed."""
    partial = _partial_over_tp(root, topology)
    _sum_together([grad for parameter in partial for grad in gradients_of(parameter)], topology.groups.tp)
    table = _tied_copy(root, topology)
    if table is not None and topology.embedding_group is not None:
        # first and last stage may keep their copies in other pieces; together they are as many elements
        _sum_together(gradients_of(table), topology.embedding_group)


def _sum_together(grads: list[Tensor], group: dist.ProcessGroup) -> None:
    """One all-reduce of all of them, in place."""
    if not grads:
        return
    if len(grads) == 1:
        dist.all_reduce(grads[0], group=group)
        return
    # One collective for all of them: the norms are many and tiny.
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat, group=group)
    for grad, whole in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(whole.view_as(grad))


def late_parameters(root: Root, topology: Topology) -> list[nn.Parameter]:
    """Those whose gradients `finish_gradients` completes; all others are whole over tp and pp after the last backward."""
    table = _tied_copy(root, topology)
    return _partial_over_tp(root, topology) + ([] if table is None else [table])


def _partial_over_tp(root: Root, topology: Topology) -> list[nn.Parameter]:
    return [p for name, p in root.named_parameters() if needs_tensor_sum(name, p, topology)]


def _tied_copy(root: Root, topology: Topology) -> nn.Parameter | None:
    """This rank's copy of a table that another stage holds too."""
    if topology.embedding_group is None or not root.local_chunks()[0].shape.tie_embeddings:
        return None
    if not (topology.is_first_stage or topology.is_last_stage):
        return None
    # On the last stage too: its copy has the table's global name.
    return dict(root.named_parameters())[EMBEDDING]


def hook_partial_gradients(root: Root, topology: Topology) -> None:
    """For ZeRO 2 and 3: sum partial gradients over tp as they appear. Must be called before deepspeed.initialize."""

    def summed(grad: Tensor) -> Tensor:
        whole = grad.clone()
        dist.all_reduce(whole, group=topology.groups.tp)
        return whole

    for name, parameter in root.named_parameters():
        if needs_tensor_sum(name, parameter, topology):
            # Before DeepSpeed's own hooks, which cut the gradient at once. Tied copies need pp > 1, which these stages
            # do not run with.
            parameter.register_hook(summed)
