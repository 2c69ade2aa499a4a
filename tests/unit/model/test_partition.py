"""Cutting a tensor over tensor-parallel ranks and joining it again loses nothing; one table says how each is cut."""

from __future__ import annotations

import pytest
import torch

from bd3_megatron.convert.name_table import NameTable
from bd3_megatron.model.partition import Partition, full_shape, padded_vocab, partition_of, shard
from tests.unit.cost.cases import STYLES, case
from tests.unit.model.joined import unshard

CUTS = [Partition(None), Partition(0), Partition(1), Partition(0, 2)]


@pytest.mark.parametrize("partition", CUTS, ids=str)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_pieces_join_to_the_whole(partition: Partition, size: int) -> None:
    whole = torch.arange(16 * 8).view(16, 8)
    pieces = [shard(whole, partition, rank, size) for rank in range(size)]
    assert torch.equal(unshard(pieces, partition), whole)
    assert {full_shape(tuple(piece.shape), partition, size) for piece in pieces} == {(16, 8)}


def test_stacked_tensors_are_cut_one_by_one() -> None:
    gate, up = torch.zeros(4, 2), torch.ones(4, 2)
    for rank in range(2):
        piece = shard(torch.cat([gate, up]), Partition(0, 2), rank, 2)
        # every rank has its part of both, or its gate would meet another rank's up
        assert piece[:, 0].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("style", STYLES)
def test_every_parameter_is_cut_as_its_layer_works(style: str) -> None:
    model = case(style=style).model
    gated = model.style == "modern"
    for name in NameTable(model, 60).parallel_names():
        cut = partition_of(name, gated=gated)
        if "norm" in name or name.endswith(("linear_proj.bias", "linear_fc2.bias")):
            assert cut == Partition(None), name
        elif name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            assert cut == Partition(1), name
        else:
            assert cut == Partition(0, 2 if gated and "linear_fc1" in name else 1), name


def test_the_table_is_padded_up() -> None:
    assert [padded_vocab(v, 128) for v in (1, 128, 129, 50258)] == [128, 128, 256, 50304]
