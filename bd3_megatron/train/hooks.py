"""What runs between steps, on all ranks alike: evaluation, interval search, saving, going back after a loss spike.

Contract: a hook is handed a `StepInfo` and returns what it found; only the trainer changes the run's state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from bd3_megatron.checkpoint.layout import MANIFEST, checkpoint_folders, step_of
from bd3_megatron.checkpoint.load import load
from bd3_megatron.checkpoint.save import Saver
from bd3_megatron.checkpoint.verify import newest_valid
from bd3_megatron.config.schema import Config
from bd3_megatron.data.loader import TokenDataset
from bd3_megatron.diffusion.axes import BD3_LM
from bd3_megatron.diffusion.noise_level import Interval
from bd3_megatron.engine.zero_engine import ZeroEngine
from bd3_megatron.evaluate.in_loop import evaluate_on_grid
from bd3_megatron.evaluate.perplexity import Estimate
from bd3_megatron.parallel.topology import Topology
from bd3_megatron.train.dataset import RunData
from bd3_megatron.train.loggers import Loggers
from bd3_megatron.train.search import search_interval
from bd3_megatron.train.state import TrainState
from bd3_megatron.train.timeline import Timeline


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """The state just reached, as hooks see it."""

    step: int
    """Optimizer updates made."""
    # at the seam of two phases they differ: what was learned is measured, what will be learned is searched
    trained_block_size: int
    """S of the update that led to the state, as exports have it; before the first update, S of that one."""
    next_block_size: int
    """S of the next update (of the last one at the end of the run)."""
    is_searched: bool
    """A search may choose the noise interval of the next update."""
    is_last: bool
    is_stopping: bool


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """The hooks of one run on one rank."""

    config: Config
    topology: Topology
    data: RunData
    engine: ZeroEngine
    saver: Saver
    timeline: Timeline
    loggers: Loggers | None
    """On rank 0; None elsewhere."""

    def evaluates(self, info: StepInfo) -> bool:
        """Whether an evaluation is due."""
        evaluate = self.config.evaluate
        at_edge = evaluate.at_start_and_end and (info.is_last or info.step == 0)
        return at_edge or (info.step > 0 and _is_due(info.step, evaluate.every_steps))

    def searches(self, info: StepInfo) -> bool:
        """Whether a search for the noise interval is due."""
        diffusion = self.config.diffusion
        return (
            # After the last update there is no batch left that a new interval could serve.
            not info.is_last and _is_due(info.step, diffusion.search_every_steps) and info.is_searched
        )

    def saves(self, info: StepInfo) -> bool:
        """Whether a checkpoint is due."""
        return info.is_last or info.is_stopping or _is_due(info.step, self.config.checkpoint.every_steps)

    def evaluate(self, info: StepInfo) -> None:
        """Held-out perplexity with the averaged weights, of each part of a mixture too, as a record of the current step.
        Collective."""
        # a run without held-out rows that asks for an evaluation or a search is refused when its data is opened
        assert self.data.valid is not None
        # Between two steps: counted as a pause, not in the throughput.
        with self.timeline.span("evaluation"):
            estimate = self._estimate(self.data.valid, info)
            by_source = {
                # the run's own held-out split may be a part's: it is scored once
                name: estimate if rows is self.data.valid else self._estimate(rows, info)
                for name, rows in self.data.by_source.rows.items()
            }
        if self.loggers is not None:
            record = {"step": info.step, **estimate.metrics()}
            for name, found in by_source.items():
                record |= found.metrics(name)
            self.loggers.write(record)

    def _estimate(self, rows: TokenDataset, info: StepInfo) -> Estimate:
        return evaluate_on_grid(
            self.engine,
            self.topology,
            rows,
            self.config,
            self.data.convention,
            block_size=info.trained_block_size,
        )

    def search(self, info: StepInfo) -> Interval:
        """The noise interval of least variance for the next update's block size. Collective."""
        assert self.data.valid is not None
        # one noisy copy is what the search scores; the next step takes the training rows up again
        self.engine.model.enter_phase(info.next_block_size, views=1, axes=BD3_LM)
        with self.timeline.span("evaluation"):
            choice = search_interval(
                self.engine,
                self.topology,
                self.data.valid,
                self.config,
                block_size=info.next_block_size,
                step=info.step,
            )
        if self.loggers is not None:
            self.loggers.write({"step": info.step, **choice.metrics()})
        return choice.interval

    def save(self, state: TrainState) -> None:
        """Save the state, published whole. Collective."""
        with self.timeline.span("checkpoint"):
            self.saver.save(
                step=state.step,
                # The data order goes on behind the spike; everything else is the checkpoint's.
                samples_consumed=state.samples_consumed,
                config=self.config,
                train_state=state.to_json(),
                finite_step=state.finite_step,
                evaluation=self.data.convention.to_json(),
            )

    def finite_checkpoint(self, state: TrainState) -> Path | None:
        """The newest checkpoint whose weights gave a finite loss; None where none is left. Waits for a save. Collective."""
        self.saver.finish()
        # Not verified here: the name only goes into the sentence that ends the run.
        there = checkpoint_folders(Path(self.config.run.dir) / "checkpoints")
        return next((path for path in there if (step_of(path.name) or 0) <= state.finite_step), None)

    def roll_back(self, state: TrainState) -> TrainState | None:
        """Load the newest checkpoint after a loss spike; the run goes on behind the data it has seen. Collective.

        Args:
            state: of the run now; not changed.

        Returns:
            The state to go on from; None where there is no checkpoint, or the run came back to it before: then the batch
            stays skipped.
        """
        self.saver.finish()
        found = newest_valid(Path(self.config.run.dir) / "checkpoints")
        # A second time from the same checkpoint, the run could circle.
        if found is None or found[1].step == state.rolled_back_to:
            return None
        loaded = TrainState.from_json(load(self.engine, found[0]).train_state, str(found[0] / MANIFEST))
        after = replace(
            loaded,
            samples_consumed=state.samples_consumed,
            # The plan counts on from here: samples behind the spike are consumed, steps are not.
            origin_step=loaded.step,
            origin_samples=state.samples_consumed,
            skipped_steps=state.skipped_steps,
            skipped_in_a_row=state.skipped_in_a_row,
            rolled_back_to=loaded.step,
            wandb_id=state.wandb_id,
        )
        if self.loggers is not None:
            # Steps that will be made again must stand in the record once.
            self.loggers.cut(after.step)
            self.loggers.write(
                {
                    "step": after.step,
                    "event": "rollback",
                    "from_step": state.step,
                    "samples_consumed": state.samples_consumed,
                }
            )
        return after


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
