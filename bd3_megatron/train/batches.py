"""From step number to this rank's micro-batches: clean rows, their noise, and the rows this rank holds.

Decides: everything is a function of (seed, samples consumed), so resuming needs one integer and no rank waits for
another. (Streams and mixtures remember a little more, see `dataset`.) Clean rows are read ahead by the loader's processes;
noise is drawn on the CPU, one step ahead, by a thread of this process.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from bd3_megatron.attention.select import Prepare
from bd3_megatron.attention.visibility import Visibility
from bd3_megatron.compat.device import use_device
from bd3_megatron.config.schema import DiffusionConfig
from bd3_megatron.data.batch import CleanBatch
from bd3_megatron.data.sampler import BatchShare
from bd3_megatron.diffusion.axes import BD3_LM, ObjectiveAxes
from bd3_megatron.diffusion.corrupt import NoisyBatch, corrupt
from bd3_megatron.diffusion.noise_level import Interval, noise_levels
from bd3_megatron.diffusion.noise_schedule import noise_schedule
from bd3_megatron.model.pair_batch import PairBatch, loss_rows, pair_rows
from bd3_megatron.parallel.pair_split import PairLayout
from bd3_megatron.parallel.topology import Topology
from bd3_megatron.rng import Purpose, generator_seed
from bd3_megatron.train.dataset import DataState, TrainingRows, merged_state
from bd3_megatron.train.plan import RunPlan


@dataclass(frozen=True, kw_only=True)
class Noise:
    """How samples are corrupted in one phase."""

    seed: int
    mask_id: int
    # Levels are stratified over these samples, which keeps the variance of a step's loss low.
    group_size: int
    """Samples that share noise strata: the global batch."""
    block_size: int
    interval: Interval
    axes: ObjectiveAxes = BD3_LM
    is_complement: bool = False
    """The second view of a complementary pair."""

    def of_view(self, view: int) -> Noise:
        """The noise of one of several noisy copies; that of view 0 is the noise of a run without views."""
        if self.axes.pairing == "complementary" and view % 2:
            return replace(self.of_view(view - 1), is_complement=True)
        # View 0 keeps the run's seed: switching views on changes nothing about the first copy.
        return self if view == 0 else replace(self, seed=generator_seed(self.seed, Purpose.VIEW, f"view {view}"))

    def corrupt(self, clean: CleanBatch, config: DiffusionConfig) -> NoisyBatch:
        """The noisy copy of some samples; equal wherever it is computed."""
        num_blocks = clean.tokens_BL.shape[1] // self.block_size
        t_BK = noise_levels(
            self.seed,
            clean.index_B,
            num_blocks=num_blocks,
            interval=self.interval,
            group_size=self.group_size,
            blocks_per_level=self.axes.blocks_per_level(num_blocks),
        )
        return corrupt(
            clean.tokens_BL,
            t_BK,
            index_B=clean.index_B,
            seed=self.seed,
            mask_id=self.mask_id,
            schedule=noise_schedule(config.noise_schedule),
            resample_to=self.interval if config.resample else None,
            never_mask_first=config.never_mask_first,
            is_padding_BL=clean.is_padding_BL,
            is_supervised_BL=clean.is_supervised_BL,
            document_id_BL=clean.document_id_BL,
            axes=self.axes,
            is_complement=self.is_complement,
        )


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of one step."""

    micro_batches: list[PairBatch]
    """On the training device."""
    token_count: int
    """This data-parallel rank's share of the loss's denominator; equal on its tp, pp and cp ranks."""
    masked_count: int
    """Rows that carry loss."""
    text_count: int
    """Rows that could carry loss if everything were masked."""


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch: this rank's rows, and the counts of its whole sequences."""

    pair: PairBatch
    token_count: int
    """Tokens in the loss's denominator."""
    masked_count: int
    """Rows with loss."""
    text_count: int
    """Rows that could carry loss if everything were masked."""


def make_micro_batch(clean: CleanBatch, noise: Noise, config: DiffusionConfig, layout: PairLayout) -> MicroBatch:
    """The micro-batch of some sequences in the phase that `layout` is of."""
    copies = layout.objective.copies(lambda view: noise.of_view(view).corrupt(clean, config))
    # Counted on whole sequences, before the rows are cut: every rank of a replica gets the same number.
    rows = loss_rows(clean, copies, layout)
    return MicroBatch(
        pair_rows(clean, copies, rows, layout),
        token_count=layout.objective.token_count(rows, copies),
        masked_count=sum(int(stream.has_loss_BL.sum()) for stream in rows),
        text_count=layout.objective.text_count(rows, copies),
    )


def no_tables(visibility: Visibility, device: torch.device) -> None:
    """Leaves the tables to whoever first needs them."""


@dataclass(frozen=True)
class _Drawing:
    """What a step's micro-batches are a function of, beside their clean rows."""

    step: int
    layout: PairLayout
    interval: Interval


@dataclass(frozen=True)
class _ReadStep:
    """A step's clean rows, and what must be remembered of the data once they are used up."""

    clean: list[CleanBatch]
    data_state: dict[str, Any]


class _Ahead(threading.Thread):
    """Reads and draws the next step while the present one runs; the result, or what went wrong, is taken once."""

    def __init__(self, batches: StepBatches, drawing: _Drawing) -> None:
        # a daemon, so that a rank that fails does not wait for rows that nobody will read
        super().__init__(name="next step", daemon=True)
        self.drawing = drawing
        self._batches = batches
        self._read: _ReadStep | None = None
        self._drawn: StepBatch | None = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._read = self._batches.read(self.drawing.step)
            self._drawn = self._batches.draw(self._read, self.drawing)
        # whatever it is, the training thread raises it where the batch is asked for
        except BaseException as error:
            self._error = error

    def result(self) -> tuple[_ReadStep, StepBatch]:
        """Wait for the end."""
        self.join()
        if self._error is not None:
            raise self._error
        if self._read is None or self._drawn is None:
            raise RuntimeError("the thread that draws the next step ended without a result")
        return self._read, self._drawn


class StepBatches:
    """Iterates over this rank's part of the steps from `first_step` on."""

    def __init__(
        self,
        rows: TrainingRows,
        plan: RunPlan,
        topology: Topology,
        *,
        first_step: int,
        mask_id: int,
        num_workers: int,
        saved: DataState | None = None,
        prepare: Prepare = no_tables,
    ) -> None:
        """Begin to read.

        Args:
            rows: where clean rows come from.
            plan: of this attempt.
            topology: this rank's coordinates in the grid.
            first_step: updates made so far.
            mask_id: of the tokenizer.
            num_workers: loader processes.
            saved: `data_state` of the run so far; None: it has none.
            prepare: makes the tables of every micro-batch, which then travel with it.
        """
        self._plan, self._topology, self._mask_id, self._prepare = plan, topology, mask_id, prepare
        self._reading = rows.read(
            plan,
            # A function and not an iterator: every process of a stream's loader walks the indices by itself.
            lambda: self._indices(first_step),
            workers=num_workers,
            saved=saved,
        )
        self._used = self._reading.state()
        self._ahead: _Ahead | None = None

    def data_state(self) -> dict[str, Any]:
        """What must be remembered of the data after the last step that was asked for. Collective over dp with a stream."""
        mine = self._used
        # Of the state only the positions of the stream shards differ between ranks.
        if "shards" not in mine or self._topology.dp == 1:
            return mine
        states: list[Any] = [None] * self._topology.dp
        dist.all_gather_object(states, mine, group=self._topology.groups.dp)
        return merged_state(states)

    def _indices(self, first_step: int) -> Iterator[torch.Tensor]:
        for step in range(first_step, self._plan.total_steps):
            # The plan knows each step's batch size, which grows during a batch warm-up.
            yield from self._share(step).step(self._plan.samples_before(step))

    def _share(self, step: int) -> BatchShare:
        return BatchShare(
            global_batch_size=self._plan.batch_size(step),
            micro_batch_size=self._plan.config.train.micro_batch_size,
            dp=self._topology.dp,
            dp_rank=self._topology.dp_rank,
        )

    def next(self, step: int, layout: PairLayout, interval: Interval) -> StepBatch:
        """The micro-batches of `step`; steps must be asked for in order.

        Args:
            step: updates made so far.
            layout: this rank's rows in the step's phase.
            interval: noise interval in force.
        """
        drawing = _Drawing(step, layout, interval)
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            read = self.read(step)
            drawn = self.draw(read, drawing)
        else:
            read, drawn = ahead.result()
            # a search between the steps may have moved the interval: the rows stay, their noise is drawn anew
            drawn = drawn if ahead.drawing == drawing else self.draw(read, drawing)
        self._used = read.data_state
        return drawn

    def draw_ahead(self, step: int, layout: PairLayout, interval: Interval) -> None:
        """Begin with the step after the last one asked for, under the assumption that its arguments will be these."""
        if step < self._plan.total_steps:
            self._ahead = _Ahead(self, _Drawing(step, layout, interval))

    def read(self, step: int) -> _ReadStep:
        """The clean rows of the next step."""
        clean = [next(self._reading.batches) for _ in range(self._share(step).num_micro_batches)]
        return _ReadStep(clean, self._reading.state())

    def draw(self, read: _ReadStep, drawing: _Drawing) -> StepBatch:
        """The micro-batches of some clean rows, on their way to the training device."""
        config, device = self._plan.config, self._topology.device
        use_device(device)
        noise = Noise(
            seed=config.run.seed,
            mask_id=self._mask_id,
            # The final batch size also while the batch still grows: strata are over sample ids, not over steps.
            group_size=config.train.global_batch_size,
            block_size=drawing.layout.block_size,
            interval=drawing.interval,
            axes=drawing.layout.objective.axes,
        )
        made = [make_micro_batch(clean, noise, config.diffusion, drawing.layout) for clean in read.clean]
        for one in made:
            self._prepare(one.pair.visibility, device)
        return StepBatch(
            [one.pair.to(device) for one in made],
            token_count=sum(one.token_count for one in made),
            masked_count=sum(one.masked_count for one in made),
            text_count=sum(one.text_count for one in made),
        )
