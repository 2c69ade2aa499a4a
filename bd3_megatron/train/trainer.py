"""The training loop: step, record, hooks, until the budget is used up or someone asks to stop.

Contract: step n is the state after n updates; a record of step n describes the update that led to it. What an update is
stands in `step.py`, what runs between updates in `hooks.py`; this file owns the order and the run's state.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bd3_megatron.checkpoint.describe import source_commit
from bd3_megatron.compat.device import peak_memory_bytes
from bd3_megatron.config.schema import Config
from bd3_megatron.cost.pairs import Pairs
from bd3_megatron.engine.zero_engine import ZeroEngine
from bd3_megatron.errors import NonFiniteError
from bd3_megatron.parallel.topology import Topology
from bd3_megatron.planner.peaks import PeakTflops
from bd3_megatron.process.status import write_status
from bd3_megatron.process.stop import StopRequest
from bd3_megatron.process.watchdog import Watchdog, straggler_metrics
from bd3_megatron.train.batches import StepBatches
from bd3_megatron.train.dataset import RunData
from bd3_megatron.train.document_pairs import step_pairs
from bd3_megatron.train.hooks import Hooks, StepInfo
from bd3_megatron.train.loggers import Loggers
from bd3_megatron.train.metrics import PendingLoads, PendingSums, StepSums, begin_loads
from bd3_megatron.train.plan import RunPlan
from bd3_megatron.train.spikes import is_spike, remember
from bd3_megatron.train.state import TrainState
from bd3_megatron.train.step import StepOutcome, TrainingStep
from bd3_megatron.train.throughput import figures
from bd3_megatron.train.timeline import Timeline, time_metrics


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """What a record needs of other ranks and of the device; reading it waits."""

    sums: PendingSums
    loads: PendingLoads
    times: dict[str, float]
    slowest: Callable[[], dict[str, float]]
    pairs: Callable[[], Pairs | None]


@dataclass(frozen=True)
class _Unread:
    """An update that was begun, and of which the host does not know yet what it did."""

    step: int
    samples_consumed: int
    outcome: StepOutcome
    facts: _Facts | None
    """None where no record is due."""


def read_lag(device_type: str, spike_factor: float) -> int:
    """So many steps late the host reads what an update did.

    Args:
        device_type: "cuda" or "cpu".
        spike_factor: train.spike_factor, 0 without a guard.
    """
    # the spike guard asks for the loss in the middle of a step, so there is nothing to gain behind it
    return 1 if device_type == "cuda" and spike_factor == 0 else 0


@dataclass(kw_only=True)
class Trainer:
    """A run on one rank, wired by `build.py`."""

    config: Config
    plan: RunPlan
    topology: Topology
    data: RunData
    engine: ZeroEngine
    state: TrainState
    hooks: Hooks
    stop: StopRequest
    watchdog: Watchdog
    peak: PeakTflops
    loggers: Loggers | None
    """On rank 0; None elsewhere."""
    timeline: Timeline
    kernels: Mapping[str, str]
    """What runs, by the kind of its work: attention, rows, optimizer, communication."""
    batches: StepBatches | None = None
    """What the steps read; None before the first."""
    training_step: TrainingStep = field(init=False)
    lag_steps: int = field(init=False)
    """Steps by which the host reads late what an update did: on a GPU one, so that the device has the next to work on."""
    _unread: deque[_Unread] = field(init=False, default_factory=deque)

    def __post_init__(self) -> None:
        self.lag_steps = read_lag(self.topology.device.type, self.config.train.spike_factor)
        self.training_step = TrainingStep(
            config=self.config, topology=self.topology, engine=self.engine, timeline=self.timeline
        )

    def run(self) -> str:
        """Train to the end of the budget.

        Returns:
            "finished", or why it stopped early: "signal", "file" or "deadline".
        """
        self._record_start()
        if self.state.step >= self.plan.total_steps:
            return self._end("finished")
        # A resumed run has evaluated this state before it stopped.
        if self.state.step == 0 and self.hooks.evaluates(self._info()):
            self.hooks.evaluate(self._info())
        # Around the loop only: the first evaluation compiles kernels and would look like a hang.
        with self.watchdog.watching(self.state.step):
            reason = self._loop()
        return self._end(reason)

    def _loop(self) -> str:
        self.batches = self._batches()
        # asked anew: going back to a checkpoint uses up samples, and so shortens a budget of tokens
        while self.state.step < self.plan.total_steps:
            self.stop.ask(self.topology.device)
            vetoed = self._step(self.batches)
            self._read(late=self.lag_steps)
            self.watchdog.step_done(self.state.step)
            # After every step, on all ranks alike: a signal reaches them at different times.
            reason = self.stop.agreed()
            if vetoed and self.config.train.spike_action == "rollback" and self._roll_back():
                self.batches = self._batches()
                continue
            # Also on the way out: the last state is saved before the run stops.
            self._between_steps(stopping=reason is not None)
            self.watchdog.alive(self.state.step)
            if reason is not None and self.state.step < self.plan.total_steps:
                return reason
        return "finished"

    def _read(self, *, late: int) -> None:
        """Take note of what updates did, all but the last `late` of them. Collective where one was left out."""
        while len(self._unread) > late:
            self._note(self._unread.popleft())

    def _batches(self) -> StepBatches:
        return StepBatches(
            self.data.train,
            self.plan,
            self.topology,
            first_step=self.state.step,
            mask_id=self.data.special.mask,
            num_workers=self.config.data.num_workers,
            saved=self.state.data,
            prepare=self.engine.model.context.prepare,
        )

    def _step(self, batches: StepBatches) -> bool:
        """Begin one update, and its record where one is due; True when the spike guard left the update out."""
        state = self.state
        outcome = self.training_step.run(
            self.plan, state, batches, veto=self._is_spike if self.config.train.spike_factor else None
        )
        state.step += 1
        state.block_size = outcome.phase.block_size
        # Also of an update that was left out: its batch is not met again.
        state.samples_consumed += outcome.num_samples
        is_due = state.step % self.config.log.every_steps == 0 or state.step == self.plan.total_steps
        facts = self._begin_record(outcome) if is_due else None
        self._unread.append(_Unread(state.step, state.samples_consumed, outcome, facts))
        return outcome.result.vetoed

    def _note(self, unread: _Unread) -> None:
        """What an update did goes into the run's state and the record."""
        state, is_applied = self.state, unread.outcome.result.applied
        # the update's loss is that of the weights it started from
        state.finite_step = unread.step - 1 if is_applied else state.finite_step
        state.skipped_steps += not is_applied
        state.skipped_in_a_row = 0 if is_applied else state.skipped_in_a_row + 1
        # An update that was left out stands in the record whatever the log interval is.
        if unread.facts is not None or not is_applied:
            self._record_step(unread, unread.facts or self._begin_record(unread.outcome))
        if self.loggers is not None:
            self.loggers.console.advance()
            if not is_applied:
                self.loggers.console.say(f"bd3: update {unread.step} was left out, {state.skipped_in_a_row} in a row")
        self._refuse_to_learn_nothing(unread.step)

    def _refuse_to_learn_nothing(self, step: int) -> None:
        """Stop where too many updates in a row up to `step`, or all of the run, were left out. Collective where it does.

        Raises:
            NonFiniteError: on every rank.
        """
        state, limit = self.state, self.config.train.max_skipped_steps
        is_over = step == self.plan.total_steps and state.skipped_steps == step
        if state.skipped_in_a_row < limit and not is_over:
            return
        found = self.hooks.finite_checkpoint(state)
        remedy = (
            "no checkpoint is known to give a finite loss, so begin in a new run.dir"
            if found is None
            else f"{found.name} is the newest checkpoint known to give a finite loss: to go on from it, remove later ones"
        )
        raise NonFiniteError(
            f"the last {state.skipped_in_a_row} updates, up to step {step}, were left out, since loss or gradients were "
            f"not finite or far too large: the run learns nothing; lower optim.lr or look at the data, and then: {remedy}."
        )

    def _is_spike(self, loss: float) -> bool:
        # the loss is global, so every rank comes to the same answer
        if is_spike(loss, self.state.recent_losses, self.config.train.spike_factor):
            return True
        # Only normal losses: a plateau of spikes must not become the measure.
        remember(self.state.recent_losses, loss)
        return False

    def _info(self, *, stopping: bool = False) -> StepInfo:
        step = self.state.step
        next_size = self.plan.phase_at(step).phase.block_size
        return StepInfo(
            step=step,
            trained_block_size=self.state.block_size or next_size,
            next_block_size=next_size,
            is_searched=self.plan.is_searched(step),
            is_last=step == self.plan.total_steps,
            is_stopping=stopping,
        )

    def _between_steps(self, *, stopping: bool) -> None:
        """Whatever is due at the state just reached; a found interval is in the state before it is saved."""
        info = self._info(stopping=stopping)
        if self.hooks.evaluates(info) or self.hooks.searches(info) or self.hooks.saves(info):
            # hooks see a state that knows all of its updates
            self._read(late=0)
        if self.hooks.evaluates(info):
            self.hooks.evaluate(info)
        if self.hooks.searches(info):
            found = self.hooks.search(info)
            # Before the save below, so that a resumed run draws from the interval that this one would have.
            self.state.intervals[info.next_block_size] = (found.beta, found.omega)
        if self.hooks.saves(info):
            if self.batches is not None:
                self.state.data = self.batches.data_state()
            self.hooks.save(self.state)

    def _roll_back(self) -> bool:
        """Go back to the newest checkpoint; False where the batch stays skipped instead."""
        after = self.hooks.roll_back(self.state)
        if after is None:
            return False
        self.state = after
        self.plan = replace(self.plan, origin_step=after.step, origin_samples=after.samples_consumed)
        return True

    def _begin_record(self, outcome: StepOutcome) -> _Facts:
        """What a record needs of other ranks and of the device, on its way. Collective."""
        times = time_metrics(self.timeline.finished())
        return _Facts(
            sums=outcome.begin_sums(),
            loads=begin_loads(outcome.result.loads, self.topology, self.config.model),
            times=times,
            slowest=straggler_metrics(times, self.topology.device),
            pairs=step_pairs(
                self.config, outcome.batch.micro_batches, self.topology, block_size=outcome.phase.block_size
            ),
        )

    def _record_step(self, unread: _Unread, facts: _Facts) -> None:
        if self.loggers is None:
            return
        outcome, sums = unread.outcome, facts.sums.read()
        times = facts.times | facts.slowest()
        record = (
            self._step_record(unread, sums)
            | facts.loads.metrics()
            | self._speed(outcome, sums, times, facts.pairs())
            | times
        )
        if not outcome.result.applied:
            record["event"] = "loss_spike" if outcome.result.vetoed else "not_finite"
        self.loggers.write(record)

    def _step_record(self, unread: _Unread, sums: StepSums) -> dict[str, Any]:
        outcome = unread.outcome
        return {
            "step": unread.step,
            "tokens": unread.samples_consumed * self.config.data.seq_len,
            **sums.metrics(),
            "optim/lr": outcome.lr,
            "optim/grad_norm": outcome.result.grad_norm,
            "optim/skipped_steps": self.state.skipped_steps,
            "noise/interval_beta": outcome.interval.beta,
            "noise/interval_omega": outcome.interval.omega,
            "noise/block_size": outcome.phase.block_size,
            "noise/views": self.engine.model.layout.views,
            "time": time.time(),
            "memory/peak_bytes": peak_memory_bytes(self.topology.device),
        }

    def _speed(
        self, outcome: StepOutcome, sums: StepSums, times: dict[str, float], pairs: Pairs | None
    ) -> dict[str, Any]:
        """Throughput entries; none while a GPU has not yet passed the events that time the step."""
        if "time/step_seconds" not in times:
            return {}
        return figures(
            self.config,
            times["time/step_and_pause_seconds"],
            sums.masked_fraction,
            self.topology.world_size,
            self.peak,
            sequences=outcome.num_samples,
            block_size=outcome.phase.block_size,
            interval=(outcome.interval.beta, outcome.interval.omega),
            axes=outcome.phase.axes,
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
                "kernels": dict(self.kernels),
                "throughput/peak_tflops": self.peak.tflops,
                "throughput/peak_source": self.peak.source,
            }
        )

    def _end(self, reason: str) -> str:
        """Say how the run ended, in status.json too, by which a batch script decides whether to go on."""
        # The last save may be in flight; the status says finished only when it is published.
        self.hooks.saver.finish()
        if self.loggers is not None:
            write_status(
                Path(self.config.run.dir),
                "finished" if reason == "finished" else "stopped",
                reason=reason,
                step=self.state.step,
            )
            self.loggers.close()
        return reason
