"""One optimizer update from its number: phase, batch, token count, loss scale, learning rate, engine step.

The trainer and the parity tests call `TrainingStep.run`; nothing else may decide any of these numbers.
Contract: step n is the update that leaves state n. Collective over all ranks; nothing of the run's state is changed here.
Source: the mean is BD3-LM's NELBO over the tokens of the global batch (arXiv 2503.09573), taken once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from bd3_megatron.config.schema import Config
from bd3_megatron.diffusion.curriculum import Phase
from bd3_megatron.diffusion.noise_level import Interval
from bd3_megatron.engine.zero_engine import StepResult, ZeroEngine
from bd3_megatron.model.dropout import seed_dropout
from bd3_megatron.model.loss_sums import LossSums
from bd3_megatron.parallel.topology import Topology
from bd3_megatron.train.batches import StepBatch, StepBatches
from bd3_megatron.train.metrics import PendingSums, StepSums, reduce_step
from bd3_megatron.train.plan import RunPlan
from bd3_megatron.train.state import TrainState
from bd3_megatron.train.timeline import Timeline, profiled


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What one update did, on this rank; `sums` makes it global."""

    batch: StepBatch
    result: StepResult
    phase: Phase
    interval: Interval
    """Noise interval that was in force."""
    num_samples: int
    """Of the update, over all ranks."""
    lr: float
    """Learning rate that the optimizer used."""
    topology: Topology
    pending_sums: PendingSums | None = None
    """What the veto was told, already reduced."""

    def sums(self) -> StepSums:
        """Loss and counts over the whole grid, equal on every rank. Collective; waits for the device."""
        return self.begin_sums().read()

    def begin_sums(self) -> PendingSums:
        """The same on their way to the host, which waits only where it reads them. Collective."""
        if self.pending_sums is not None:
            return self.pending_sums
        return _sums(self.result.logs, self.batch, self.topology, self.num_samples)


LossVeto = Callable[[float], bool]
"""Given the loss of a step between its backward and its update, says whether to leave the update out."""


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """Makes updates on one grid."""

    config: Config
    topology: Topology
    engine: ZeroEngine
    timeline: Timeline

    def run(
        self, plan: RunPlan, state: TrainState, batches: StepBatches, *, veto: LossVeto | None = None
    ) -> StepOutcome:
        """The update from state `state.step` to the next.

        Args:
            plan: of this attempt.
            state: read, not changed.
            batches: gives this step's micro-batches; steps must be asked for in order.
            veto: asked with the step's loss before the update (ZeRO 1); the same answer on every rank.
        """
        step, phase = state.step, plan.phase_at(state.step).phase
        interval, lr, num_samples = plan.interval(step, state.intervals), plan.lr(step), plan.batch_size(step)
        self.timeline.start_step(step + 1)
        # Rows, visibility and counts of this step's phase, before its batch is cut by them.
        self.engine.model.enter_phase(phase.block_size, axes=phase.axes)
        if self.config.model.dropout > 0:
            # By the step and not by what ran before, so that a resumed run drops the same elements.
            seed_dropout(self.config.run.seed, step, self.topology)
        with self.timeline.span("data_wait"):
            batch = batches.next(step, self.engine.model.layout, interval)
            self._draw_ahead(step + 1, plan, state, batches)
            tokens = self._global_count(batch)

        known: list[PendingSums] = []

        def is_vetoed(logs: list[LossSums]) -> bool:
            # reduced once, for the guard and for the record
            known.append(_sums(logs, batch, self.topology, num_samples))
            return veto is not None and veto(known[0].read().loss)

        folder = Path(self.config.run.dir) / "profile"
        with profiled(step + 1, self.config.log.profile_steps, folder, self.topology.rank):
            result = self.engine.train_step(
                batch.micro_batches,
                # DeepSpeed averages gradients over the ranks that share an optimizer state; the mean is over tokens
                loss_scale=self.topology.shard_size / tokens,
                lr=lr,
                span=self.timeline.span,
                # Without a guard there is no reduction and no host read between backward and update.
                veto=None if veto is None else is_vetoed,
            )
        self.timeline.end_step()
        return StepOutcome(
            batch=batch,
            result=result,
            phase=phase,
            interval=interval,
            num_samples=num_samples,
            lr=lr,
            topology=self.topology,
            pending_sums=known[0] if known else None,
        )

    def _draw_ahead(self, step: int, plan: RunPlan, state: TrainState, batches: StepBatches) -> None:
        """Let the next step be made while this one runs."""
        if step < plan.total_steps:
            phase = plan.phase_at(step).phase
            layout = self.engine.model.layout_at(phase.block_size, axes=phase.axes)
            batches.draw_ahead(step, layout, plan.interval(step, state.intervals))

    def _global_count(self, batch: StepBatch) -> float | Tensor:
        """Tokens of the whole step in the mean: by arithmetic, or summed over dp where samples differ."""
        # Without padding every sample has as many tokens as any other; no collective is needed.
        if self.config.data.packing == "wrap" and not self.engine.model.layout.objective.count_varies:
            return batch.token_count * self.topology.dp
        # Filled on the device, and the sum stays there, so that the host does not wait for it; exact up to 2^53 tokens.
        count = torch.full((1,), batch.token_count, dtype=torch.float64, device=self.topology.device)
        dist.all_reduce(count, group=self.topology.groups.dp)
        # a step that masked nothing has a loss of zero, not of 0 / 0
        return count[0].clamp_min(1)


def _sums(logs: list[LossSums], batch: StepBatch, topology: Topology, num_samples: int) -> PendingSums:
    return reduce_step(
        logs,
        topology,
        num_samples=num_samples,
        token_count=batch.token_count,
        masked_count=batch.masked_count,
        text_count=batch.text_count,
    )
