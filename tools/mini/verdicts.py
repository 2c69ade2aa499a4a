"""What the miniature may conclude: each ordering of the paper, the difference that was measured, and a plain verdict.

Decides: an ordering is reproduced when the difference points the paper's way by more than two standard errors (paired over
sequences, averaged over seeds) and in every seed; contradicted when it points the other way by as much; otherwise it is
undecided. Two models are equal within EQUAL_NATS. Nothing is called reproduced that was not measured.
Source of the paper's numbers: BD3-LM (arXiv 2503.09573), tables 1, 2, 3 and 8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from bd3_megatron.evaluate.perplexity import SequenceScores, paired_difference

# Some 95 % for one claim; the requirement that every seed agrees is on top.
ERRORS_NEEDED = 2.0
EQUAL_NATS = 0.03
"""Models are equal when they differ by no more than this per token, and are known that well (3 % in perplexity)."""


@dataclass(frozen=True)
class Claim:
    """`worse` has the higher perplexity in the paper (or, with `is_equal`, the same)."""

    better: str
    worse: str
    paper: str
    is_equal: bool = False


CLAIMS = (
    Claim("ar", "s4", "AR below S = 4 (LM1B: 22.83 and 28.23)"),
    Claim("s4", "s8", "S = 4 below S = 8 (28.23 and 29.83)"),
    Claim("s8", "s16", "S = 8 below S = 16 (29.83 and 30.60)"),
    Claim("s16", "mdlm", "S = 16 below MDLM (30.60 and 31.78)"),
    Claim("s4", "mdlm", "S = 4 below MDLM (28.23 and 31.78)"),
    Claim("ar", "s1", "S = 1 with full masking equals AR (22.88 and 22.88)", is_equal=True),
    Claim("s1", "s1_uniform", "S = 1: full masking below t in [0, 1] (22.88 and 25.56)"),
    Claim("s4", "s4_uniform", "S = 4: clipped noise below t in [0, 1] (29.21 and 30.18)"),
    Claim("s16", "s16_uniform", "S = 16: clipped noise below t in [0, 1] (31.12 and 31.72)"),
)


@dataclass(frozen=True)
class ClaimVerdict:
    """A claim, measured."""

    claim: Claim
    difference_nats: float
    """Per token: `worse` minus `better`."""
    stderr_nats: float
    by_seed: tuple[float, ...]

    @property
    def word(self) -> str:
        """reproduced, not reproduced, or undecided."""
        size, limit = self.difference_nats, ERRORS_NEEDED * self.stderr_nats
        if self.claim.is_equal:
            # Surely further apart than equal models may be.
            if abs(size) - limit > EQUAL_NATS:
                return "not reproduced"
            return "reproduced" if max(abs(size), limit) <= EQUAL_NATS else "undecided"
        # One seed that points the other way leaves it undecided.
        if size > limit and min(self.by_seed) > 0:
            return "reproduced"
        return "not reproduced (the other way round)" if size < -limit else "undecided"

    def cells(self) -> tuple[str, ...]:
        """Ordering of the paper, difference in nats, in perplexity, verdict."""
        ratio = math.exp(self.difference_nats) - 1
        return (
            self.claim.paper,
            f"{self.difference_nats:+.4f} +- {self.stderr_nats:.4f}",
            f"{ratio:+.1%}",
            self.word,
        )


def verdicts(scores: Mapping[tuple[str, int], SequenceScores], seeds: Sequence[int]) -> list[ClaimVerdict]:
    """All claims whose models were trained.

    Args:
        scores: by (variant, seed).
        seeds: trained.
    """
    trained = {name for name, _ in scores}
    return [_verdict(claim, scores, seeds) for claim in CLAIMS if {claim.better, claim.worse} <= trained]


def _verdict(claim: Claim, scores: Mapping[tuple[str, int], SequenceScores], seeds: Sequence[int]) -> ClaimVerdict:
    by_seed = [paired_difference(scores[claim.worse, seed], scores[claim.better, seed])[0] for seed in seeds]
    better, worse = (_mean([scores[name, seed] for seed in seeds]) for name in (claim.better, claim.worse))
    mean, error = paired_difference(worse, better)
    # Between seeds; the error over sequences does not know that training itself is random.
    spread = torch.tensor(by_seed).std().item() / math.sqrt(len(seeds)) if len(seeds) > 1 else 0.0
    return ClaimVerdict(claim, mean, math.hypot(error or 0.0, spread), tuple(by_seed))


def _mean(scores: Sequence[SequenceScores]) -> SequenceScores:
    return SequenceScores(torch.stack([one.score_N for one in scores]).mean(dim=0), scores[0].count_N)
