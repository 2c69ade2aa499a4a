"""Gradients go to the rank that updates, during the last backward or after it: the same run bit for bit, half the bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from bd3_megatron.engine.sharded_gradients import ShardedGradients
from bd3_megatron.engine.zero_engine import ZeroEngine
from bd3_megatron.parallel.topology import Topology
from tests.ranks.checkpoint_runs import build, raw_state, same, steps, tiny
from tests.ranks.harness import run_ranks
from tests.tolerances import GRADIENTS_SENT_IN_BF16, RESUMED

BF16, FP32 = torch.bfloat16, torch.float32
RUNS = [
    ({"dp": 2}, "paper", BF16),
    ({"dp": 3}, "modern", FP32),
    ({"dp": 2, "tp": 2, "sequence_parallel": True}, "modern", FP32),
    ({"dp": 2, "pp": 2}, "modern", BF16),
]
MORE_RUNS = [
    ({"dp": 2}, "modern", BF16),
    ({"cp": 2}, "modern", FP32),
    ({"dp": 2, "tp": 2, "sequence_parallel": True}, "paper", BF16),
    ({"dp": 2, "pp": 2}, "paper", FP32),
    ({"dp": 2, "pp": 2, "vpp": 2}, "modern", BF16),
    ({"dp": 2, "tp": 2, "pp": 2}, "modern", FP32),
    ({"cp": 2, "pp": 2, "tp": 2, "sequence_parallel": True}, "paper", BF16),
]


def watched(engine: ZeroEngine) -> list[tuple[int, int]]:
    """Buckets under way when a step's last backward had ended, and bytes sent in the step; filled as steps are made."""
    seen: list[tuple[int, int]] = []
    gradients = engine.gradients
    assert gradients is not None
    finish = gradients.finish

    def counted() -> None:
        early = gradients._next
        finish()
        seen.append((early, gradients.sent_bytes))

    gradients.finish = counted  # type: ignore[method-assign]
    return seen


def both_ways(dtype: torch.dtype, **shape: Any) -> list[tuple[Any, ...]]:
    """Per rank: what differs after 3 steps, both records, and (buckets, late ones, early starts and bytes of each)."""

    def on_rank(topology: Topology) -> tuple[Any, ...]:
        late, early = (
            build(tiny(overlap_grad_reduce=overlap, **shape), topology, dtype=dtype) for overlap in (False, True)
        )
        counts = watched(late), watched(early)
        records = steps(late, 0, 3), steps(early, 0, 3)
        assert early.gradients is not None
        buckets = early.gradients.buckets
        size = sum(bucket.stop - bucket.start for bucket in buckets)
        facts = len(buckets), sum(bucket.late for bucket in buckets), size
        return same(raw_state(late), raw_state(early)), records, facts, counts

    return run_ranks(on_rank, tiny(**shape).parallel)


@pytest.mark.parametrize(
    ("grid", "style", "dtype"), RUNS + [pytest.param(*run, marks=pytest.mark.matrix) for run in MORE_RUNS], ids=str
)
def test_when_gradients_leave_changes_no_bit(grid: dict[str, Any], style: str, dtype: torch.dtype) -> None:
    for differing, records, (buckets, late, size), counts in both_ways(dtype, style=style, **grid):
        assert differing == []
        assert records[0] == records[1]
        # every bucket that no other axis must complete left before the last backward ended, in every step
        assert [started for started, _ in counts[1]] == [buckets - late] * 3
        assert [started for started, _ in counts[0]] == [0] * 3
        assert buckets - late >= 4
        # each gradient is sent once, in fp32: an all-reduce would send it twice
        assert {sent for way in counts for _, sent in way} == {4 * size}


def test_stages_that_cut_a_tied_table_in_other_places_add_it_element_by_element() -> None:
    def on_rank(topology: Topology) -> tuple[list[tuple[float, float]], list[int]]:
        engine = build(tiny(layers=4, **grid), topology, dtype=FP32)
        held = engine.gradients
        assert held is not None
        return steps(engine, 0, 3), [part.last for table in held.late for part in held._slices[table]]

    grid: dict[str, Any] = {}
    [(expected, _)] = run_ranks(on_rank, tiny(layers=4).parallel)
    grid = {"dp": 2, "pp": 2, "vpp": 2}
    found = run_ranks(on_rank, tiny(layers=4, **grid).parallel)
    # else the case says nothing: one stage holds the table in one piece, the other in two
    assert {len(ends) for _, ends in found if ends} == {1, 2}
    for record, _ in found:
        assert torch.allclose(torch.tensor(record), torch.tensor(expected), rtol=0, atol=RESUMED)


def test_every_element_has_one_owner_and_its_gradient_is_the_mean() -> None:
    def on_rank(topology: Topology) -> Any:
        engine = build(tiny(dp=3), topology)
        gradients = engine.gradients
        assert isinstance(gradients, ShardedGradients)
        gradients.begin(2)
        parameters = list(engine.model.root.parameters())
        for number in range(2):
            # the last parameter takes no part in the step
            sum((number + 1.0 + topology.rank) * p.sum() for p in parameters[:-1]).backward()  # type: ignore[union-attr]
        held = {bucket.group for bucket in gradients.buckets if bucket.sum is not None}
        gradients.finish()
        assert held and all(bucket.sum is None for bucket in gradients.buckets), "sent gradients are still held"
        mine = [piece for p in parameters[:-1] for piece in gradients.owned_slices([p])]
        absent = gradients.owned_slices([parameters[-1]])
        owned = torch.tensor([sum(p.numel() for p in mine) + sum(p.numel() for p in absent)])
        dist.all_reduce(owned)
        assert owned.item() == sum(p.numel() for p in parameters)
        return {value for p in mine for value in p.unique().tolist()}, {v for p in absent for v in p.unique().tolist()}

    found = run_ranks(on_rank, tiny(dp=3).parallel)
    # micro-batches add up to 2 (rank) + 3, and their mean over ranks 0, 1 and 2 is 5
    assert all(mine == {5.0} and absent <= {0.0} for mine, absent in found)


def test_sums_in_bf16_halve_the_bytes_and_round_each_gradient() -> None:
    def on_rank(topology: Topology) -> Any:
        engines = [build(tiny(dp=3, grad_reduce_dtype=name), topology) for name in ("fp32", "bf16")]
        counts = [watched(engine) for engine in engines]
        norms = [steps(engine, 0, 1)[0][1] for engine in engines]
        worst = 0.0
        for exact, rounded in zip(*(engine.gradients.owned for engine in engines if engine.gradients), strict=True):
            if exact.numel():
                worst = max(worst, float((exact - rounded).abs().max() / exact.abs().max()))
        return [sent for ((_, sent),) in counts], norms, worst

    for (wide, narrow), norms, worst in run_ranks(on_rank, tiny(dp=3).parallel):
        assert narrow * 2 == wide
        assert norms[0] == pytest.approx(norms[1], rel=GRADIENTS_SENT_IN_BF16)
        assert 0 < worst < GRADIENTS_SENT_IN_BF16


def test_more_gradients_than_micro_batches_are_refused() -> None:
    def on_rank(topology: Topology) -> str:
        engine = build(tiny(dp=2), topology, dtype=torch.bfloat16)
        gradients = engine.gradients
        assert isinstance(gradients, ShardedGradients)
        begin = gradients.begin
        gradients.begin = lambda number: begin(number - 1)  # type: ignore[method-assign]
        try:
            steps(engine, 0, 1)
        except RuntimeError as error:
            return str(error)
        return ""

    for said in run_ranks(on_rank, tiny(dp=2).parallel):
        assert "saw 2 gradients in a step of 1 micro-batches" in said
