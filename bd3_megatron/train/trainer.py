"""The loop: batch, step, record, hooks, until the budget is used up or someone asks to stop.

Decides: what happens in which order around a step, and nothing about how any of it is done. Step n is the state after
n updates; a record of step n describes the update that led to it. Hooks (evaluation, interval search, saving) run
between steps, on all ranks alike.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from bd3_megatron.checkpoint.describe import source_commit
from bd3_megatron.checkpoint.save import Saver
from bd3_megatron.compat.device import peak_memory_bytes
from bd3_megatron.config.schema import Config
from bd3_megatron.cost.pairs import Pairs
from bd3_megatron.engine.pipeline import MicroLog
from bd3_megatron.engine.zero_engine import StepResult, Veto, ZeroEngine
from bd3_megatron.model.dropout import seed_dropout
from bd3_megatron.parallel.topology import Topology
from bd3_megatron.planner.peaks import PeakTflops
from bd3_megatron.process.status import write_status
from bd3_megatron.process.stop import StopRequest
from bd3_megatron.process.watchdog import Watchdog, straggler_metrics
from bd3_megatron.train import hooks
from bd3_megatron.train.batches import StepBatch, StepBatches
from bd3_megatron.train.dataset import RunData
from bd3_megatron.train.document_pairs import step_pairs
from bd3_megatron.train.loggers import Loggers
from bd3_megatron.train.metrics import StepSums, reduce_step
from bd3_megatron.train.plan import RunPlan
from bd3_megatron.train.spikes import is_spike, remember
from bd3_megatron.train.state import TrainState
from bd3_megatron.train.throughput import figures
from bd3_megatron.train.timeline import Timeline, device_event_factory, profiled, time_metrics


@dataclass
class Trainer:
    """Everything a run needs, wired by train/build."""

    config: Config
    plan: RunPlan
    topology: Topology
    data: RunData
    engine: ZeroEngine
    state: TrainState
    saver: Saver
    stop: StopRequest
    watchdog: Watchdog
    peak: PeakTflops
    loggers: Loggers | None
    """On rank 0; None elsewhere."""
    batches: StepBatches | None = None
    """What the steps read; None before the first."""
    timeline: Timeline = field(default_factory=lambda: Timeline(event_factory=device_event_factory()))

    def run(self) -> str:
        """Train to the end of the budget.

        Returns:
            "finished", or why it stopped early: "signal", "file" or "deadline".
        """
        state = self.state
        self._record_start()
        if state.step >= self.plan.total_steps:
            return self._end("finished")
        if self.config.evaluate.at_start_and_end and state.step == 0:
            hooks.evaluate(self)
        with self.watchdog.watching(state.step):
            reason = self._loop()
        return self._end(reason)

    def _loop(self) -> str:
        self.batches = self._batches()
        # asked anew: going back to a checkpoint uses up samples, and so shortens a budget of tokens
        while self.state.step < self.plan.total_steps:
            vetoed = self._step(self.batches)
            self.watchdog.step_done(self.state.step)
            reason = self.stop.agreed(self.topology.device)
            if vetoed and self.config.train.spike_action == "rollback" and hooks.roll_back(self):
                self.batches = self._batches()
                continue
            hooks.after_step(self, stopping=reason is not None)
            self.watchdog.alive(self.state.step)
            if reason is not None and self.state.step < self.plan.total_steps:
                return reason
        return "finished"

    def _batches(self) -> StepBatches:
        return StepBatches(
            self.data.train,
            self.plan,
            self.topology,
            first_step=self.state.step,
            mask_id=self.data.special.mask,
            num_workers=self.config.data.num_workers,
            saved=self.state.data,
        )

    def _step(self, batches: StepBatches) -> bool:
        """One optimizer update, and its record where one is due; True when the spike guard left it out."""
        state = self.state
        place = self.plan.place(state.step)
        self.timeline.start_step(state.step + 1)
        self.engine.model.enter_phase(place.phase.block_size)
        if self.config.model.dropout > 0:
            seed_dropout(self.config.run.seed, state.step, self.topology)
        with self.timeline.span("data_wait"):
            interval = self.plan.interval(state.step, state.intervals)
            batch = batches.next(state.step, self.engine.model.layout, interval)
            tokens = self._global_count(batch)
        num_samples, lr = self.plan.batch_size(state.step), self.plan.lr(state.step)
        with profiled(
            state.step + 1, self.config.log.profile_steps, Path(self.config.run.dir) / "profile", self.topology.rank
        ):
            result = self.engine.train_step(
                batch.micro_batches,
                loss_scale=self.topology.shard_size / tokens,
                lr=lr,
                span=self.timeline.span,
                veto=self._veto_for(batch, num_samples) if self.config.train.spike_factor else None,
            )
        self.timeline.end_step()
        state.step += 1
        state.samples_consumed += num_samples
        state.skipped_steps += not result.applied
        if result.vetoed or state.step % self.config.log.every_steps == 0 or state.step == self.plan.total_steps:
            self._record_step(batch, result, num_samples=num_samples, lr=lr)
        if self.loggers is not None:
            self.loggers.console.advance()
        return result.vetoed

    def _veto_for(self, batch: StepBatch, num_samples: int) -> Veto:
        """Asked between backward and update: is this step's loss a spike? The same answer on every rank."""

        def veto(logs: list[MicroLog]) -> bool:
            loss = self._sums(logs, batch, num_samples).loss
            if is_spike(loss, self.state.recent_losses, self.config.train.spike_factor):
                return True
            remember(self.state.recent_losses, loss)
            return False

        return veto

    def _global_count(self, batch: StepBatch) -> float | Tensor:
        """Tokens of the whole step: known by arithmetic, or summed over dp where samples differ."""
        if self.config.data.packing == "wrap":
            return batch.token_count * self.topology.dp
        count = Tensor([batch.token_count]).double().to(self.topology.device)
        dist.all_reduce(count, group=self.topology.groups.dp)
        return count[0]

    def _record_step(self, batch: StepBatch, result: StepResult, *, num_samples: int, lr: float) -> None:
        sums = self._sums(result.logs, batch, num_samples)
        times = time_metrics(self.timeline.finished())
        times |= straggler_metrics(times, self.topology.device)
        block_size = self.plan.place(self.state.step - 1).phase.block_size
        pairs = step_pairs(self.config, batch.micro_batches, self.topology, block_size=block_size)
        if self.loggers is not None:
            speed = self._speed(times, sums, num_samples, pairs)
            record = self._step_record(sums, result, speed | times, num_samples=num_samples, lr=lr)
            self.loggers.write(record | {"event": "loss_spike"} if result.vetoed else record)

    def _sums(self, logs: list[MicroLog], batch: StepBatch, num_samples: int) -> StepSums:
        return reduce_step(
            logs,
            self.topology,
            num_samples=num_samples,
            token_count=batch.token_count,
            masked_count=batch.masked_count,
        )

    def _step_record(
        self, sums: StepSums, result: StepResult, times: dict[str, Any], *, num_samples: int, lr: float
    ) -> dict[str, Any]:
        state, place = self.state, self.plan.place(self.state.step - 1)
        interval = self.plan.interval(state.step - 1, state.intervals)
        return {
            "step": state.step,
            "tokens": state.samples_consumed * self.config.data.seq_len,
            **sums.metrics(),
            "optim/lr": lr,
            "optim/grad_norm": result.grad_norm,
            "optim/skipped_steps": state.skipped_steps,
            "noise/interval_beta": interval.beta,
            "noise/interval_omega": interval.omega,
            "noise/block_size": place.phase.block_size,
            "noise/views": self.engine.model.layout.views,
            **times,
            "time": time.time(),
            "memory/peak_bytes": peak_memory_bytes(self.topology.device),
        }

    def _speed(self, times: dict[str, float], sums: StepSums, num_samples: int, pairs: Pairs | None) -> dict[str, Any]:
        """Throughput entries; none while a GPU has not yet passed the events that time the step."""
        if "time/step_seconds" not in times:
            return {}
        place = self.plan.place(self.state.step - 1)
        interval = self.plan.interval(self.state.step - 1, self.state.intervals)
        return figures(
            self.config,
            times["time/step_seconds"],
            sums.masked_count / max(1, sums.token_count),
            self.topology.world_size,
            self.peak,
            sequences=num_samples,
            block_size=place.phase.block_size,
            interval=(interval.beta, interval.omega),
            pairs=pairs,
        ).metrics()

    def _record_start(self) -> None:
        if self.loggers is None:
            return
        self.loggers.write(
            {
                "step": self.state.step,
                "event": "start",
                "time": time.time(),
                "world_size": self.topology.world_size,
                "grid": self.topology.grid,
                "zero_stage": self.engine.stage,
                "git_commit": source_commit(),
                "throughput/peak_tflops": self.peak.tflops,
                "throughput/peak_source": self.peak.source,
            }
        )

    def _end(self, reason: str) -> str:
        """Say how the run ended, in status.json too, by which a batch script decides whether to go on."""
        hooks.finish(self)
        if self.loggers is not None:
            write_status(
                Path(self.config.run.dir),
                "finished" if reason == "finished" else "stopped",
                reason=reason,
                step=self.state.step,
            )
            self.loggers.close()
        return reason
