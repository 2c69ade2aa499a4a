"""The time model by hand on corners where it is simple, and monotone where it must be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bd3_megatron.config.schema import Config
from bd3_megatron.cost.flops import convention_flops
from bd3_megatron.cost.parameters import parameters_per_rank
from bd3_megatron.cost.traffic import bytes_by_axis
from bd3_megatron.planner.constants import Constants
from bd3_megatron.planner.machines import machine_of
from bd3_megatron.planner.timing import step_time
from tests.unit.cost.cases import case

A100 = machine_of("a100-80g", peak_tflops=312.0)
FREE = Constants(layer_overhead_seconds=0.0, step_overhead_seconds=0.0)
BIG: dict[str, Any] = {
    "num_layers": 16,
    "hidden_size": 4096,
    "num_heads": 32,
    "num_kv_heads": 32,
    "ffn_hidden_size": 11008,
    "vocab_size": 32000,
    "vocab_multiple": 128,
}


def _big(parallel: dict[str, Any], **train: Any) -> Config:
    train = {"steps": 1, "global_batch_size": 64, "micro_batch_size": 1} | train
    return case(model=BIG, data={"seq_len": 2048}, diffusion={"block_size": 16}, parallel=parallel, train=train)


def test_large_matrices_take_their_flops_at_the_efficiency() -> None:
    config = _big({"dp": 1}, skip_dead_rows=False)
    lin = 2 * 4096 * 4096 * 4 + 6 * 4096 * 11008
    flops = 64 * 3 * 16 * 4096 * lin
    assert step_time(config, A100, FREE).matrix == pytest.approx(flops / (312e12 * FREE.matrix_efficiency), rel=1e-9)


def test_compute_is_shared_by_all_axes() -> None:
    one = step_time(_big({"dp": 1}, skip_dead_rows=False), A100, FREE)
    for grid in ({"dp": 4}, {"tp": 4}, {"tp": 2, "dp": 2}):
        assert step_time(_big(grid, skip_dead_rows=False), A100, FREE).attention == pytest.approx(one.attention / 4)
    split = step_time(_big({"pp": 4, "layers_per_stage": [4, 4, 4, 4]}, skip_dead_rows=False), A100, FREE)
    assert split.attention == pytest.approx(one.attention / 4)


def test_a_trimmed_last_layer_lightens_its_stage_only() -> None:
    grid = {"pp": 4, "layers_per_stage": [4, 4, 4, 4]}
    one, whole = step_time(_big({"dp": 1}), A100, FREE), step_time(_big({"dp": 1}, skip_dead_rows=False), A100, FREE)
    assert one.matrix < whole.matrix
    # the slowest stage has only whole layers, of the rows without the last clean block
    split = step_time(_big(grid), A100, FREE)
    assert split.matrix == pytest.approx(whole.matrix / 4 * (4096 - 16) / 4096, rel=1e-3)


def test_data_parallel_time_is_bytes_over_the_ring() -> None:
    config = _big({"dp": 8, "overlap_grad_reduce": False})
    # each gradient goes to one rank, in fp32; each weight comes back, in bf16
    moved = 7 / 8 * (4 + 2) * parameters_per_rank(config, 0)
    latency = 3 * 15e-6 + (7 + 7) * 5e-6
    by_hand = moved / (300e9 * FREE.link_efficiency) + latency
    assert step_time(config, A100, FREE).dp == pytest.approx(by_hand, rel=1e-9)
    assert bytes_by_axis(config)["dp"] == 6 * parameters_per_rank(config, 0)


def test_gradients_hide_behind_the_last_backward_and_weights_do_not() -> None:
    free = replace(FREE, hidden_share=1.0)
    early, late = (_big({"dp": 8, "overlap_grad_reduce": flag}) for flag in (True, False))
    gathered = 7 / 8 * 2 * parameters_per_rank(early, 0) / (300e9 * free.link_efficiency)
    found = step_time(early, A100, free)
    sums = step_time(late, A100, free).dp - gathered - (3 * 15e-6 + 7 * 5e-6)
    exposed = max(0.0, sums - 2 / 3 * found.compute / 8)
    assert found.dp == pytest.approx(gathered + (3 * 15e-6 + 7 * 5e-6) + exposed, rel=1e-9)
    assert found.dp < step_time(late, A100, free).dp
    # DeepSpeed's own reduction, where the optimizer is on the host, is an all-reduce at the end
    offloaded = _big({"dp": 8, "offload_optimizer": True})
    assert step_time(offloaded, A100, free).dp == pytest.approx(step_time(late, A100, free).dp + sums)


def test_a_group_that_leaves_the_node_pays_for_it() -> None:
    inside, outside = _big({"tp": 8, "dp": 1}), _big({"tp": 16, "dp": 1})
    # 300 GB/s of NVLink against 8 cards of 25, and three times the latency
    assert step_time(outside, A100, FREE).tp > 1.5 * step_time(inside, A100, FREE).tp


def test_members_of_a_node_cross_together() -> None:
    """dp 16 over two nodes of 8: each rank has a card of its own, so the ring crosses at 8 x 25 GB/s."""
    config = _big({"dp": 16, "overlap_grad_reduce": False})
    moved = 15 / 16 * (4 + 2) * parameters_per_rank(config, 0)
    latency = (3 + 15 + 15) * 15e-6
    by_hand = moved / (200e9 * FREE.link_efficiency) + latency
    assert step_time(config, A100, FREE).dp == pytest.approx(by_hand, rel=1e-9)


def test_a_bubble_is_the_other_stages_time_and_shrinks_with_interleaving() -> None:
    plain = step_time(_big({"pp": 4, "layers_per_stage": [4, 4, 4, 4]}), A100, FREE)
    inter = step_time(_big({"pp": 4, "vpp": 4}), A100, FREE)
    busy = (plain.total - plain.bubble - plain.dp - plain.optimizer - plain.pp) / 64
    assert plain.bubble < 3 * busy
    assert inter.bubble == pytest.approx(plain.bubble / 4)


def test_recomputation_costs_time() -> None:
    seconds = [step_time(_big({"dp": 1}, recompute=r), A100).total for r in ("none", "selective", "full")]
    assert seconds[0] < seconds[1] < seconds[2]
    assert seconds[2] / seconds[0] == pytest.approx(4 / 3, abs=0.08)


def test_higher_zero_stages_hide_traffic_behind_compute() -> None:
    one, two = (step_time(_big({"dp": 8, "zero_stage": s}, global_batch_size=8), A100, FREE).dp for s in (1, 2))
    assert two < one


def test_parts_add_up() -> None:
    step = step_time(_big({"tp": 2, "pp": 2, "dp": 2, "sequence_parallel": True}), A100)
    assert sum(step.parts().values()) == pytest.approx(step.total)
    assert step.compute + step.communication < step.total


def test_ranks_on_shared_cores_wait_for_each_other() -> None:
    cpu = replace(machine_of("cpu", peak_tflops=0.05), cores=2)
    two, four = (step_time(case(parallel={"dp": dp}), cpu) for dp in (2, 4))
    assert two.contention == 0
    assert four.contention > 0
    assert four.total > two.total * 0.9


def test_the_head_multiplies_scored_rows_and_passes_over_their_logits() -> None:
    config = _big({"dp": 1})
    scored = 0.5 * 2048
    flops, logits = 6 * scored * 4096 * 32000, scored * 32000 * 4
    rate = A100.memory_bytes_per_second * FREE.memory_efficiency
    by_hand = 64 * (flops / (312e12 * FREE.matrix_efficiency) + FREE.logits_passes * logits / rate)
    assert step_time(config, A100, FREE).head == pytest.approx(by_hand, rel=0.01)


def test_structured_attention_pays_for_its_calls_and_rectangles() -> None:
    slow = replace(FREE, halving_seconds=1e-3, rectangle_seconds=1e-6)

    def paid(parallel: dict[str, Any], **sections: dict[str, Any]) -> float:
        config = case(parallel=parallel, train={"skip_dead_rows": False, "micro_batch_size": 2}, **sections)
        return step_time(config, A100, slow).attention - step_time(config, A100, FREE).attention

    # S 4 of L 32 is 8 blocks, so 3 halvings and 24 rectangles of 4 heads; 3 layers, 4 micro-batches of 2 sequences
    assert paid({"dp": 1}) == pytest.approx(4 * 3 * (3 * 1e-3 + 2 * 24 * 4 * 1e-6))
    assert paid({"tp": 2}) == pytest.approx(4 * 3 * (3 * 1e-3 + 2 * 24 * 2 * 1e-6))
    assert paid({"dp": 1}, diffusion={"objective": "ar"}) == 0
    assert paid({"dp": 1}, attention={"backend": "dense"}) == 0


def test_narrow_heads_attend_at_a_lower_rate() -> None:
    narrow = replace(FREE, softmax_columns=8.0)
    config = case(parallel={"dp": 1})
    # heads of 8 columns: as many again for the exponentials
    assert step_time(config, A100, narrow).attention == pytest.approx(2 * step_time(config, A100, FREE).attention)


def test_ranks_that_meet_in_every_layer_wait_for_the_slowest() -> None:
    uneven = replace(FREE, layer_jitter=0.6)
    for grid, axis in (({"tp": 2}, "tp"), ({"cp": 2}, "cp"), ({"tp": 4}, "tp")):
        even, waits = (step_time(case(parallel=grid), A100, c) for c in (FREE, uneven))
        share = 0.6 * {2: 1 / 6, 4: 3 / 10}[grid[axis]]
        assert getattr(waits, axis) - getattr(even, axis) == pytest.approx(share * even.compute)
        assert waits.compute == even.compute
    assert step_time(case(parallel={"dp": 2}), A100, uneven) == step_time(case(parallel={"dp": 2}), A100, FREE)


def test_full_cores_slow_each_other_down() -> None:
    cpu, crowded = replace(machine_of("cpu", peak_tflops=0.05), cores=3), replace(FREE, shared_factor=1.44)
    slower = {}
    for name, grid in {"one": {"dp": 1}, "two": {"tp": 2}, "four": {"dp": 4}}.items():
        alone, beside = (step_time(case(parallel=grid), cpu, c).compute for c in (FREE, crowded))
        slower[name] = beside / alone
    assert slower == pytest.approx({"one": 1.0, "two": 1.2, "four": 1.44})
    # a pipeline of two with one micro-batch has one stage at work at a time
    staged = case(parallel={"pp": 2, "layers_per_stage": [2, 1]}, train={"global_batch_size": 1})
    assert step_time(staged, cpu, crowded).compute == pytest.approx(step_time(staged, cpu, FREE).compute)


def test_gathers_have_a_rate_of_their_own() -> None:
    slow = replace(FREE, gather_efficiency=FREE.gather_efficiency / 2)
    config = _big({"cp": 2, "dp": 1}, micro_batch_size=64)
    fast, halved = (step_time(config, A100, c).cp for c in (FREE, slow))
    assert halved == pytest.approx(2 * fast, rel=0.01)


def test_a_predicted_step_is_never_faster_than_the_peak() -> None:
    config = _big({"dp": 1})
    flops = 64 * convention_flops(config).total
    assert step_time(config, A100).total > flops / 312e12


def test_experts_cost_their_exchange_and_spare_their_weights() -> None:
    experts = {"number": 64, "top_k": 4, "width": 2752}
    model = {**BIG, "experts": experts}
    train = {"steps": 1, "global_batch_size": 64, "micro_batch_size": 1}

    def of(**parallel: Any) -> Config:
        return case(model=model, data={"seq_len": 2048}, diffusion={"block_size": 16}, parallel=parallel, train=train)

    here, spread = step_time(of(dp=16), A100, FREE), step_time(of(dp=16, ep=8), A100, FREE)
    assert here.ep == 0
    # four times a layer and micro-batch top_k rows of D in bf16, 7 / 8 of them over NVLink; of the last layer the scored ones
    rows, scored = 4096 - 16, 2048 * 0.5005
    moved = 4 * 4 * (15 * rows + scored) * 4096 * 2 * 7 / 8 * 4
    # a fifth call says how many rows will come
    latency = 4 * 16 * 5 * 7 * 5e-6
    assert spread.ep == pytest.approx(moved / (300e9 * FREE.gather_efficiency) + latency, rel=2e-3)
    # each rank holds and updates an eighth of the experts, and reads as few of their weights
    assert spread.dp < here.dp / 3 and spread.matrix <= here.matrix
    # beyond the node the exchange crosses slower links
    assert step_time(of(dp=16, ep=16), A100, FREE).ep > spread.ep
