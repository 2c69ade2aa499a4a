"""Curriculum: phases of a run, each with its length, block size, noise interval and learning-rate segment.

Contract: step n is the state after n optimizer updates, and the update that leaves state n belongs to the phase that
holds n: phases are half-open, [first, first + length).
Refuses: an open phase before the last, phases that end before the run does, block sizes that do not divide the sequence.
Source: BD3-LM (arXiv 2503.09573), two-phase training; LLaDA 2.0 (warm-up, stable, decay over block sizes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from bd3_megatron.diffusion.axes import BD3_LM, ObjectiveAxes
from bd3_megatron.diffusion.noise_level import Interval
from bd3_megatron.errors import ConfigError, RangeError, check_divides, counted


@dataclass(frozen=True)
class LrSegment:
    """The factor on the run's learning rate during one phase.

    Raises:
        ConfigError: a negative factor or warm-up.
    """

    start: float = 1.0
    """Factor at the phase's first update, after warm-up."""
    end: float = 1.0
    """Factor the phase tends to at its end."""
    shape: Literal["linear", "cosine"] = "linear"
    """How the factor goes from start to end."""
    warmup_steps: int = 0
    """Updates at the beginning of the phase over which the factor rises linearly: update k of w gets k / w of it."""

    def __post_init__(self) -> None:
        if min(self.start, self.end, self.warmup_steps) < 0:
            raise ConfigError(
                f"lr segment start={self.start:g} end={self.end:g} warmup_steps={self.warmup_steps} has a negative "
                f"number; use 0 or more."
            )

    def factor(self, step: int, num_steps: int) -> float:
        """The factor of the update that leaves the phase's state `step`, 0 <= step < num_steps."""
        # num_steps, not num_steps - 1: `end` is approached and belongs to the state after the phase.
        progress = step / num_steps
        if self.shape == "cosine":
            progress = (1.0 - math.cos(math.pi * progress)) / 2.0
        # step + 1, so that the first update of a warm-up is not lost at a rate of zero.
        warmth = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return warmth * (self.start + (self.end - self.start) * progress)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of a curriculum.

    Raises:
        ConfigError: a length or block size below 1.
    """

    block_size: int
    """Diffusion block S of the phase."""
    steps: int | None = None
    """Length in optimizer steps; None: open, to the end of the run."""
    interval: Interval = Interval()
    """Noise levels are drawn from it."""
    axes: ObjectiveAxes = BD3_LM
    """What else the objective decides in the phase."""
    lr: LrSegment = LrSegment()
    """Learning-rate factor over the phase."""

    def __post_init__(self) -> None:
        for name, number in (("block_size", self.block_size), ("steps", self.steps)):
            if number is not None and number < 1:
                raise ConfigError(f"A phase has {name}={number}; use 1 or more.")


@dataclass(frozen=True)
class PhaseOfStep:
    """The phase of one optimizer update, and how far into it the update is."""

    number: int
    """Of the phase, from 0."""
    phase: Phase
    first_step: int
    """Of the phase."""
    num_steps: int
    """Of the phase, cut at the end of the run if it is open."""
    step: int
    """Since the phase's first, in [0, num_steps)."""

    @property
    def lr_factor(self) -> float:
        return self.phase.lr.factor(self.step, self.num_steps)


@dataclass(frozen=True)
class Curriculum:
    """The phases of a run of known length.

    Raises:
        ConfigError: no phases, an open phase before the last, phases that end before the run, a block size that does
            not divide seq_len.
    """

    phases: tuple[Phase, ...]
    total_steps: int
    """Of the run; >= 1."""
    seq_len: int
    """L, clean tokens of a sample."""

    def __post_init__(self) -> None:
        if not self.phases or self.total_steps < 1:
            raise ConfigError(
                f"A curriculum of {counted(len(self.phases), 'phase')} and {counted(self.total_steps, 'step')} is empty; "
                "give one of each."
            )
        # Checked for every phase at the start: a run must not fail at a seam after days.
        for phase in self.phases:
            check_divides("block_size", phase.block_size, "seq_len", self.seq_len)
        lengths = self._lengths()
        # Nothing could come after an open phase, so its position among the others is a mistake.
        if None in lengths[:-1]:
            raise ConfigError(f"Phase {lengths.index(None)} has no length; only the last phase may be open.")
        # A run may stop before its last phase, but a step without a phase would have no block size.
        if lengths[-1] is not None and self.seams()[-1] + lengths[-1] < self.total_steps:
            raise ConfigError(
                f"The phases end at step {self.seams()[-1] + lengths[-1]} but the run has {counted(self.total_steps, 'step')}; "
                f"shorten the run or leave the last phase's length out."
            )

    def seams(self) -> tuple[int, ...]:
        """The first step of every phase; some may lie beyond the end of the run."""
        # Recomputed at each call and never stored: resuming at a seam asks the same question and gets the same answer.
        firsts = [0]
        for length in self._lengths()[:-1]:
            firsts.append(firsts[-1] + (length or 0))
        return tuple(firsts)

    def phase_at(self, step: int) -> PhaseOfStep:
        """The phase of the update that leaves state `step`; of the final state, the phase that led to it.

        Args:
            step: in [0, total_steps].

        Returns:
            The phase with the step's offset in it.

        Raises:
            RangeError: step outside the run.
        """
        if not 0 <= step <= self.total_steps:
            raise RangeError(f"step={step} is outside the run's [0, {self.total_steps}]; ask for a step inside it.")
        # The final state belongs to no update; evaluation of it uses the phase that led there.
        step = min(step, self.total_steps - 1)
        firsts = self.seams()
        number = max(n for n, first in enumerate(firsts) if first <= step)
        length = self._lengths()[number]
        return PhaseOfStep(
            number=number,
            phase=self.phases[number],
            first_step=firsts[number],
            # An open phase ends with the run, so its learning-rate segment still has an end.
            num_steps=self.total_steps - firsts[number] if length is None else length,
            step=step - firsts[number],
        )

    def trained_block_size(self, step: int) -> int:
        """Block size of the update that led to state `step`; of state 0, which none led to, that of the first update."""
        return self.phase_at(max(0, step - 1)).phase.block_size

    def _lengths(self) -> list[int | None]:
        return [phase.steps for phase in self.phases]
