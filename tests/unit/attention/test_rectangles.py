"""The rectangles cover every allowed pair exactly once and no other pair."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bd3_megatron.attention.rectangles import RectangleCover, RectangleSeries, cover_of, document_ends
from bd3_megatron.attention.visibility import Visibility, num_rows
from bd3_megatron.errors import ShapeError
from tests.unit.attention.problems import visibilities

SHAPES = [(1, 1), (6, 1), (24, 1), (24, 2), (24, 3), (24, 24), (60, 4), (60, 12), (64, 4), (96, 16), (56, 8)]


def cover_for(visibility: Visibility, ids_L: list[int] | None) -> RectangleCover:
    ends = (visibility.length,) if ids_L is None else document_ends(ids_L)
    return cover_of(visibility.block_size, visibility.noisy_rows, visibility.clean_rows, ends)


def count_pairs(cut: RectangleCover, visibility: Visibility) -> Tensor:
    """How often each pair of [noisy; clean] queries and [noisy; clean] keys is covered."""
    border = num_rows(visibility.noisy_rows)
    shape = (border + num_rows(visibility.clean_rows), border + num_rows(visibility.clean_key_rows))
    times = torch.zeros(shape, dtype=torch.int64)
    for series in cut.series:
        run = cut.runs[series.run]
        for who, start in (("noisy", run.noisy_start), ("clean", border + run.clean_start)):
            if series.who in (who, "pair"):
                count_once(times, series, start, 0 if series.keys == "noisy" else border)
    return times


def count_once(times: Tensor, series: RectangleSeries, first_row: int, first_key: int) -> None:
    for i in range(series.count):
        row, key = first_row + series.row + i * series.spacing, first_key + series.key + i * series.spacing
        ones = torch.ones(series.num_rows, series.num_keys, dtype=torch.int64)
        times[row : row + series.num_rows, key : key + series.num_keys] += ones.tril() if series.causal else ones


@pytest.mark.parametrize(("length", "block_size"), SHAPES)
def test_rectangles_cover_what_is_seen_once(length: int, block_size: int) -> None:
    for visibility in visibilities(length, block_size):
        documents = visibility.document_id_BL
        mask_BQK = visibility.pair_mask()
        for sequence, mask_QK in enumerate(mask_BQK):
            cut = cover_for(visibility, None if documents is None else documents[sequence].tolist())
            assert torch.equal(count_pairs(cut, visibility), mask_QK.long())
            assert cut.num_pairs == int(mask_QK.sum())


@pytest.mark.parametrize(("length", "block_size"), SHAPES)
def test_rows_open_their_statistics_once_and_first(length: int, block_size: int) -> None:
    for visibility in visibilities(length, block_size):
        documents = visibility.document_id_BL
        cut = cover_for(visibility, None if documents is None else documents[0].tolist())
        opened = [torch.zeros(run.num_rows, 2, dtype=torch.int64) for run in cut.runs]
        for series in cut.series:
            streams = {"noisy": [0], "clean": [1], "pair": [0, 1]}[series.who]
            for i in range(series.count):
                rows = slice(series.row + i * series.spacing, series.row + i * series.spacing + series.num_rows)
                expected = 0 if series.first else 1
                assert (opened[series.run][rows][:, streams] == expected).all()
                if series.first:
                    opened[series.run][rows, streams] += 1


def test_calls_grow_with_the_logarithm_of_the_blocks() -> None:
    whole = ((0, 2**20),)
    assert len(cover_of(16, whole, whole, (2**20,)).series) == 2 + 16
    ragged = ((0, 2**20 - 16),)
    assert len(cover_of(16, ragged, ragged, (2**20 - 16,)).series) <= 2 + 2 * 16


def test_one_token_blocks_use_causal_calls() -> None:
    rows = ((0, 64),)
    kinds = [
        (series.who, series.keys, series.causal, series.num_rows) for series in cover_of(1, rows, rows, (64,)).series
    ]
    assert kinds == [("noisy", "noisy", False, 1), ("clean", "clean", True, 64), ("noisy", "clean", True, 63)]


def test_clean_rows_may_end_inside_a_block() -> None:
    visibility = Visibility(4, 16, (), ((0, 10),), ((0, 12),))
    cut = cover_for(visibility, None)
    assert torch.equal(count_pairs(cut, visibility), visibility.pair_mask()[0].long())
    both = Visibility(4, 16, ((0, 16),), ((0, 10),), ((0, 12),))
    assert torch.equal(count_pairs(cover_for(both, None), both), both.pair_mask()[0].long())


def test_equal_questions_get_the_same_cover() -> None:
    rows = ((0, 32),)
    assert cover_of(4, rows, rows, (32,)) is cover_of(4, rows, rows, (32,))


def test_documents_end_where_ids_change() -> None:
    assert document_ends([3, 3, 1, 1, 1, 2]) == (2, 5, 6)


def test_a_document_in_two_places_is_refused() -> None:
    with pytest.raises(ShapeError, match="names one document at two separate places"):
        document_ends([0, 0, 1, 0])
