"""Under context parallelism clean keys and values travel, and nothing else: half of what a ring over the pair would move."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from bd3_megatron.attention import dense
from bd3_megatron.attention.streams import Stream
from bd3_megatron.config.schema import ParallelConfig
from bd3_megatron.diffusion.objective import BlockDiffusion
from bd3_megatron.parallel import context
from bd3_megatron.parallel.context import gather_clean
from bd3_megatron.parallel.pair_split import pair_layout
from bd3_megatron.parallel.topology import Topology
from tests import tolerances
from tests.ranks.harness import run_ranks

B, L, G, H, S = 2, 16, 2, 4, 2


def whole_streams() -> list[torch.Tensor]:
    """q, k, v of the noisy and the clean stream over the whole sequence, fp64."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(B, L, G, H, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(6)]


@pytest.mark.parametrize("cp", [2, 4])
def test_attention_and_its_gradients_are_those_of_the_whole_sequence(cp: int) -> None:
    def on_rank(topology: Topology) -> Any:
        layout = pair_layout(BlockDiffusion(block_size=S), length=L, cp=cp, cp_rank=topology.cp_rank)
        mine = layout.position_P[: layout.num_noisy]
        q0, k0, v0, q1, k1, v1 = (t.detach()[:, mine].requires_grad_() for t in whole_streams())
        clean = Stream(q1, *gather_clean(k1, v1, topology.groups.cp))
        outs = dense.attend(Stream(q0, k0, v0), clean, layout.visibility(), scale=0.5)
        loss = sum(out.sin().sum() for out in outs if out is not None)
        grads = torch.autograd.grad(loss, [q0, k0, v0, q1, k1, v1])
        return mine, [out.detach() for out in outs if out is not None], grads

    streams = whole_streams()
    layout = pair_layout(BlockDiffusion(block_size=S), length=L, drop_last_clean=False)
    outs = dense.attend(Stream(*streams[:3]), Stream(*streams[3:]), layout.visibility(), scale=0.5)
    grads = torch.autograd.grad(sum(out.sin().sum() for out in outs if out is not None), streams)
    for mine, found_outs, found_grads in run_ranks(on_rank, ParallelConfig(cp=cp)):
        for found, whole in zip((*found_outs, *found_grads), (*outs, *grads), strict=True):
            assert torch.allclose(found, whole[:, mine], rtol=0, atol=tolerances.EXACT_FP64)


def test_only_clean_keys_and_values_travel() -> None:
    def on_rank(topology: Topology) -> list[int]:
        moved: list[int] = []
        # fork: this patches this rank's module only
        gather, scatter = dist.all_gather_into_tensor, dist.reduce_scatter_tensor

        def counted_gather(out: torch.Tensor, own: torch.Tensor, group: Any) -> None:
            moved.append(out.numel() - own.numel())
            gather(out, own, group=group)

        def counted_scatter(own: torch.Tensor, out: torch.Tensor, group: Any) -> None:
            moved.append(out.numel() - own.numel())
            scatter(own, out, group=group)

        context.dist.all_gather_into_tensor = counted_gather
        context.dist.reduce_scatter_tensor = counted_scatter
        k, v = (torch.ones(B, L // 4, G, H, requires_grad=True) for _ in range(2))
        sum(t.sum() for t in gather_clean(k, v, topology.groups.cp)).backward()
        return moved

    elements = 2 * B * L * G * H * 3 // 4
    assert run_ranks(on_rank, ParallelConfig(cp=4)) == [[elements, elements]] * 4
