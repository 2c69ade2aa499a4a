"""Layers dealt to stages: no other contiguous split has a smaller largest load."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from bd3_megatron.cost.stages import split_layers
from bd3_megatron.errors import GridError


def all_splits(num_layers: int, num_stages: int) -> Iterator[tuple[int, ...]]:
    for cuts in itertools.combinations(range(1, num_layers), num_stages - 1):
        edges = (0, *cuts, num_layers)
        yield tuple(b - a for a, b in itertools.pairwise(edges))


def largest_load(split: tuple[int, ...], embedding: float, head: float) -> float:
    load = [float(n) for n in split]
    load[0] += embedding
    load[-1] += head
    return max(load)


@pytest.mark.parametrize("embedding", [0.0, 0.4, 2.0])
@pytest.mark.parametrize("head", [0.0, 0.3, 1.0, 2.5, 9.0])
def test_no_split_is_better(embedding: float, head: float) -> None:
    for num_layers, num_stages in itertools.product((4, 7, 10), (1, 2, 3, 4)):
        split = split_layers(num_layers, num_stages, embedding_layers=embedding, head_layers=head)
        assert sum(split) == num_layers and min(split) >= 1 and len(split) == num_stages
        best = min(largest_load(s, embedding, head) for s in all_splits(num_layers, num_stages))
        assert largest_load(split, embedding, head) == pytest.approx(best)


def test_without_other_work_stages_differ_by_one_layer_at_most() -> None:
    assert split_layers(10, 4) == (3, 3, 2, 2)


def test_interleaved_chunks_are_equal() -> None:
    assert split_layers(12, 4, interleaved=True, head_layers=5.0) == (3, 3, 3, 3)
    with pytest.raises(
        GridError, match=r"^pp x vpp = 4 does not divide num_layers=10; interleaved chunks are of equal"
    ):
        split_layers(10, 4, interleaved=True)


def test_a_given_split_is_taken_as_it_is() -> None:
    assert split_layers(10, 3, given=(2, 7, 1), head_layers=5.0) == (2, 7, 1)
    for given in ((5, 5), (2, 7, 2)):
        with pytest.raises(
            GridError, match=r"does not split num_layers=10 over 3 stages; give 3 numbers that add up to 10"
        ):
            split_layers(10, 3, given=given)


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(GridError, match=r"^5 pipeline stages exceed num_layers=4; use at most 4\.$"):
        split_layers(4, 5)
