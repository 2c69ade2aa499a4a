"""Bytes by axis, recomputed by hand for one grid of each kind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bd3_megatron.config.schema import Config
from bd3_megatron.cost.assumptions import EngineAssumptions
from bd3_megatron.cost.parameters import parameters_per_rank
from bd3_megatron.cost.traffic import Collective, Transfer, bytes_by_axis, small_collectives, transfers
from tests.unit.cost.cases import case

FP32 = EngineAssumptions(precision="fp32", fused=False)
ROWS = (64 - 4) * 32 * 4
"""Bytes of the rows of a micro-batch: 2 L - S rows of D fp32 numbers."""


def _grid(parallel: dict[str, Any], *, style: str = "modern", kind: str = "s4", recompute: str = "none") -> Config:
    train = {"steps": 1, "global_batch_size": 8, "micro_batch_size": 1, "recompute": recompute}
    return case(style=style, kind=kind, parallel=parallel, train=train)


def test_one_device_moves_nothing() -> None:
    assert bytes_by_axis(_grid({})) == {"tp": 0, "pp": 0, "cp": 0, "dp": 0}


def test_tensor_parallelism_moves_four_all_reduces_a_layer() -> None:
    config = _grid({"tp": 2})
    scored = 32 * 0.25
    # the last layer: only the gradient of its first norm's rows is whole
    by_hand = 8 * (2 * 4 * ROWS + ROWS + 3 * scored * 32 * 4 + ROWS + scored * 32 * 4 + 3 * scored * 4)
    assert bytes_by_axis(config, engine=FP32, masked_fraction=0.25)["tp"] == by_hand


def test_sequence_parallelism_gathers_and_scatters() -> None:
    config = _grid({"tp": 2, "sequence_parallel": True})
    scored = 32 * 0.25
    # the last layer gathers its normed rows and scatters their gradients; the rest of it is of scored rows, as the head's
    # gradients are. Its second norm and the final one saw whole rows, so their gradients are not summed.
    last = 2 * ROWS + 4 * scored * 32 * 4 + scored * 32 * 4
    by_hand = 8 * (2 * 10 * ROWS + last + 2 * ROWS + 3 * scored * 4) + 5 * 32 * 4
    assert bytes_by_axis(config, engine=FP32, masked_fraction=0.25)["tp"] == by_hand
    untrimmed = replace(config, train=replace(config.train, skip_dead_rows=False))
    rows = 64 * 32 * 4
    by_hand = 8 * (3 * 10 * rows + 2 * rows + 2 * rows + 3 * scored * 4) + 7 * 32 * 4
    assert bytes_by_axis(untrimmed, engine=FP32, masked_fraction=0.25)["tp"] == by_hand


def test_full_recomputation_repeats_the_forwards_collectives() -> None:
    plain, again = _grid({"tp": 2}), _grid({"tp": 2}, recompute="full")
    more = bytes_by_axis(again, engine=FP32)["tp"] - bytes_by_axis(plain, engine=FP32)["tp"]
    scored = 32 * 0.5005 * 32 * 4
    assert more == pytest.approx(8 * (2 * 2 * ROWS + 2 * scored))


def test_recomputation_of_the_first_layers_repeats_theirs_only() -> None:
    def tp_bytes(**train: Any) -> int:
        whole = {"steps": 1, "global_batch_size": 8, "micro_batch_size": 1, **train}
        return bytes_by_axis(case(kind="s4", parallel={"tp": 2}, train=whole), engine=FP32)["tp"]

    assert tp_bytes(recompute="full", recompute_layers=2) - tp_bytes() == 8 * 2 * 2 * ROWS
    assert tp_bytes(recompute="full", recompute_layers=3) == tp_bytes(recompute="full")


@pytest.mark.parametrize(("stage", "ways"), [(0, 1), (1, 2), (2, 1)])
def test_a_stage_sends_rows_on_and_gradients_back(stage: int, ways: int) -> None:
    assert bytes_by_axis(_grid({"pp": 3}), stage, FP32)["pp"] == ways * 8 * ROWS


def test_interleaved_stages_send_every_chunk() -> None:
    model = {"num_layers": 4, "hidden_size": 32, "num_heads": 4, "vocab_size": 60, "vocab_multiple": 64}
    config = case(model=model, parallel={"pp": 2, "vpp": 2}, train={"steps": 1, "global_batch_size": 8})
    # first stage: two chunks on, one (its second) back; last stage the mirror image
    assert [bytes_by_axis(config, stage, FP32)["pp"] for stage in range(2)] == [8 * 3 * ROWS] * 2


def test_a_tied_tables_gradient_crosses_the_pipeline() -> None:
    config = _grid({"pp": 3}, style="modern_tied_qk")
    assert bytes_by_axis(config, 0, FP32)["pp"] == 8 * ROWS + 64 * 32 * 4
    assert bytes_by_axis(config, 1, FP32)["pp"] == 2 * 8 * ROWS


def test_context_parallelism_moves_clean_keys_and_values_only() -> None:
    config = _grid({"cp": 2})
    kv = 32 * 2 * 2 * 8 * 4
    assert bytes_by_axis(config, engine=FP32)["cp"] == 8 * 3 * 2 * kv
    selective = _grid({"cp": 2}, recompute="selective")
    assert bytes_by_axis(selective, engine=FP32)["cp"] == 8 * 3 * 3 * kv


@pytest.mark.parametrize(("stage", "reductions", "gathers"), [(1, 1, 1), (2, 4, 1), (3, 4, 4)])
def test_zero_reduces_gradients_and_gathers_weights(stage: int, reductions: int, gathers: int) -> None:
    config = _grid({"dp": 2, "zero_stage": stage})
    count = parameters_per_rank(config, 0)
    assert bytes_by_axis(config, engine=FP32)["dp"] == (reductions + gathers) * count * 4


def test_large_models_gather_again_for_the_backward() -> None:
    config = _grid({"dp": 2, "zero_stage": 3})
    count = parameters_per_rank(config, 0)
    small_buckets = EngineAssumptions(precision="fp32", fused=False, reduce_bucket_elements=count // 4)
    assert bytes_by_axis(config, engine=small_buckets)["dp"] == (4 + 8) * count * 4


def test_bf16_reduces_in_fp32_and_gathers_in_bf16() -> None:
    config = _grid({"dp": 2})
    assert bytes_by_axis(config)["dp"] == parameters_per_rank(config, 0) * (4 + 2)


def test_zero_1_sends_each_gradient_once_and_in_bf16_half_of_it() -> None:
    count = parameters_per_rank(_grid({"dp": 4}), 0)
    wire = {name: 0.0 for name in ("fp32", "bf16", "all-reduced")}
    for name in wire:
        asked = {"offload_optimizer": True} if name == "all-reduced" else {"grad_reduce_dtype": name}
        lines = transfers(_grid({"dp": 4, **asked}))
        wire[name] = sum(t.wire_bytes for t in lines if t.what == "gradients")
    assert wire == {"fp32": 3 / 4 * 4 * count, "bf16": 3 / 4 * 2 * count, "all-reduced": 2 * 3 / 4 * 4 * count}


def test_q_and_k_norms_are_summed_over_tp() -> None:
    lines = transfers(_grid({"tp": 2}, style="modern_tied_qk"), engine=FP32)
    assert [t.total_bytes for t in lines if t.what == "gradients of q and k norms"] == [2 * 3 * 8 * 4]


def test_a_ring_puts_less_than_twice_an_all_reduce_on_a_link() -> None:
    reduce = Transfer(axis="dp", collective=Collective.ALL_REDUCE, what="x", ranks=4, calls=2, size_bytes=100)
    gather = Transfer(axis="dp", collective=Collective.ALL_GATHER, what="x", ranks=4, calls=2, size_bytes=100)
    send = Transfer(axis="pp", collective=Collective.SEND, what="x", ranks=2, calls=2, size_bytes=100)
    assert (reduce.wire_bytes, gather.wire_bytes, send.wire_bytes) == (300, 150, 200)


def test_small_collectives_are_counted_where_an_axis_is() -> None:
    assert small_collectives(_grid({})) == {"tp": 0, "pp": 0, "cp": 0, "dp": 0}
    assert small_collectives(_grid({"tp": 2, "dp": 2}))["dp"] > 0
