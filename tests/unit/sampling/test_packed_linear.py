"""Packed weights give the same products, replace what they pack, and leave alone what they must."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bd3_megatron.sampling.figures import weight_bytes
from bd3_megatron.sampling.packed_linear import PackedLinear, is_right, pack_linear_layers, pays
from tests.tolerances import CACHED_FP32


class Pair(nn.Module):
    """Two layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(512, 640)
        self.small = nn.Linear(64, 640)
        self.lm_head = nn.Linear(512, 512, bias=False)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_packed_products_are_the_plain_ones() -> None:
    model = Pair()
    wide, x = model.wide, torch.randn(2, 3, 512, generator=torch.Generator().manual_seed(0))
    expected = wide(x).detach()
    assert pack_linear_layers(model, is_tied=False) == 2
    assert isinstance(model.wide, PackedLinear) and isinstance(model.lm_head, PackedLinear)
    assert isinstance(model.small, nn.Linear)
    with torch.inference_mode():
        torch.testing.assert_close(model.wide(x), expected, rtol=0, atol=CACHED_FP32)
    table = nn.Embedding(4, 4)
    assert weight_bytes(model.wide, model.lm_head, table.weight) + 64 == 4 * (512 * 640 + 512 * 512)


def test_a_tied_head_other_dtypes_and_narrow_layers_stay_plain() -> None:
    model = Pair()
    pack_linear_layers(model, is_tied=True)
    assert isinstance(model.lm_head, nn.Linear)
    assert not pays(nn.Linear(512, 512).double())
    assert not pays(nn.Linear(256, 1024))
    assert pack_linear_layers(Pair().double(), is_tied=False) == 0


def test_without_the_operator_the_model_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    assert not is_right(nn.Linear(512, 512))
    assert pack_linear_layers(Pair(), is_tied=False) == 0
