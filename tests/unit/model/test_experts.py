"""The grouped product of experts equals the loop over them, forwards and backwards, with experts that no row has chosen."""

from __future__ import annotations

import torch

from bd3_megatron.model.experts import grouped_product, is_grouped, looped_product
from tests.tolerances import ROWS_FP32


def test_the_grouped_product_equals_the_loop() -> None:
    generator = torch.Generator().manual_seed(1)
    rows_nD = torch.randn(13, 16, generator=generator)
    weight = torch.randn(4, 24, 16, generator=generator)
    counts_e = torch.tensor([5, 0, 7, 1])
    found = []
    for product in (grouped_product, looped_product):
        x, w = rows_nD.clone().requires_grad_(), weight.clone().requires_grad_()
        out = product(x, w, counts_e)
        out.square().sum().backward()
        assert x.grad is not None and w.grad is not None
        found.append((out.detach(), x.grad, w.grad))
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() <= ROWS_FP32 * other.abs().max()
    assert not found[0][2][1].any()


def test_a_cpu_takes_the_loop() -> None:
    assert not is_grouped(torch.zeros(2, 16, dtype=torch.bfloat16), torch.zeros(1, 8, 16, dtype=torch.bfloat16))
