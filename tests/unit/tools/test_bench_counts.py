"""The figures of tools/bench/results/gpu_counts.md hold: each is counted again, by the function that wrote it."""

from __future__ import annotations

import datetime

import pytest

from tools.bench import counts


@pytest.mark.parametrize(
    ("attention", "packing", "dispatched", "kernels"),
    [
        ("structured", "wrap", 467, 167),
        ("structured", "isolated", 1078, 357),
        ("flex", "wrap", 103, 29),
        ("flex", "isolated", 103, 29),
        ("triton", "wrap", 138, 46),
        ("triton", "isolated", 138, 46),
    ],
)
def test_a_layer_asks_for_no_more(attention: str, packing: str, dispatched: int, kernels: int) -> None:
    found = counts.layer_counts(attention, packing)
    assert found.dispatched <= dispatched and found.kernels <= kernels
    assert found.host_reads == 0


@pytest.mark.parametrize("packing", ["wrap", "isolated"])
def test_a_micro_batch_has_one_visibility(packing: str) -> None:
    assert counts.visibilities(24, packing) == (1, 24)


@pytest.mark.parametrize(("world_size", "alone", "mixed"), [(8, 1, 7), (512, 1, 8), (1024, 1, 8)])
def test_group_calls_do_not_grow_with_the_world(world_size: int, alone: int, mixed: int) -> None:
    timeout = {datetime.timedelta(seconds=1200)}
    assert counts.group_calls(world_size) == (alone, timeout)
    assert counts.group_calls(world_size, tp=2, pp=2, cp=2) == (mixed, timeout)


@pytest.mark.parametrize(("vocab", "most", "gigabytes"), [(50_304, 68, 16.6), (152_064, 152, 60.7)])
def test_the_heads_traffic(vocab: int, most: int, gigabytes: float) -> None:
    kernels, moved = counts.head_counts(vocab)
    assert kernels <= most and moved <= gigabytes


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [({}, 6), ({"grad_reduce_dtype": "bf16"}, 4), ({"zero_stage": 2}, 10), ({"zero_stage": 3}, 6)],
    ids=str,
)
def test_bytes_of_a_step(parallel: dict[str, object], expected: float) -> None:
    assert counts.bytes_a_parameter(**parallel) == pytest.approx(expected)
