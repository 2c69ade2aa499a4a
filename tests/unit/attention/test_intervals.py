"""Intervals of keys per row are the visibility rule, and tile bounds say exactly where all, some or no rows see."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bd3_megatron.attention import intervals
from bd3_megatron.attention.intervals import Intervals
from bd3_megatron.attention.visibility import Visibility, num_rows
from bd3_megatron.errors import ShapeError
from tests.unit.attention.problems import visibilities

SHAPES = [(1, 1), (24, 1), (24, 3), (24, 24), (60, 4), (96, 16), (56, 8)]
TILES = [(4, 4), (8, 16), (16, 8)]


def mask_of(runs: Intervals, num_keys: int) -> Tensor:
    key = torch.arange(num_keys)
    return (key >= runs.low[..., None]) & (key < runs.high[..., None])


def runs_and_masks(visibility: Visibility) -> list[tuple[Intervals, Tensor]]:
    return [
        (intervals.noisy_to_clean(visibility), visibility.mask(q_is_noisy=True, k_is_noisy=False)),
        (intervals.clean_to_clean(visibility), visibility.mask(q_is_noisy=False, k_is_noisy=False)),
        (intervals.noisy_to_noisy(visibility), visibility.mask(q_is_noisy=True, k_is_noisy=True)),
    ]


@pytest.mark.parametrize(("length", "block_size"), SHAPES)
def test_intervals_are_the_visibility_rule_and_rise(length: int, block_size: int) -> None:
    for visibility in visibilities(length, block_size):
        for runs, mask in runs_and_masks(visibility):
            assert torch.equal(mask_of(runs, mask.shape[2]), mask)
            assert (runs.low.diff() >= 0).all() and (runs.high.diff() >= 0).all()
            assert torch.equal(runs.to_rows(torch.device("cpu"))[:, 1].long(), runs.high)


def outside_and_inside(turns: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """For one tile: places that its loops skip, and places that they take for seen by all."""
    start, full, full_stop, stop = turns.tolist()
    place = torch.arange(size)
    return (place < start) | (place >= stop), (place >= full) & (place < full_stop)


@pytest.mark.parametrize(("row_tile", "key_tile"), TILES)
@pytest.mark.parametrize(("length", "block_size"), SHAPES)
def test_query_bounds_skip_nothing_seen_and_bare_only_what_all_see(
    length: int, block_size: int, row_tile: int, key_tile: int
) -> None:
    for visibility in visibilities(length, block_size):
        for runs, mask in runs_and_masks(visibility):
            if runs.low.size(1):
                turns = intervals.bounds_of_queries([runs], row_tile=row_tile, key_tile=key_tile)
                assert (turns[..., :3] % key_tile == 0).all() and (turns.diff(dim=-1)[..., 1] >= 0).all()
                for sequence, tile in torch.cartesian_prod(*(torch.arange(n) for n in turns.shape[:2])).tolist():
                    seen = mask[sequence, tile * row_tile : (tile + 1) * row_tile]
                    skipped, bare = outside_and_inside(turns[sequence, tile], mask.shape[2])
                    assert not seen[:, skipped].any() and seen[:, bare].all()


@pytest.mark.parametrize(("row_tile", "key_tile"), TILES)
@pytest.mark.parametrize(("length", "block_size"), SHAPES)
def test_key_bounds_skip_nothing_seen_and_bare_only_what_all_see(
    length: int, block_size: int, row_tile: int, key_tile: int
) -> None:
    for visibility in visibilities(length, block_size):
        for runs, mask in runs_and_masks(visibility):
            turns = intervals.bounds_of_keys(runs, mask.shape[2], row_tile=row_tile, key_tile=key_tile)
            assert turns.shape[1] == -(-mask.shape[2] // key_tile)
            for sequence, tile in torch.cartesian_prod(*(torch.arange(n) for n in turns.shape[:2])).tolist():
                seen = mask[sequence, :, tile * key_tile : (tile + 1) * key_tile]
                skipped, bare = outside_and_inside(turns[sequence, tile], mask.shape[1])
                assert not seen[skipped].any() and seen[bare].all()


def test_most_of_a_long_pair_runs_without_a_mask() -> None:
    visibility = Visibility.pair(4096, 16)
    runs = [intervals.noisy_to_clean(visibility), intervals.clean_to_clean(visibility)]
    start, full, full_stop, stop = intervals.bounds_of_queries(runs, row_tile=64, key_tile=64)[0].unbind(-1)
    masked = (full - start) + (stop - full_stop)
    assert masked.max() <= 64 and num_rows(visibility.clean_rows) // 2 - 64 <= (full_stop - full).float().mean()


def test_documents_must_be_contiguous() -> None:
    with pytest.raises(ShapeError, match="two separate places"):
        intervals.noisy_to_clean(Visibility.pair(4, 2, torch.tensor([[0, 1, 1, 0]])))
