"""Gradients that leave during the last backward: the same run bit for bit, and they do leave early."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bd3_megatron.config.schema import Config
from bd3_megatron.engine.overlapped_reduction import OverlappedReduction
from bd3_megatron.parallel.topology import Topology
from tests.ranks.checkpoint_runs import build, raw_state, same, steps, tiny
from tests.ranks.harness import run_ranks

RUNS = [
    ({"dp": 2}, "paper"),
    ({"dp": 2, "tp": 2, "sequence_parallel": True}, "modern"),
    ({"dp": 2, "pp": 2}, "modern"),
]
MORE_RUNS = [
    ({"dp": 2}, "modern"),
    ({"cp": 2}, "modern"),
    ({"dp": 2, "tp": 2, "sequence_parallel": True}, "paper"),
    ({"dp": 2, "pp": 2}, "paper"),
    ({"dp": 2, "pp": 2, "vpp": 2}, "modern"),
    ({"dp": 2, "tp": 2, "pp": 2}, "modern"),
    ({"cp": 2, "pp": 2, "tp": 2, "sequence_parallel": True}, "paper"),
]


def both_ways(**shape: Any) -> list[tuple[Any, ...]]:
    """Per rank: what differs after 3 steps, both records, and buckets (all, late, started early)."""

    def on_rank(topology: Topology) -> tuple[Any, ...]:
        plain = build(tiny(overlap_grad_reduce=False, **shape), topology, dtype=torch.bfloat16)
        assert plain.reduction is None
        overlapped = build(config, topology, dtype=torch.bfloat16)
        early: list[int] = []
        reduction = overlapped.reduction
        assert reduction is not None
        finish = reduction.finish

        def counted() -> None:
            early.append(reduction.num_started)
            finish()

        reduction.finish = counted  # type: ignore[method-assign]
        records = steps(plain, 0, 3), steps(overlapped, 0, 3)
        late = sum(bucket.late for bucket in reduction.buckets)
        return same(raw_state(plain), raw_state(overlapped)), records, (len(reduction.buckets), late, early)

    config = tiny(**shape)
    return run_ranks(on_rank, config.parallel)


@pytest.mark.parametrize(("grid", "style"), RUNS + [pytest.param(*run, marks=pytest.mark.matrix) for run in MORE_RUNS])
def test_overlapped_reduction_changes_no_bit(grid: dict[str, Any], style: str) -> None:
    for differing, (plain, overlapped), (buckets, late, early) in both_ways(style=style, **grid):
        assert differing == []
        assert plain == overlapped
        # every bucket that no other axis must complete left before the last backward ended, in every step
        assert early == [buckets - late] * 3
        assert buckets - late >= 4


def test_more_gradients_than_micro_batches_are_refused() -> None:
    def on_rank(topology: Topology) -> str:
        engine = build(tiny(dp=2), topology, dtype=torch.bfloat16)
        reduction = engine.reduction
        assert isinstance(reduction, OverlappedReduction)
        begin = reduction.begin
        reduction.begin = lambda number: begin(number - 1)  # type: ignore[method-assign]
        try:
            steps(engine, 0, 1)
        except RuntimeError as error:
            return str(error)
        return ""

    config: Config = tiny(dp=2)
    for said in run_ranks(on_rank, config.parallel):
        assert "saw 2 gradients in a step of 1 micro-batches" in said
