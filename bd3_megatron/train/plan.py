"""What the run will do at each step, as arithmetic on the configuration: budget, phase, batch size, learning rate.

Decides: tokens (of the run, of a phase) are turned into steps once, with the batch size of each step (`config/budget.py`).
Every grid of the run must be able to cut each batch, which validation checks; so the plan is the same on all of them, and
the number of samples consumed before a step is a sum, not a memory. Noise strata are over consecutive groups of
global_batch_size samples, whatever a warming-up step takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from bd3_megatron.config.budget import batch_size_at, samples_before, steps_for_tokens
from bd3_megatron.config.curriculum import curriculum_of
from bd3_megatron.config.schema import Config
from bd3_megatron.diffusion.curriculum import Curriculum, PhaseOfStep
from bd3_megatron.diffusion.noise_level import Interval
from bd3_megatron.engine.lr_schedule import learning_rate


@dataclass(frozen=True)
class RunPlan:
    """The run as a function of the step.

    Args:
        config: the run.
        origin_step, origin_samples: where this attempt began: a resumed run counts on from the samples it had consumed,
            so that a changed batch size neither repeats nor skips a sample.
    """

    config: Config
    origin_step: int = 0
    origin_samples: int = 0

    @cached_property
    def total_steps(self) -> int:
        """Optimizer updates of the run."""
        train = self.config.train
        if train.steps is not None:
            return train.steps
        # Tokens that a resumed run has seen are paid, with whatever batch size it saw them.
        left = (train.tokens or 0) - self.origin_samples * self.config.data.seq_len
        return max(1, self.origin_step + self._steps_for(left, self.origin_step))

    def _steps_for(self, tokens: int, first_step: int) -> int:
        """Updates from `first_step` on that it takes to see at least `tokens` clean tokens."""
        return steps_for_tokens(self.config.train, self.config.data.seq_len, tokens, first_step)

    @cached_property
    def curriculum(self) -> Curriculum:
        """The phases; one where the configuration names none."""
        return curriculum_of(self.config, num_steps=self.total_steps)

    def phase_at(self, step: int) -> PhaseOfStep:
        """The phase of the update that leaves state `step`."""
        return self.curriculum.phase_at(step)

    def is_searched(self, step: int) -> bool:
        """Whether a search may choose the interval of that update: not where its phase names one."""
        phases = self.config.diffusion.phases
        return not phases or phases[self.phase_at(step).number].interval is None

    def interval(self, step: int, found: Mapping[int, tuple[float, float]]) -> Interval:
        """Noise interval of that update: the configured one, or what a search found for its block size.

        Args:
            step: updates made so far.
            found: block size -> searched interval.
        """
        phase = self.phase_at(step).phase
        return (
            Interval(*found[phase.block_size])
            if self.is_searched(step) and phase.block_size in found
            else phase.interval
        )

    def lr(self, step: int) -> float:
        """Learning rate of that update."""
        # A phase may scale the rate; the schedule itself runs over the whole run.
        return learning_rate(self.config.optim, step, self.total_steps) * self.phase_at(step).lr_factor

    def batch_size(self, step: int) -> int:
        """Samples of that update, over all ranks."""
        return batch_size_at(self.config.train, step)

    def samples_before(self, step: int) -> int:
        """Samples consumed by all updates before state `step`, which is not before the origin."""
        train = self.config.train
        # Relative to the origin: samples consumed before it are a fact, not a function of today's configuration.
        return self.origin_samples + samples_before(train, step) - samples_before(train, self.origin_step)
