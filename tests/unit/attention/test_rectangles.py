"""The rectangles cover every allowed pair exactly once and no other pair."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bd3_megatron.attention.rectangles import Plan, Step, document_ends, plan
from bd3_megatron.attention.visibility import Visibility, num_rows
from bd3_megatron.errors import ShapeError
from tests.unit.attention.problems import visibilities

SHAPES = [(1, 1), (6, 1), (24, 1), (24, 2), (24, 3), (24, 24), (60, 4), (60, 12), (64, 4), (96, 16), (56, 8)]


def plan_of(visibility: Visibility, ids_L: list[int] | None) -> Plan:
    ends = (visibility.length,) if ids_L is None else document_ends(ids_L)
    return plan(visibility.block_size, visibility.noisy_rows, visibility.clean_rows, ends)


def count_pairs(cut: Plan, visibility: Visibility) -> Tensor:
    """How often each pair of [noisy; clean] queries and [noisy; clean] keys is covered."""
    border = num_rows(visibility.noisy_rows)
    shape = (border + num_rows(visibility.clean_rows), border + num_rows(visibility.clean_key_rows))
    times = torch.zeros(shape, dtype=torch.int64)
    for step in cut.steps:
        run = cut.runs[step.run]
        for who, start in (("noisy", run.noisy_start), ("clean", border + run.clean_start)):
            if step.who in (who, "pair"):
                cover(times, step, start, 0 if step.keys == "noisy" else border)
    return times


def cover(times: Tensor, step: Step, first_row: int, first_key: int) -> None:
    for i in range(step.count):
        row, key = first_row + step.row + i * step.spacing, first_key + step.key + i * step.spacing
        ones = torch.ones(step.num_rows, step.num_keys, dtype=torch.int64)
        times[row : row + step.num_rows, key : key + step.num_keys] += ones.tril() if step.causal else ones


@pytest.mark.parametrize(("length", "block_size"), SHAPES)
def test_rectangles_cover_what_is_seen_once(length: int, block_size: int) -> None:
    for visibility in visibilities(length, block_size):
        documents = visibility.document_id_BL
        mask_BQK = visibility.pair_mask()
        for sequence, mask_QK in enumerate(mask_BQK):
            cut = plan_of(visibility, None if documents is None else documents[sequence].tolist())
            assert torch.equal(count_pairs(cut, visibility), mask_QK.long())
            assert cut.num_pairs == int(mask_QK.sum())


@pytest.mark.parametrize(("length", "block_size"), SHAPES)
def test_rows_open_their_statistics_once_and_first(length: int, block_size: int) -> None:
    for visibility in visibilities(length, block_size):
        documents = visibility.document_id_BL
        cut = plan_of(visibility, None if documents is None else documents[0].tolist())
        opened = [torch.zeros(run.num_rows, 2, dtype=torch.int64) for run in cut.runs]
        for step in cut.steps:
            streams = {"noisy": [0], "clean": [1], "pair": [0, 1]}[step.who]
            for i in range(step.count):
                rows = slice(step.row + i * step.spacing, step.row + i * step.spacing + step.num_rows)
                expected = 0 if step.first else 1
                assert (opened[step.run][rows][:, streams] == expected).all()
                if step.first:
                    opened[step.run][rows, streams] += 1


def test_calls_grow_with_the_logarithm_of_the_blocks() -> None:
    whole = ((0, 2**20),)
    assert len(plan(16, whole, whole, (2**20,)).steps) == 2 + 16
    ragged = ((0, 2**20 - 16),)
    assert len(plan(16, ragged, ragged, (2**20 - 16,)).steps) <= 2 + 2 * 16


def test_one_token_blocks_use_causal_calls() -> None:
    rows = ((0, 64),)
    kinds = [(step.who, step.keys, step.causal, step.num_rows) for step in plan(1, rows, rows, (64,)).steps]
    assert kinds == [("noisy", "noisy", False, 1), ("clean", "clean", True, 64), ("noisy", "clean", True, 63)]


def test_clean_rows_may_end_inside_a_block() -> None:
    visibility = Visibility(4, 16, (), ((0, 10),), ((0, 12),))
    cut = plan_of(visibility, None)
    assert torch.equal(count_pairs(cut, visibility), visibility.pair_mask()[0].long())
    both = Visibility(4, 16, ((0, 16),), ((0, 10),), ((0, 12),))
    assert torch.equal(count_pairs(plan_of(both, None), both), both.pair_mask()[0].long())


def test_equal_questions_get_the_same_plan() -> None:
    rows = ((0, 32),)
    assert plan(4, rows, rows, (32,)) is plan(4, rows, rows, (32,))


def test_documents_end_where_ids_change() -> None:
    assert document_ends([3, 3, 1, 1, 1, 2]) == (2, 5, 6)


def test_a_document_in_two_places_is_refused() -> None:
    with pytest.raises(ShapeError, match="names one document at two separate places"):
        document_ends([0, 0, 1, 0])
