"""The optimizer step: DeepSpeed ZeRO over megatron's groups. The only owner of deepspeed.initialize.

Decides: which of three paths a step takes. ZeRO-1: megatron's schedule runs on the raw chunks, `ShardedGradients` reduces
to the rank that updates, `sharded_update` clips and steps, and weights are gathered; no host read in it. ZeRO-1 with an
offloaded optimizer does the same by `engine.step()`. ZeRO-2/3 (pp = 1): every micro-batch goes through the DeepSpeed engine.
Contract: the loss is a sum; it is scaled by shard_size / tokens because gradients are averaged over dp x cp ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed.moe.utils import is_moe_param
from torch import Tensor, nn

from bd3_megatron.compat import deepspeed as deepspeed_compat
from bd3_megatron.compat import optional
from bd3_megatron.compat.device import HostCopy
from bd3_megatron.config.schema import Config, OptimConfig
from bd3_megatron.engine.balance import ExpertBalance, Loads
from bd3_megatron.engine.deepspeed_config import BUCKET_ELEMENTS, deepspeed_config, effective_stage
from bd3_megatron.engine.ema import Ema
from bd3_megatron.engine.grads import (
    deepspeed_gradients,
    finish_gradients,
    hook_partial_gradients,
    late_parameters,
)
from bd3_megatron.engine.param_groups import param_groups
from bd3_megatron.engine.pipeline import Pipeline, Span, no_span, scaled_loss
from bd3_megatron.engine.sharded_gradients import FlatGroup, ShardedGradients
from bd3_megatron.engine.sharded_update import counted_once, update_owned
from bd3_megatron.model.bd3_model import LossOutput
from bd3_megatron.model.build import ParallelModel
from bd3_megatron.model.loss_sums import LossSums, loss_sums
from bd3_megatron.model.pair_batch import PairBatch
from bd3_megatron.model.partition import is_expert
from bd3_megatron.parallel.topology import DeepSpeedMpu

Veto = Callable[[list[LossSums]], bool]

MIN_BUCKETS = 16
"""Into at least so many buckets gradients are cut for their reduction."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports on this rank; only reading `grad_norm` or `applied` waits for the device."""

    logs: list[LossSums]
    """One a micro-batch on the last stage; empty elsewhere."""
    numbers: HostCopy
    """float64 [2]: gradient norm, and 1 where the update was made."""
    vetoed: bool = False
    loads: Loads = field(default_factory=dict)
    """Of the experts on this rank's layers."""

    @property
    def grad_norm(self) -> float:
        """Global gradient norm before clipping, over all axes; inf or nan when the step was skipped."""
        return float(self.numbers.read()[0])

    @property
    def applied(self) -> bool:
        """False when all ranks left the update out together: a gradient was not finite, or the step was vetoed."""
        return bool(self.numbers.read()[1])


class ZeroEngine:
    """The model with its optimizer, as the trainer sees it.

    Args:
        model: this rank's chunks.
        config: the run.
        num_micro_batches: of a full step.
        dtype: of parameters.
    """

    def __init__(self, model: ParallelModel, config: Config, *, num_micro_batches: int, dtype: torch.dtype) -> None:
        self.model = model
        self.stage = effective_stage(config)
        self.pipeline = Pipeline(model)
        topology, root = model.topology, model.root
        self.optimizer = _adamw(param_groups(root, config.optim.weight_decay), config.optim)
        if self.stage > 1:
            # Hooks must be on the parameters before DeepSpeed adds its own.
            hook_partial_gradients(root, topology)
        deepspeed = deepspeed_compat.load_deepspeed()
        if config.model.experts is not None:
            deepspeed_compat.mark_experts(
                root,
                [parameter for name, parameter in root.named_parameters() if is_expert(name)],
                group=topology.expert_group,
                data_group=topology.expert_data_group,
                number=config.model.experts.number,
            )
        if self.stage == 3:
            for chunk in model.chunks:
                # the head reads a table that belongs to the embedding: ZeRO-3 must gather it there too
                if chunk.tied_weight() is not None:
                    deepspeed.zero.register_external_parameter(chunk.output_layer, chunk.tied_weight())
        size = sum(p.numel() for p in root.parameters())
        self.engine: Any = deepspeed.initialize(
            # Under ZeRO 1 DeepSpeed never runs the model; it needs its parameters and their global names.
            model=root if self.stage == 1 else _OneChunk(model),
            optimizer=self.optimizer,
            config=deepspeed_config(config, num_micro_batches=num_micro_batches, dtype=dtype, num_parameters=size),
            mpu=DeepSpeedMpu(topology),
            dist_init_required=False,
        )[0]
        self.gradients = None
        if self.stage == 1:
            if not config.parallel.offload_optimizer:
                self.gradients = self._sharded_gradients(config, size)
            sums = deepspeed_gradients if self.gradients is None else self.gradients.sums
            # megatron's schedule calls this after the last backward; its own default wants megatron's DDP wrapper.
            model.config.finalize_model_grads_func = lambda *_, **__: finish_gradients(root, topology, sums)
        self._clip = config.optim.clip_grad_norm
        self._left_out = torch.zeros((), dtype=torch.float64, device=topology.device)
        self.ema = Ema(self.owned(), config.optim.ema_decay) if config.optim.ema_decay > 0 else None
        experts = config.model.experts
        self.balance = None if experts is None else ExpertBalance(root, topology, experts)

    def _sharded_gradients(self, config: Config, size: int) -> ShardedGradients:
        held, topology = self.engine.optimizer, self.model.topology
        # DeepSpeed's names with bf16 weights (BF16_Optimizer) and with fp32 ones
        is_bf16 = hasattr(held, "bf16_groups")
        members = held.bf16_groups if is_bf16 else held.round_robin_bit16_groups
        flats = held.bf16_groups_flat if is_bf16 else held.bit16_groups_flat
        for flat in getattr(held, "fp32_groups_gradients_flat", ()):
            # all gradients of the model, which nobody fills here: 4 bytes a parameter on every rank
            flat.untyped_storage().resize_(0)
        groups = [
            FlatGroup(
                parameters=parameters,
                starts=[p.data.storage_offset() - flat.storage_offset() for p in parameters],
                owned=owned,
                ranks=topology.expert_data_group if is_moe_param(parameters[0]) else topology.shard_group,
            )
            for parameters, flat, owned in zip(members, flats, self.owned(), strict=True)
        ]
        return ShardedGradients(
            groups=groups,
            late=late_parameters(self.model.root, topology),
            share=1.0 / topology.shard_size,
            # enough buckets that the first leave early, however small the model
            bucket_elements=min(BUCKET_ELEMENTS, max(1, size // MIN_BUCKETS)),
            overlap=config.parallel.overlap_grad_reduce,
            wire=torch.bfloat16 if config.parallel.grad_reduce_dtype == "bf16" else None,
        )

    @property
    def kernels(self) -> dict[str, str]:
        """Which optimizer runs and how ranks exchange gradients and weights, for the log and the record."""
        backend = torch.distributed.get_backend(self.model.topology.shard_group)
        made = f"{type(self.optimizer).__module__.partition('.')[0]} {type(self.optimizer).__name__}"
        fused = ", fused" if self.optimizer.param_groups[0].get("fused") else ""
        held = self.gradients
        if held is None:
            path = f"ZeRO {self.stage} by DeepSpeed"
        else:
            wire = held.wire or held.owned[0].dtype
            when = "during the last backward" if held.overlap else "after the last backward"
            path = f"ZeRO 1, gradients reduced to their owners in {str(wire).removeprefix('torch.')} {when}"
        return {"optimizer": f"{made}{fused}", "communication": f"{backend}, {path}"}

    @property
    def skipped_steps(self) -> int:
        """Updates left out because a gradient was not finite; waits for the device."""
        return int(self.engine.skipped_steps) + int(self._left_out)

    def owned(self) -> list[Tensor]:
        """The fp32 partitions this rank owns, as DeepSpeed's optimizer of the current mode names them."""
        optimizer = self.engine.optimizer
        # Each of DeepSpeed's optimizers has another name for them: stage_1_and_2, BF16_Optimizer, stage3.
        for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat"):
            owned = getattr(optimizer, name, None)
            if owned is not None:
                return list(owned)
        raise RuntimeError(f"unknown DeepSpeed optimizer {type(optimizer).__name__}")

    def train_step(
        self,
        batches: Sequence[PairBatch],
        *,
        loss_scale: float | Tensor,
        lr: float,
        span: Span = no_span,
        veto: Veto | None = None,
    ) -> StepResult:
        """One optimizer update.

        Args:
            batches: this rank's micro-batches.
            loss_scale: shard_size / (tokens of the global batch).
            lr: learning rate of this update.
            span: names the kind of work in progress, for whoever measures time.
            veto: asked, with the logs, between the last backward and the update (ZeRO 1); the same answer on every rank.
        """
        # Written into the optimizer at every step: DeepSpeed has no scheduler of ours, and a resumed run no history.
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.root.train()
        if self.stage > 1:
            return self._result(self._managed(batches, loss_scale, span))
        num_samples = sum(batch.batch_size for batch in batches) * self.model.topology.dp
        if self.balance is not None:
            self.balance.begin(num_samples)
        if self.gradients is not None:
            self.gradients.begin(len(batches))
        logs = self.pipeline.run(batches, loss_scale=loss_scale, span=span)
        if self.gradients is not None:
            # alone, nothing travels
            with span("communication_dp" if self.model.topology.shard_size > 1 else "optimizer"):
                self.gradients.finish()
        if veto is not None and veto(logs):
            self._drop_gradients()
            left_out = HostCopy(torch.tensor([float("nan"), 0.0], dtype=torch.float64))
            loads = self._loads(torch.zeros_like(self._left_out), num_samples)
            return StepResult(logs, left_out, vetoed=True, loads=loads)
        with span("optimizer"):
            if self.gradients is not None:
                return self._sharded_update(logs, self.gradients, num_samples)
            self.engine.step()
        return self._result(logs)

    def _sharded_update(self, logs: list[LossSums], gradients: ShardedGradients, num_samples: int) -> StepResult:
        """Norm, clip, Adam and average on this rank's part, then everybody's weights; the host reads nothing."""
        topology = self.model.topology
        counted = gradients.owned_slices(counted_once(self.model.root, topology))
        norm, applied = update_owned(self.optimizer, self.owned(), gradients.owned, counted, clip=self._clip)
        self._left_out += 1 - applied
        self.engine.global_steps += 1
        if self.ema is not None:
            self.ema.update(self.owned(), applied)
        self.engine.optimizer.update_lp_params()
        numbers = HostCopy(torch.stack([norm.double(), applied.double()]))
        return StepResult(logs, numbers, loads=self._loads(applied, num_samples))

    def _loads(self, applied: Tensor, num_samples: int) -> Loads:
        """Loads of the experts in the step, by which their biases have moved where the update was made."""
        return {} if self.balance is None else self.balance.finish(applied, num_samples)

    def _result(self, logs: list[LossSums]) -> StepResult:
        """What DeepSpeed's own step did."""
        applied = float(self.engine.was_step_applied())
        if self.ema is not None:
            self.ema.update(self.owned(), torch.full((), applied, device=self.model.topology.device))
        # as DeepSpeed has it, on the device or not: the record reads it a step later
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), device=self.model.topology.device).double().flatten()
        return StepResult(logs, HostCopy(torch.cat([norm, torch.full_like(norm, applied)])))

    def _drop_gradients(self) -> None:
        """Forget what the step's micro-batches accumulated where DeepSpeed keeps it; ours is written anew by every step."""
        if self.gradients is not None:
            return
        self.engine.optimizer.zero_grad()
        for parameter in self.model.root.parameters():
            for grad in deepspeed_gradients(parameter):
                grad.zero_()
            parameter.grad = None

    def _managed(self, batches: Sequence[PairBatch], loss_scale: float | Tensor, span: Span) -> list[LossSums]:
        logs = []
        for number, batch in enumerate(batches):
            # Told each time: DeepSpeed's own count of micro-batches would be wrong in a step of another batch size.
            self.engine.set_gradient_accumulation_boundary(number == len(batches) - 1)
            with span("forward"):
                weighted_sum, nll_R, entropy_R = self.engine(batch)
            with span("backward"):
                # The scale is ours: DeepSpeed's would divide by the number of micro-batches once more.
                self.engine.backward(scaled_loss(weighted_sum, loss_scale), scale_wrt_gas=False)
            with span("optimizer"):
                self.engine.step()
            logs.append(loss_sums(batch, nll_R, entropy_R))
        return logs

    def evaluate(self, batches: Sequence[PairBatch]) -> list[LossSums]:
        """Losses without gradients or dropout; logs on the last stage."""
        self.model.root.eval()
        with torch.no_grad():
            if self.stage == 3:
                return [self._evaluate_gathered(batch) for batch in batches]
            return self.pipeline.run(batches, loss_scale=1.0, forward_only=True)

    def _evaluate_gathered(self, batch: PairBatch) -> LossSums:
        log = loss_sums(batch, self.engine(batch)[1])
        # without a backward ZeRO-3 keeps what it gathered: all weights on every rank, and stale ones after a swap
        self.engine.optimizer.empty_partition_cache()
        return log

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the model has the averaged weights (or its own, where no average is kept)."""
        if self.ema is None:
            yield
            return
        self._swap(self.ema)
        try:
            yield
        finally:
            self._swap(self.ema)

    def _swap(self, ema: Ema) -> None:
        ema.swap(self.owned())
        self.publish()

    def publish(self) -> None:
        """Bring the model's weights in line with the fp32 partitions (each rank's part gathered by all)."""
        optimizer = self.engine.optimizer
        with torch.no_grad():
            if self.stage < 3:
                # The gather that ends every step of ZeRO 1 and 2, without a step.
                optimizer.update_lp_params()
                return
            for index, partition in enumerate(optimizer.fp32_partitioned_groups_flat):
                optimizer.fp16_partitioned_groups_flat[index].data.copy_(partition.data)
                optimizer._unflatten_partitioned_parameters(index)


class _OneChunk(nn.Module):
    """What DeepSpeed calls for ZeRO 2 and 3: the only chunk, under the root's names."""

    def __init__(self, model: ParallelModel) -> None:
        super().__init__()
        self.root = model.root

    def forward(self, batch: PairBatch) -> LossOutput:
        return self.root.local_chunks()[0](batch)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        return self.root.named_parameters(prefix, recurse, remove_duplicate)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return self.root.state_dict()

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return self.root.load_state_dict(state_dict, strict, assign)


def _adamw(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "eps": optim.adam_eps}
    if optim.name == "apex":
        return optional.require("apex")(groups, adam_w_mode=True, **settings)
    # one pass over weights and moments, and the only form that leaves an update out without asking the host
    return torch.optim.AdamW(groups, fused=True, **settings)
