"""What DeepSpeed is told: which stage runs, who manages accumulation, and that sums are fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bd3_megatron.engine.deepspeed_config import BUCKET_ELEMENTS, deepspeed_config, effective_stage
from tests.unit.cost.cases import case


def tree_of(
    dtype: torch.dtype = torch.float32, num_parameters: int = 10**9, **sections: dict[str, Any]
) -> dict[str, Any]:
    return deepspeed_config(case(**sections), num_micro_batches=4, dtype=dtype, num_parameters=num_parameters)


@pytest.mark.parametrize(("asked", "runs"), [(0, 1), (1, 1), (2, 2), (3, 3)])
def test_stage_0_is_taken_as_1(asked: int, runs: int) -> None:
    config = case(parallel={"zero_stage": asked})
    assert effective_stage(config) == tree_of(parallel={"zero_stage": asked})["zero_optimization"]["stage"] == runs


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_engine_manages_accumulation_only_where_gradients_are_cut(stage: int, dtype: torch.dtype) -> None:
    tree = tree_of(dtype, parallel={"zero_stage": stage})
    assert tree["managed_gradient_accumulation"] == (stage > 1)
    assert tree["communication_data_type"] == "fp32"
    assert ("bf16" in tree) == (dtype == torch.bfloat16)
    if "bf16" in tree:
        assert tree["data_types"] == {"grad_accum_dtype": "fp32"}
        # DeepSpeed's own hooks stay away: gradients of ZeRO 1 are ours to keep
        assert tree["bf16"] == {"enabled": True}


def test_the_runs_own_numbers_arrive() -> None:
    tree = tree_of(optim={"clip_grad_norm": 0.5}, train={"micro_batch_size": 2})
    assert (tree["gradient_clipping"], tree["train_micro_batch_size_per_gpu"]) == (0.5, 2)
    assert tree["gradient_accumulation_steps"] == 4


def test_buckets_are_never_larger_than_the_model() -> None:
    small, large = tree_of(num_parameters=1000), tree_of()
    assert small["zero_optimization"]["reduce_bucket_size"] == 1000
    assert large["zero_optimization"]["allgather_bucket_size"] == BUCKET_ELEMENTS
    assert tree_of(num_parameters=0)["zero_optimization"]["reduce_bucket_size"] == 1


def test_offload_uses_torchs_optimizer() -> None:
    tree = tree_of(parallel={"offload_optimizer": True})
    assert tree["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    # DeepSpeed's own CPU Adam would be compiled at the first step, for minutes
    assert tree["zero_force_ds_cpu_optimizer"] is False
    assert "offload_optimizer" not in tree_of()["zero_optimization"]
