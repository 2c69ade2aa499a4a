"""Memory adds up, and every axis lowers what it should."""

from __future__ import annotations

from typing import Any

import pytest

from bd3_megatron.config.schema import Config
from bd3_megatron.cost.activations import layer_activation_bytes
from bd3_megatron.cost.assumptions import EngineAssumptions, engine_assumptions
from bd3_megatron.cost.memory import chunks_in_flight, memory_of_stage, memory_per_device
from bd3_megatron.cost.parameters import parameter_count
from bd3_megatron.cost.shape import shape_of
from tests.unit.cost.cases import case

BIG: dict[str, Any] = {
    "num_layers": 8,
    "hidden_size": 512,
    "num_heads": 8,
    "ffn_hidden_size": 1536,
    "vocab_size": 8000,
    "vocab_multiple": 128,
}


def _big(parallel: dict[str, Any] | None = None, **train: Any) -> Config:
    train = {"steps": 1, "global_batch_size": 16, "micro_batch_size": 1} | train
    return case(model=BIG, data={"seq_len": 512}, parallel=parallel or {}, train=train)


def test_states_of_one_device_are_the_textbooks() -> None:
    config = _big()
    count = parameter_count(config, padded=True)
    bf16, fp32 = memory_per_device(config), memory_per_device(config, EngineAssumptions(precision="fp32", fused=False))
    assert (bf16.parameters, bf16.gradients, bf16.optimizer, bf16.ema) == (2 * count, 4 * count, 12 * count, 4 * count)
    assert fp32.states == 24 * count


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_cuts_what_its_stage_says(stage: int) -> None:
    count = parameter_count(_big(), padded=True)
    memory = memory_per_device(_big({"dp": 4, "zero_stage": stage}))
    assert memory.parameters == 2 * (count // 4 if stage == 3 else count)
    assert memory.gradients == 4 * (count // 4 if stage > 1 else count)
    assert memory.optimizer == 12 * count // 4


def test_context_parallel_ranks_share_optimizer_state_too() -> None:
    assert memory_per_device(_big({"cp": 2, "dp": 2})).optimizer == memory_per_device(_big({"dp": 4})).optimizer


def test_an_offloaded_optimizer_is_in_host_memory() -> None:
    here, away = memory_per_device(_big()), memory_per_device(_big({"offload_optimizer": True}))
    assert away.optimizer == away.ema == 0
    assert away.host == here.optimizer + here.ema


def test_stage_zero_runs_as_stage_one() -> None:
    assert memory_per_device(_big({"dp": 2, "zero_stage": 0})) == memory_per_device(_big({"dp": 2}))


@pytest.mark.parametrize("axis", ["tp", "cp"])
def test_an_axis_that_cuts_rows_or_widths_lowers_activations(axis: str) -> None:
    assert memory_per_device(_big({axis: 2})).activations < memory_per_device(_big()).activations


def test_sequence_parallelism_cuts_what_tensor_parallelism_leaves() -> None:
    without = memory_per_device(_big({"tp": 4}))
    cut = memory_per_device(_big({"tp": 4, "sequence_parallel": True}))
    assert cut.activations < without.activations


def test_recomputation_trades_activations() -> None:
    memory = {r: memory_per_device(_big(recompute=r)).activations for r in ("none", "selective", "full")}
    assert memory["full"] < memory["selective"] < memory["none"]
    shape = shape_of(_big())
    # full: one input of all rows a layer, and cosines and sines once
    assert memory["full"] == (1024 - shape.block) * (8 * 512 + 2 * 64) * 2


def test_recomputation_of_some_layers_keeps_the_others() -> None:
    def kept(layers: int | None) -> int:
        return memory_per_device(_big(recompute="full", recompute_layers=layers)).activations

    steps = [kept(n) - kept(n + 1) for n in range(1, 7)]
    # every layer before the last frees the same; the last, of scored rows only, less
    assert max(steps) - min(steps) <= 1 and 0 < kept(7) - kept(None) < steps[0]
    assert kept(8) == kept(None)


def test_a_pipelines_first_stage_holds_as_many_micro_batches_as_stages() -> None:
    config = _big({"pp": 4})
    assert [chunks_in_flight(config, stage) for stage in range(4)] == [4, 3, 2, 1]
    few = _big({"pp": 4}, global_batch_size=2)
    assert [chunks_in_flight(few, stage) for stage in range(4)] == [2, 2, 2, 1]


def test_interleaved_chunks_in_flight_are_megatrons_warm_up() -> None:
    config = _big({"pp": 2, "vpp": 4})
    # megatron-core 0.16 schedules.py: (pp - rank - 1) * 2 + (vpp - 1) * pp warm-up forwards, then one more
    assert [chunks_in_flight(config, stage) for stage in range(2)] == [9, 7]


def test_the_fullest_stage_is_reported() -> None:
    config = _big({"pp": 4})
    peaks = [memory_of_stage(config, stage).peak for stage in range(4)]
    assert memory_per_device(config).peak == max(peaks)


def test_the_head_costs_a_chunk_and_its_table_whatever_the_rows() -> None:
    memory = memory_per_device(_big(micro_batch_size=64, global_batch_size=64))
    scored = 64 * 512 * 0.5005
    table, norm, gathered = 8064 * 512 * 4, scored * 512 * 6, 2 * scored * 512 * 2
    chunk = memory.head - table - norm - gathered
    assert 0 < chunk <= 1.5 * 512 * 2**20


def test_zero_three_gathers_the_layer_at_work() -> None:
    memory = memory_per_device(_big({"dp": 2, "zero_stage": 3}))
    assert memory.buffers > memory_per_device(_big({"dp": 2, "zero_stage": 2})).buffers


def test_dropout_keeps_its_masks() -> None:
    config = _big()
    shape = shape_of(config)
    with_dropout = case(model=BIG | {"dropout": 0.1}, data={"seq_len": 512})
    assert layer_activation_bytes(config, shape, EngineAssumptions())["dropout"] == 0
    assert layer_activation_bytes(with_dropout, shape_of(with_dropout), EngineAssumptions())["dropout"] > 0


def test_precision_follows_the_device_unless_it_is_given() -> None:
    assert engine_assumptions("cuda", _big()).precision == "bf16"
    assert engine_assumptions("cpu", _big()).precision == "fp32"
    assert engine_assumptions("cuda", _big(precision="fp32")).element_bytes == 4


def test_parts_are_all_of_the_peak() -> None:
    memory = memory_per_device(_big({"pp": 2}))
    parts = memory.parts()
    moment = parts["activations"] + parts["head"] + parts["working"]
    held = parts["parameters"] + parts["gradients"] + parts["optimizer"] + parts["ema"] + parts["buffers"]
    assert memory.peak == held + max(moment, parts["step_temporaries"])
