"""Perplexity with two standard errors: the pure part, shared by the training grid and exported folders.

    nll = sum of scores / sum of counted tokens           a sequence's score is the mean over its draws
    stderr_noise   how the result would vary with other noise on the same text: from the spread between replicates
    stderr_text    how it would vary with other text (and other noise): from the spread between sequences
Perplexity is exp(nll); a bound gives a bound. Refuses empty requests. Knows nothing of models, grids or devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bd3_megatron.data.batch import CleanBatch
from bd3_megatron.data.convention import EvaluationConvention
from bd3_megatron.errors import RangeError
from bd3_megatron.evaluate.noise_plan import EVALUATION_SEED, NoisePlan, noise_plan
from bd3_megatron.evaluate.tables import SOURCE_PREFIX

PROBE_SEQUENCES = 64
"""Sequences drawn a second time when one draw was asked for."""


class HeldOut(Protocol):
    """The text that is scored; `TokenDataset` with shuffle=False is one."""

    @property
    def num_rows(self) -> int: ...

    def batch_for(self, index_B: Tensor) -> CleanBatch: ...


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """What an evaluation is asked for, whatever runs it."""

    convention: EvaluationConvention = EvaluationConvention()
    """Which tokens are counted, and the smallest noise level; the rows come cut."""
    num_sequences: int | None = None
    """Sequences scored, evenly spaced over the split; None: all."""
    draws: int = 1
    """Noise draws a sequence; even numbers are stratified best."""
    exact: bool = False
    """Enumerate mask patterns (small blocks)."""
    by_level: bool = False
    """Draw noise levels t with weight 1 / t, not counts: the same mean with more noise (the official convention)."""
    seed: int = EVALUATION_SEED
    """Of the noise."""

    def plan(self, *, objective: str, block_size: int, mask_id: int | None) -> NoisePlan:
        """The noise plan of these settings for a model; see `noise_plan`."""
        return noise_plan(
            objective=objective,
            block_size=block_size,
            mask_id=mask_id,
            draws=self.draws,
            exact=self.exact,
            first_token_given=self.convention.first_token_given,
            min_t=self.convention.min_t,
            by_level=self.by_level,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A likelihood with its errors."""

    nll_nats_per_token: float
    """Negative log-likelihood, or for drawn or enumerated noise the bound on it."""
    stderr_noise: float
    """Nats per token; 0 where the score is exact."""
    stderr_text: float | None
    """Nats per token; None with a single sequence, which has no spread."""
    num_sequences: int
    num_tokens: int
    """Tokens counted."""
    draws: int
    is_exact: bool
    """No noise in the score: next token, or all mask patterns."""

    @property
    def perplexity(self) -> float:
        """exp(nll), inf where it overflows."""
        return self.shifted(0.0)

    def shifted(self, nats: float) -> float:
        """Perplexity at so many nats per token more: the ends of an interval."""
        nll = self.nll_nats_per_token + nats
        # exp(710) overflows a float64
        return math.inf if nll > 700 else math.exp(nll)

    def metrics(self, source: str | None = None) -> dict[str, float | int | None]:
        """Keys and values for metrics.jsonl.

        Args:
            source: name of the part of a mixture whose held-out rows were scored; None: the run's held-out split.
        """
        values = {
            "nll_nats_per_token": self.nll_nats_per_token,
            "stderr_noise_nats_per_token": self.stderr_noise,
            "stderr_text_nats_per_token": self.stderr_text,
            "perplexity": self.perplexity,
            "num_sequences": self.num_sequences,
            "num_tokens": self.num_tokens,
            "draws": self.draws,
        }
        prefix = "eval/" if source is None else f"{SOURCE_PREFIX}{source}/"
        return {f"{prefix}{name}": value for name, value in values.items()}

    def as_dict(self) -> dict[str, Any]:
        """Every field and the perplexity, for JSON."""
        return asdict(self) | {"perplexity": self.perplexity}

    def sentence(self) -> str:
        """The line a person reads; both errors are always there."""
        text = "unknown (one sequence)" if self.stderr_text is None else f"{self.stderr_text:.4f}"
        noise = "0 (exact)" if self.is_exact else f"{self.stderr_noise:.4f}"
        return (
            f"perplexity {self.perplexity:.2f} ({self.nll_nats_per_token:.4f} nats per token; standard errors: noise "
            f"{noise}, text {text}) over {self.num_tokens:,} tokens in {self.num_sequences} sequences"
        )


@dataclass(frozen=True)
class ScoreTable:
    """The R forwards of an evaluation: which draw of which sequence each row is. CPU tensors."""

    row_id_N: Tensor
    """int64: the split's row of each of the N sequences; also its number in the noise."""
    sequence_R: Tensor
    """int64 in [0, N)."""
    draw_R: Tensor
    """int64; the plan's draws, and draw 1 of probed sequences."""


def score_table(plan: NoisePlan, *, num_rows: int, num_sequences: int | None) -> ScoreTable:
    """The rows to score.

    Args:
        plan: of the noise.
        num_rows: rows of the split.
        num_sequences: how many to take; None, or more than there are: all.

    Raises:
        RangeError: no sequence.
    """
    row_id_N = rows_to_score(num_rows=num_rows, num_sequences=num_sequences)
    wanted = len(row_id_N)
    sequence_N = torch.arange(wanted)
    sequence_R = sequence_N.repeat_interleave(plan.draws)
    draw_R = torch.arange(plan.draws).repeat(wanted)
    # One draw does not show its own noise: a second draw of some sequences, which does not enter the result, measures it.
    if plan.draws == 1 and not plan.is_exact:
        probes = min(wanted, PROBE_SEQUENCES)
        probed = torch.arange(probes) * wanted // probes
        sequence_R = torch.cat([sequence_R, probed])
        draw_R = torch.cat([draw_R, torch.ones(probes, dtype=torch.int64)])
    return ScoreTable(row_id_N, sequence_R, draw_R)


def rows_to_score(*, num_rows: int, num_sequences: int | None) -> Tensor:
    """Which rows of a split are scored: int64 [N], rising; arguments and errors as in `score_table`."""
    wanted = num_rows if num_sequences is None else min(num_sequences, num_rows)
    if wanted < 1:
        raise RangeError(f"{num_sequences} of {num_rows} sequences leave nothing to score; ask for 1 or more.")
    # evenly spaced over the split, in integer arithmetic, so that every rank and every run takes the same rows
    return torch.arange(wanted) * num_rows // wanted


@dataclass(frozen=True)
class Share:
    """One batch of rows of the table; rows beyond `num_real` are fillers, computed and dropped."""

    row_B: Tensor
    num_real: int


def deal(table: ScoreTable, *, batch_size: int, rank: int = 0, ranks: int = 1, multiple: int = 1) -> list[Share]:
    """The batches of one data-parallel rank: all of one size, and equally many on every rank.

    Args:
        table: all rows.
        batch_size: B.
        rank, ranks: this data-parallel rank and their number.
        multiple: the number of batches is a multiple of this.
    """
    total = len(table.sequence_R)
    rounds = -(-total // (batch_size * ranks * multiple)) * multiple
    shares = []
    for number in range(rounds):
        first = (number * ranks + rank) * batch_size
        # pipelines and ZeRO-3 need equal shapes and counts everywhere: the last batch is filled up with rows that are dropped
        row_B = torch.arange(first, first + batch_size)
        shares.append(Share(row_B.clamp(max=total - 1), max(0, min(batch_size, total - first))))
    return shares


def read_share(dataset: HeldOut, table: ScoreTable, share: Share) -> tuple[CleanBatch, Tensor]:
    """(clean sequences [B, L] with their numbers, draw_B) of a batch of rows."""
    clean = dataset.batch_for(table.row_id_N[table.sequence_R[share.row_B]])
    return clean, table.draw_R[share.row_B]


class ScoreSums:
    """Sums and counts of every row, filled by whoever computes them; zero where another rank does."""

    def __init__(self, table: ScoreTable, device: torch.device) -> None:
        self.table = table
        self.both_2R = torch.zeros(2, len(table.sequence_R), dtype=torch.float64, device=device)

    def put_sums(self, share: Share, weighted_nll_B: Tensor) -> None:
        """Weighted NLL sums of a batch, float64 [B]; partial sums of one row may be put on several ranks."""
        self._put(0, share, weighted_nll_B)

    def put_counts(self, share: Share, counted_B: Tensor) -> None:
        """Counted tokens of a batch, int64 [B]; on one rank only."""
        self._put(1, share, counted_B)

    def _put(self, line: int, share: Share, value_B: Tensor) -> None:
        rows = share.row_B[: share.num_real].to(self.both_2R.device)
        self.both_2R[line, rows] += value_B[: share.num_real].to(self.both_2R)


def estimate(plan: NoisePlan, sums: ScoreSums) -> Estimate:
    """The result, from the sums of all rows.

    Args:
        plan: whose rows they are.
        sums: complete, summed over ranks.

    Raises:
        RangeError: no token was counted.
    """
    scores = sequence_scores(plan, sums)
    score_N, total = scores.score_N, float(scores.count_N.sum())
    if total == 0:
        raise RangeError("no token was counted; the sequences hold padding only.")
    # One ratio of sums: long sequences weigh by their tokens.
    nll = float(score_N.sum()) / total
    return Estimate(
        nll_nats_per_token=nll,
        stderr_noise=0.0 if plan.is_exact else math.sqrt(_noise_variance(plan, sums)) / total,
        stderr_text=_text_error(score_N, scores.count_N, nll),
        num_sequences=len(score_N),
        num_tokens=round(total),
        draws=plan.draws,
        is_exact=plan.is_exact,
    )


@dataclass(frozen=True)
class SequenceScores:
    """What each sequence adds to the result: for comparing models on the same text."""

    score_N: Tensor
    """float64: mean over draws of the weighted NLL, nats."""
    count_N: Tensor
    """float64: counted tokens."""


def sequence_scores(plan: NoisePlan, sums: ScoreSums) -> SequenceScores:
    """The scores of every sequence, from the complete sums of all rows."""
    size, (sum_R, count_R) = len(sums.table.row_id_N), sums.both_2R.cpu()
    # probes come behind the scored rows and never enter the result
    scored = size * plan.draws
    return SequenceScores(
        sum_R[:scored].view(size, plan.draws).mean(dim=1), count_R[:scored].view(size, plan.draws)[:, 0]
    )


def paired_difference(first: SequenceScores, second: SequenceScores) -> tuple[float, float | None]:
    """How much worse `first` is, sequence by sequence: what texts are hard for both cancels.

    Args:
        first, second: over the same sequences with the same counts.

    Returns:
        (nats per token, standard error over text and noise; None with one sequence).

    Raises:
        RangeError: the sequences or counts are not the same.
    """
    if not torch.equal(first.count_N, second.count_N):
        raise RangeError(
            f"{len(first.count_N)} and {len(second.count_N)} sequences do not count the same tokens, so they cannot be "
            "paired; score both with the same num_sequences and convention."
        )
    # Paired: the spread of the difference, not the difference of two spreads.
    difference_N = first.score_N - second.score_N
    mean = float(difference_N.sum() / first.count_N.sum())
    return mean, _text_error(difference_N, first.count_N, mean)


def _noise_variance(plan: NoisePlan, sums: ScoreSums) -> float:
    """Variance of the sum of scores over noise alone, from replicates of one sequence."""
    table, sum_R = sums.table, sums.both_2R[0].cpu()
    num_sequences, draws = len(table.row_id_N), plan.draws
    first_N = sum_R[: num_sequences * draws].view(num_sequences, draws)
    if draws > 1:
        # replicates are independent and alike, so their spread is the noise without bias; strata inside one are not
        replicate_NR = first_N.unflatten(1, (-1, plan.replicate_size)).mean(dim=2)
        return float(replicate_NR.var(dim=1).sum()) / replicate_NR.shape[1]
    probed = table.sequence_R[num_sequences:]
    difference = sum_R[num_sequences:] - first_N[probed, 0]
    # Half the squared difference of two draws estimates the variance of one.
    return num_sequences * float((difference**2 / 2).mean())


def _text_error(score_N: Tensor, count_N: Tensor, nll: float) -> float | None:
    """Standard error of the ratio of sums over sequences, linearised."""
    size = len(score_N)
    if size < 2:
        return None
    # sequences count different numbers of tokens, so the mean is a ratio of sums; its error is linearised
    residual_N = score_N - nll * count_N
    return math.sqrt(size / (size - 1) * float((residual_N**2).sum())) / float(count_N.sum())


def chunked(shares: Sequence[Share], size: int) -> list[Sequence[Share]]:
    """Shares in groups of at most `size`, in order."""
    return [shares[i : i + size] for i in range(0, len(shares), size)]
