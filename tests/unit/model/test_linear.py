"""A rank that holds the whole matrix computes megatron's products to the bit, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from bd3_megatron.config.schema import ModelConfig, ParallelConfig
from bd3_megatron.model.linear import ColumnLinear, RowLinear
from bd3_megatron.model.spec import transformer_config
from bd3_megatron.parallel.topology import Topology, join, leave


@pytest.fixture
def topology() -> Iterator[Topology]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield join(ParallelConfig(), rank=0, world_size=1, device=torch.device("cpu"))
    leave()


@pytest.mark.parametrize("skips_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ours", "theirs"), [(ColumnLinear, ColumnParallelLinear), (RowLinear, RowParallelLinear)])
def test_products_are_megatrons(
    ours: Any, theirs: Any, dtype: torch.dtype, skips_bias: bool, topology: Topology
) -> None:
    model = ModelConfig(hidden_size=24, num_layers=1, num_heads=2, style="paper")
    config = transformer_config(model, topology, dtype=dtype)
    options = {"input_is_parallel": True} if ours is RowLinear else {"gather_output": False}
    found = []
    generator = torch.Generator().manual_seed(0)
    # rows as a view that is not dense, as the streams of a layer are
    rows = torch.randn(3, 7, 24, generator=generator).to(dtype).transpose(0, 1)
    weight, bias, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in ((40, 24), (40,), (7, 3, 40)))
    for kind in (ours, theirs):
        layer = kind(
            24,
            40,
            config=config,
            init_method=torch.nn.init.zeros_,
            bias=True,
            skip_bias_add=skips_bias,
            is_expert=False,
            tp_group=topology.groups.tp,
            **options,
        )
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        leaf = rows.detach().requires_grad_()
        out, left = layer(leaf)
        assert (left is layer.bias) == skips_bias
        out = out if left is None else out + left
        found.append([out, *torch.autograd.grad(out, [leaf, layer.weight, layer.bias], grad)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
