"""Our configuration as DeepSpeed's JSON.

Decides: gradients accumulate and travel in fp32; ZeRO-1 runs unmanaged: the pipeline schedule works on the raw module
(DeepSpeed #8184, #8203, #8225, so deepspeed >= 0.19.8). Stages 2 and 3 cut gradients during the backward, so there the
engine manages each micro-batch.
"""

from __future__ import annotations

from typing import Any

import torch

from bd3_megatron.config.schema import Config

BUCKET_ELEMENTS = 50_000_000
"""Elements of one reduction bucket; DeepSpeed's default of 5e8 would reserve 2 GB on every rank."""


def effective_stage(config: Config) -> int:
    """The ZeRO stage that runs."""
    # Stage 0 is taken as 1: DeepSpeed's own stage 0 counts tied copies twice in the norm.
    return max(1, config.parallel.zero_stage)


def deepspeed_config(
    config: Config, *, num_micro_batches: int, dtype: torch.dtype, num_parameters: int
) -> dict[str, Any]:
    """The dictionary for deepspeed.initialize.

    Args:
        config: the run.
        num_micro_batches: of one step on one rank.
        dtype: of parameters: float32, float64 (tests) or bfloat16.
        num_parameters: on this rank; buckets are never larger.
    """
    stage = effective_stage(config)
    bucket = min(BUCKET_ELEMENTS, max(1, num_parameters))
    zero: dict[str, Any] = {
        "stage": stage,
        # Stage 1 is reduced outside of DeepSpeed's backward hooks, see sharded_gradients.
        "overlap_comm": stage > 1 and dtype == torch.bfloat16,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "contiguous_gradients": stage > 1,
    }
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": bucket,
            # Nothing is kept gathered: small parameters too lie as shards, so that every piece is described alike.
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 2 * bucket,
        }
    if config.parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": dtype == torch.bfloat16}
    tree: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": num_micro_batches,
        "managed_gradient_accumulation": stage > 1,
        "gradient_clipping": config.optim.clip_grad_norm,
        "zero_optimization": zero,
        # torch's AdamW also on the host: DeepSpeed's own would be compiled at the first start.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",
        # Never: the record is ours.
        "steps_per_print": 2**62,
        "wall_clock_breakdown": False,
    }
    if dtype == torch.bfloat16:
        tree["bf16"] = {"enabled": True}
        # Selects BF16_Optimizer; the default would accumulate and send bf16.
        tree["data_types"] = {"grad_accum_dtype": "fp32"}
    return tree
