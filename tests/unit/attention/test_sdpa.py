"""One masked call equals the reference on every kind of visibility, gradients included; it is refused where it is slower."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bd3_megatron.attention import dense, sdpa
from bd3_megatron.attention.request import AttentionRequest
from bd3_megatron.attention.visibility import Visibility
from bd3_megatron.errors import ShapeError
from tests.tolerances import FAST_PATH_FP64
from tests.unit.attention.problems import outputs_and_gradients, problem, visibilities, worst_difference, zigzag

REQUEST = AttentionRequest(
    device_type="cpu",
    dtype=torch.float32,
    batch=1,
    rows=Visibility.pair(sdpa.LONGEST, 4),
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize(("length", "block_size"), [(1, 1), (24, 1), (24, 3), (24, 24), (60, 4)])
def test_one_masked_call_equals_the_reference(length: int, block_size: int, heads: tuple[int, int]) -> None:
    for visibility in visibilities(length, block_size):
        p = problem(visibility, heads=heads)
        expected, actual = outputs_and_gradients(dense.attend, p), outputs_and_gradients(sdpa.attend, p)
        assert worst_difference(actual, expected) < FAST_PATH_FP64


def test_rows_of_a_context_parallel_rank_equal_the_reference() -> None:
    p = problem(zigzag(64, 4, 1, 2))
    expected, actual = outputs_and_gradients(dense.attend, p), outputs_and_gradients(sdpa.attend, p)
    assert worst_difference(actual, expected) < FAST_PATH_FP64


def test_refusals_say_why() -> None:
    assert sdpa.refuse(REQUEST) is None
    assert "for the CPU, not for 'cuda'" in str(sdpa.refuse(replace(REQUEST, device_type="cuda")))
    longer = replace(REQUEST, rows=Visibility.pair(sdpa.LONGEST + 4, 4))
    assert "length=132 is slower than rectangles" in str(sdpa.refuse(longer))


def test_rows_that_are_not_the_visibilitys_are_refused() -> None:
    rows = torch.zeros(1, 16, 2, 8)
    with pytest.raises(ShapeError, match="q_BQNH"):
        sdpa.masked_rows(rows, rows, rows, Visibility.pair(16, 4), scale=1.0)
