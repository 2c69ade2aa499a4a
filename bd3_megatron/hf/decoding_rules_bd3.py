"""Decoding rules: which positions of a block are decided by which forward.

A planned rule fixes before the block's first forward which forward decides each position; a scored rule looks at every
undecided position's candidate and reveals the ones it trusts. Each rule states its exactness. No mask token survives.
Source: first-hitting, Zheng et al. 2024 (arXiv 2409.02908); low-confidence static and dynamic remasking as in SDAR and
Fast-dLLM (arXiv 2505.22618); entropy-bounded unmasking, Ben-Hamu et al. 2025 (arXiv 2505.24857).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .token_choice_bd3 import Choice


@dataclass(frozen=True)
class Wanted:
    """Rows of one forward that a rule wants candidates for; all tensors on the host."""

    rows_BR: Tensor
    """int64 [B, R]: positions inside the block; padding may name any position"""
    decides_BR: Tensor | None
    """bool [B, R]: rows that this forward decides; None = `reveal` says, after seeing the candidates"""
    is_active_B: Tensor | None
    """bool [B]: sequences that this forward serves; None = those with undecided positions"""


class BlockRule(Protocol):
    """The course of one block."""

    num_forwards: int | None
    """forwards until every position is decided; None = until none is undecided"""

    def wanted(self, forward: int) -> Wanted:
        """What the block's next forward (0, 1, ...) is for."""

    def reveal(self, forward: int, choice: Choice, undecided_BR: Tensor) -> Tensor:
        """bool [B, R]: which of the undecided candidates are decided now; at least one in every unfinished row."""


class DecodingRule(Protocol):
    """A way to fill blocks; `exactness` is the sentence users read."""

    @property
    def exactness(self) -> str:
        """Whether the text follows the model's own distribution, as a sentence."""

    def begin(self, is_masked_BS: Tensor, order_BS: Tensor) -> BlockRule:
        """Start a block.

        Args:
            is_masked_BS: bool on the host: positions to fill, at least one a row of the batch.
            order_BS: float64 in [0, 1) on the host: one uniform number a position.
        """


class PlannedBlock:
    """A block whose every position has its forward fixed beforehand."""

    # The output table is needed for the due rows only, and nothing on the device has to be waited for.

    num_forwards: int | None

    def __init__(self, step_BS: Tensor) -> None:
        """`step_BS` int64: the step that decides a position, -1 for known ones; steps that decide nothing cost nothing."""
        steps = sorted(set(step_BS[step_BS >= 0].tolist()))
        self.num_forwards = len(steps)
        self._wanted = [self._rows(step_BS == step) for step in steps]

    @staticmethod
    def _rows(is_due_BS: Tensor) -> Wanted:
        width = int(is_due_BS.sum(dim=1).max())
        rows_BR = torch.argsort(~is_due_BS, dim=1, stable=True)[:, :width]
        return Wanted(rows_BR, is_due_BS.gather(1, rows_BR), is_due_BS.any(dim=1))

    def wanted(self, forward: int) -> Wanted:
        return self._wanted[forward]

    def reveal(self, forward: int, choice: Choice, undecided_BR: Tensor) -> Tensor:
        raise RuntimeError("a planned block decides before its forwards, not after.")


# Exactness at a glance: first_hitting is exact (the limit of infinitely many steps); left_to_right is exact for another
# distribution; ancestral converges with the number of steps; the three scored rules are approximate.


@dataclass(frozen=True)
class FirstHitting:
    """One position a forward in random order: the exact limit of infinitely many time steps."""

    exactness: str = "exact: the text follows the model's own distribution (one token a forward)"

    def begin(self, is_masked_BS: Tensor, order_BS: Tensor) -> BlockRule:
        # known positions sort behind every draw in [0, 1)
        rank_BS = order_BS.masked_fill(~is_masked_BS, 2.0).argsort(dim=1, stable=True).argsort(dim=1)
        return PlannedBlock(rank_BS.masked_fill(~is_masked_BS, -1))


@dataclass(frozen=True)
class LeftToRight:
    """One position a forward in reading order."""

    exactness: str = "exact for the chain rule in reading order, which is another distribution than random order"

    def begin(self, is_masked_BS: Tensor, order_BS: Tensor) -> BlockRule:
        return PlannedBlock((is_masked_BS.cumsum(dim=1) - 1).masked_fill(~is_masked_BS, -1))


@dataclass(frozen=True)
class Ancestral:
    """T equal time steps from t = 1 to t = 0 of the reverse process with p(t) = t.

    A masked position is revealed in the step from t to s with probability (t - s)/t, so its step is uniform over the T
    of them; at s = 0 the probability is 1. The network does not see t: a step that reveals nothing needs no forward.
    """

    steps: int
    exactness: str = "exact as the number of steps grows; positions of one step are drawn independently"

    def begin(self, is_masked_BS: Tensor, order_BS: Tensor) -> BlockRule:
        # The law of t does not enter: given that a position is masked at t = 1, its step is uniform. The clamp guards a
        # draw whose product rounds up to `steps`.
        step_BS = (order_BS * self.steps).long().clamp(max=self.steps - 1)
        return PlannedBlock(step_BS.masked_fill(~is_masked_BS, -1))


def all_rows(is_masked_BS: Tensor) -> Tensor:
    """int64 [B, S]: every position of the block."""
    batch, size = is_masked_BS.shape
    return torch.arange(size).expand(batch, size)


class StaticTopKBlock:
    """A block filled in a fixed number of forwards, the most confident candidates first."""

    num_forwards: int | None

    def __init__(self, is_masked_BS: Tensor, steps: int) -> None:
        count_B = is_masked_BS.sum(dim=1)
        self._rows = all_rows(is_masked_BS)
        self.num_forwards = int(count_B.clamp(max=steps).max())
        # The same number each forward, the remainder in the first ones; a row with fewer positions needs fewer forwards.
        forward_F = torch.arange(self.num_forwards)
        own_B1 = count_B.clamp(max=steps)[:, None]
        quota_BF = count_B[:, None] // own_B1 + (forward_F < count_B[:, None] % own_B1).long()
        self._quota = quota_BF.masked_fill(forward_F >= own_B1, 0)

    def wanted(self, forward: int) -> Wanted:
        return Wanted(self._rows, None, self._quota[:, forward] > 0)

    def reveal(self, forward: int, choice: Choice, undecided_BR: Tensor) -> Tensor:
        # below every probability, so that decided rows never use up the quota
        confidence_BR = choice.confidence_BR.masked_fill(~undecided_BR, -1.0)
        quota_B1 = self._quota[:, forward, None].to(confidence_BR.device)
        return (ranks(confidence_BR) < quota_B1) & undecided_BR


@dataclass(frozen=True)
class StaticTopK:
    """T forwards a block; each reveals its share of the most confident candidates."""

    steps: int
    exactness: str = "approximate: confident candidates of one forward are drawn independently"

    def begin(self, is_masked_BS: Tensor, order_BS: Tensor) -> BlockRule:
        return StaticTopKBlock(is_masked_BS, self.steps)


class ThresholdBlock:
    """A block that reveals what it trusts, and at least its best candidates."""

    num_forwards: int | None = None

    def __init__(self, is_masked_BS: Tensor, threshold: float, at_least: int) -> None:
        self._rows, self._threshold, self._at_least = all_rows(is_masked_BS), threshold, at_least

    def wanted(self, forward: int) -> Wanted:
        return Wanted(self._rows, None, None)

    def reveal(self, forward: int, choice: Choice, undecided_BR: Tensor) -> Tensor:
        confidence_BR = choice.confidence_BR.masked_fill(~undecided_BR, -1.0)
        # at least the best ones: a threshold that nobody reaches must not loop for ever
        is_best_BR = ranks(confidence_BR) < self._at_least
        return (is_best_BR | (confidence_BR > self._threshold)) & undecided_BR


@dataclass(frozen=True)
class ConfidenceThreshold:
    """Every candidate whose probability exceeds the threshold, and at least `at_least` a forward."""

    threshold: float
    at_least: int = 1
    exactness: str = "approximate: candidates above the threshold are drawn independently"

    def begin(self, is_masked_BS: Tensor, order_BS: Tensor) -> BlockRule:
        return ThresholdBlock(is_masked_BS, self.threshold, self.at_least)


class EntropyBlock:
    """A block that reveals the most certain positions within a budget of entropy."""

    num_forwards: int | None = None

    def __init__(self, is_masked_BS: Tensor, bound_nats: float) -> None:
        self._rows, self._bound = all_rows(is_masked_BS), bound_nats

    def wanted(self, forward: int) -> Wanted:
        return Wanted(self._rows, None, None)

    def reveal(self, forward: int, choice: Choice, undecided_BR: Tensor) -> Tensor:
        entropy_BR = choice.entropy_BR.masked_fill(~undecided_BR, torch.inf)
        sorted_BR, order_BR = entropy_BR.sort(dim=1, stable=True)
        # The joint error of k positions is bounded by the sum of all entropies but the largest, the k-th: position k
        # may join while its predecessors sum to at most the bound; the first always may.
        before_BR = torch.cat([torch.zeros_like(sorted_BR[:, :1]), sorted_BR[:, :-1].cumsum(dim=1)], dim=1)
        fits_BR = before_BR <= self._bound
        return torch.zeros_like(undecided_BR).scatter(1, order_BR, fits_BR) & undecided_BR


@dataclass(frozen=True)
class EntropyBounded:
    """The most certain positions while the bound on their joint error holds, and at least one a forward."""

    bound_nats: float
    exactness: str = "approximate: the joint error of one forward is at most the bound, in nats"

    def begin(self, is_masked_BS: Tensor, order_BS: Tensor) -> BlockRule:
        return EntropyBlock(is_masked_BS, self.bound_nats)


def ranks(score_BR: Tensor) -> Tensor:
    """int64 [B, R]: 0 for the highest score of a row, 1 for the next; ties go to the earlier position."""
    return score_BR.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
