"""An update with a gradient that is not finite leaves nothing behind, in the padding of a rank's part neither."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from bd3_megatron.engine.sharded_update import update_owned


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_left_out_stays_out(bad: float, alone: None) -> None:
    owned = torch.tensor([1.0, 2.0, 0.0], requires_grad=True)
    adam = torch.optim.AdamW([owned], lr=0.1, fused=True)
    # the last element is padding, which no gradient ever writes
    grads = torch.zeros(3)
    before = owned.detach().clone()
    for first, is_made in ((bad, 0.0), (3.0, 1.0)):
        grads[:2] = torch.tensor([first, 4.0])
        norm, applied = update_owned(adam, [owned], [grads], [grads[:2]], clip=1.0)
        assert applied == is_made and math.isfinite(norm) == bool(is_made)
        assert grads[2] == 0.0 and owned[2] == 0.0
        assert torch.equal(owned, before) != bool(is_made)
    assert norm == 5.0 and torch.allclose(grads[:2], torch.tensor([0.6, 0.8]), atol=1e-6)
