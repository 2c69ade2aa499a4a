"""Which noisy copies of a held-out sequence are scored, so that their mean is the bound on its likelihood.

Contract: the bound is the mean over t in [min_t, 1] of (1 / t) sum of NLL over masked tokens, as in the official
evaluation. Noise is a function of (seed, sequence number, draw, block, position): batch size, grid and device do not
show in it. Refuses enumeration of blocks beyond MAX_ENUMERATED tokens and draws out of range.
Source: BD3-LM (arXiv 2503.09573), NELBO over blocks; LLaDA (arXiv 2502.09992) scores by counts in the same way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bd3_megatron.data.batch import CleanBatch
from bd3_megatron.diffusion.constants import MIN_T
from bd3_megatron.diffusion.corrupt import NoisyBatch, corrupt, countable, hidden, per_token
from bd3_megatron.diffusion.noise_level import Interval, noise_levels
from bd3_megatron.diffusion.noise_schedule import noise_schedule
from bd3_megatron.diffusion.objective import NextToken, objective_named
from bd3_megatron.errors import RangeError, check_multiple
from bd3_megatron.rng import Purpose, generator_seed, uniform

EVALUATION_SEED = 1
"""Default of every evaluation, so that runs, grids and folders are scored under the same noise."""
MAX_ENUMERATED = 12
"""Largest block whose mask patterns are enumerated: 4095 passes."""
MAX_DRAWS = 2**20


class NoisePlan(Protocol):
    """How a sequence is scored; the mean over its draws of the weighted NLL sums is its score."""

    @property
    def draws(self) -> int:
        """Noisy copies of a sequence that enter its score."""

    @property
    def replicate_size(self) -> int:
        """Draws of one replicate; whole replicates are independent of each other."""

    @property
    def is_exact(self) -> bool:
        """The score has no noise."""

    def noisy(self, clean: CleanBatch, draw_B: Tensor) -> NoisyBatch | None:
        """The noisy copies; None where the objective has none.

        Args:
            clean: [B, L]; index_B are sequence numbers.
            draw_B: int64 [B], which draw of its sequence each row is.
        """

    def counted(self, clean: CleanBatch) -> Tensor:
        """Tokens in the mean: int64 [B]. Equal for all draws of a sequence."""


def noise_plan(
    *,
    objective: str,
    block_size: int,
    mask_id: int | None,
    draws: int = 1,
    exact: bool = False,
    first_token_given: bool = False,
    min_t: float = MIN_T,
    by_level: bool = False,
    seed: int = EVALUATION_SEED,
) -> NoisePlan:
    """The plan for a model.

    Args:
        objective: "block" or "ar".
        block_size: S of the model.
        mask_id: its mask token; None only for "ar".
        draws: K of a drawn plan.
        exact: enumerate mask patterns instead of drawing them; blocks of one token always are.
        first_token_given: the first token of a sequence is not counted (the official convention; the autoregressive
            objective never counts it).
        min_t: smallest noise level of the bound, in [1e-3, 1).
        by_level: draw t instead of counts (the official convention).
        seed: of the noise.

    Raises:
        RangeError: a block too large to enumerate, draws out of range, or no mask token.
    """
    # The network does not see t, so the bound does not depend on the noise schedule of training, and four plans share it:
    # next token (exact), all mask patterns of a block (exact), drawn counts, drawn levels (the official way).
    if not objective_named(objective).has_noise:
        return NextTokenPlan()
    if mask_id is None:
        raise RangeError("a block-diffusion model without mask_id cannot be scored; give the tokenizer's mask token.")
    shared: dict[str, Any] = {
        "block_size": block_size,
        "mask_id": mask_id,
        "first_token_given": first_token_given,
        "min_t": min_t,
    }
    # A block of one token has one pattern: enumeration is one pass and exact.
    if exact or block_size == 1:
        return Enumerated(**shared)
    kind = LevelDrawn if by_level else CountDrawn
    return kind(**shared, num_draws=draws, seed=seed)


@dataclass(frozen=True)
class NextTokenPlan:
    """The autoregressive objective: the next token under the whole past, the first one given."""

    draws: int = 1
    replicate_size: int = 1
    is_exact: bool = True

    def noisy(self, clean: CleanBatch, draw_B: Tensor) -> NoisyBatch | None:
        return None

    def counted(self, clean: CleanBatch) -> Tensor:
        # autoregressive rows have blocks of one token, so nothing fills them
        rows = NextToken().loss_rows(
            clean.tokens_BL, [], document_id_BL=clean.document_id_BL, is_scored_BL=clean.scored_BL
        )
        return rows[0].has_loss_BL.sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    """What the drawn plans share: replicates, and which numbers a draw takes from the generator."""

    block_size: int
    mask_id: int
    num_draws: int
    first_token_given: bool = False
    min_t: float = MIN_T
    seed: int = EVALUATION_SEED
    is_exact: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.num_draws <= MAX_DRAWS:
            raise RangeError(f"draws={self.num_draws} is outside [1, {MAX_DRAWS}]; use 1, or an even number.")

    @property
    def draws(self) -> int:
        return self.num_draws

    @property
    def replicate_size(self) -> int:
        # Strata over all draws would hide the noise: two replicates of half the draws (or K of one, K odd) show it.
        return 1 if self.num_draws % 2 else self.num_draws // 2

    @property
    def noise_seed(self) -> int:
        return generator_seed(self.seed, Purpose.EVALUATE, "noise")

    def index_of(self, clean: CleanBatch, draw_B: Tensor) -> Tensor:
        """The generator's index of each row: int64 [B] on the CPU."""
        # a second draw of single-draw plans measures their noise, hence at least two numbers a sequence
        return clean.index_B.cpu() * max(2, self.num_draws) + draw_B.cpu()

    def levels(self, clean: CleanBatch, index_B: Tensor) -> Tensor:
        """Noise levels, uniform on [min_t, 1] and stratified over a replicate: float64 [B, K] on the CPU."""
        length = clean.tokens_BL.shape[1]
        check_multiple("seq_len", length, "block_size", self.block_size)
        return noise_levels(
            self.noise_seed,
            index_B,
            num_blocks=length // self.block_size,
            interval=Interval(self.min_t),
            group_size=self.replicate_size,
        )

    def counted(self, clean: CleanBatch) -> Tensor:
        return _num_counted(clean, first_token_given=self.first_token_given)


class LevelDrawn(_Drawn):
    """A noise level for every block; a token is masked with probability t and weighs 1 / t."""

    def noisy(self, clean: CleanBatch, draw_B: Tensor) -> NoisyBatch:
        index_B = self.index_of(clean, draw_B)
        return corrupt(
            clean.tokens_BL,
            self.levels(clean, index_B),
            index_B=index_B,
            seed=self.noise_seed,
            mask_id=self.mask_id,
            schedule=noise_schedule("loglinear"),
            never_mask_first=self.first_token_given,
            is_padding_BL=clean.is_padding_BL,
            is_supervised_BL=clean.is_supervised_BL,
            weight_dtype=torch.float64,
        )


class CountDrawn(_Drawn):
    """A number m of masked tokens for every block, all patterns of m alike; a masked token weighs S / m.

    With t uniform on [min_t, 1], a pattern of m tokens has weight E[t^m (1 - t)^(S - m) / t] in the bound. Drawing m with
    probability P(Binomial(S, min_t) < m) / (S (1 - min_t)) and weighing by S / m gives every pattern just that.
    """

    def noisy(self, clean: CleanBatch, draw_B: Tensor) -> NoisyBatch:
        index_B = self.index_of(clean, draw_B)
        device, size = clean.tokens_BL.device, self.block_size
        # Integrating t out leaves every count almost equally likely: no empty masks and no weights up to 1 / min_t, so far
        # less noise than drawn levels, and error bars that can be trusted.
        u_BK = (self.levels(clean, index_B) - self.min_t) / (1 - self.min_t)
        count_BK = 1 + torch.searchsorted(count_law(size, self.min_t)[:-1], u_BK, right=True).to(device)
        num_blocks = count_BK.shape[1]
        position_KS = torch.arange(num_blocks * size, device=device).view(num_blocks, size)
        index_B11 = index_B.to(device)[:, None, None]
        u_BKS = uniform(self.noise_seed, Purpose.CORRUPT, index_B11, position_KS // size, position_KS)
        # Ranks of uniform numbers: the m lowest are masked, every pattern of m alike.
        rank_BKS = u_BKS.argsort(dim=2).argsort(dim=2)
        # In float64, as everything that enters a score.
        weight_BL = per_token(size / count_BK.double(), num_blocks * size)
        return _masked(clean, (rank_BKS < count_BK[:, :, None]).flatten(1), weight_BL, count_BK, plan=self)


@dataclass(frozen=True, kw_only=True)
class Enumerated:
    """Every non-empty mask pattern of a block; draw d is the pattern whose bits are d + 1."""

    block_size: int
    mask_id: int
    first_token_given: bool = False
    min_t: float = MIN_T
    is_exact: bool = True

    def __post_init__(self) -> None:
        if self.block_size > MAX_ENUMERATED:
            raise RangeError(
                f"block_size={self.block_size} has 2^{self.block_size} mask patterns; enumerate blocks of at most "
                f"{MAX_ENUMERATED} tokens, or draw the noise."
            )

    @property
    def draws(self) -> int:
        return 2**self.block_size - 1

    @property
    def replicate_size(self) -> int:
        return self.draws

    @cached_property
    def _weights(self) -> list[float]:
        """Weight of a masked token under a pattern of m tokens, by m; times the number of patterns, since scores are
        means over patterns."""
        return [self.draws * weight for weight in pattern_weights(self.block_size, self.min_t)]

    def noisy(self, clean: CleanBatch, draw_B: Tensor) -> NoisyBatch:
        batch, length = clean.tokens_BL.shape
        check_multiple("seq_len", length, "block_size", self.block_size)
        device, num_blocks = clean.tokens_BL.device, length // self.block_size
        # all blocks take the same pattern in one pass: given the clean past they do not see each other
        bits_S = torch.arange(self.block_size, device=device)
        pattern_BS = ((draw_B.to(device) + 1)[:, None] >> bits_S) & 1 == 1
        count_B1 = pattern_BS.sum(dim=1, keepdim=True)
        weights = torch.tensor([0.0, *self._weights], dtype=torch.float64, device=device)
        weight_BL = weights[count_B1].expand(batch, length)
        return _masked(
            clean, pattern_BS.repeat(1, num_blocks), weight_BL, count_B1.expand(batch, num_blocks), plan=self
        )

    def counted(self, clean: CleanBatch) -> Tensor:
        return _num_counted(clean, first_token_given=self.first_token_given)


def pattern_weights(block_size: int, min_t: float) -> list[float]:
    """Mean over t in [min_t, 1] of t^m (1 - t)^(S - m) / t for m = 1..S masked tokens; exactly 1 for S = 1.

    Args:
        block_size: S >= 1.
        min_t: smallest noise level.

    Returns:
        S numbers, m = 1 first.
    """
    # a polynomial of degree S - 1 in t: S nodes are more than enough
    node, weight = np.polynomial.legendre.leggauss(block_size)
    t = min_t + (1 - min_t) * (node + 1) / 2
    return [float((weight / 2 * t ** (m - 1) * (1 - t) ** (block_size - m)).sum()) for m in range(1, block_size + 1)]


def count_law(block_size: int, min_t: float) -> Tensor:
    """P(count <= m), m = 1..S: float64 [S], rising to 1."""
    m = torch.arange(block_size, dtype=torch.float64)
    # P(Binomial(S, min_t) = m): the share of patterns that t below min_t would have given, left out of the bound
    log_term = (
        math.lgamma(block_size + 1)
        - torch.lgamma(m + 1)
        - torch.lgamma(block_size - m + 1)
        + m * math.log(min_t)
        + (block_size - m) * math.log1p(-min_t)
    )
    chance = log_term.exp().cumsum(dim=0) / (block_size * (1 - min_t))
    return chance.cumsum(dim=0)


def _masked(
    clean: CleanBatch, drawn_BL: Tensor, weight_BL: Tensor, count_BK: Tensor, *, plan: CountDrawn | Enumerated
) -> NoisyBatch:
    """The noisy copy under given patterns; an exempt first token stays, padding is hidden without weight (see corrupt)."""
    countable_BL = _countable(clean, first_token_given=plan.first_token_given)
    is_masked_BL = drawn_BL & countable_BL
    return NoisyBatch(
        noisy_BL=clean.tokens_BL.masked_fill(hidden(drawn_BL, is_masked_BL, clean.is_padding_BL), plan.mask_id),
        clean_BL=clean.tokens_BL,
        is_masked_BL=is_masked_BL,
        weight_BL=weight_BL * is_masked_BL,
        # no level was drawn; the masked fraction stands for it in diagnostics
        t_BK=count_BK / plan.block_size,
        drawn_BK=count_BK,
        countable_BL=countable_BL,
        is_padding_BL=clean.is_padding_BL,
        is_supervised_BL=clean.is_supervised_BL,
    )


def _num_counted(clean: CleanBatch, *, first_token_given: bool) -> Tensor:
    """int64 [B]: tokens of the mean."""
    counted_BL = _countable(clean, first_token_given=first_token_given)
    # What fills a block is part of the bound, since its loss says where the text ends, but it is no token of the text:
    # counted, it would make short documents look easy.
    return (counted_BL if clean.is_fill_BL is None else counted_BL & ~clean.is_fill_BL).sum(dim=1)


def _countable(clean: CleanBatch, *, first_token_given: bool) -> Tensor:
    """bool [B, L]: tokens that may be masked: those whose likelihood is asked for, and fill."""
    scored_BL = clean.scored_BL
    scored_BL = torch.ones_like(clean.tokens_BL, dtype=torch.bool) if scored_BL is None else scored_BL
    return countable(scored_BL, never_mask_first=first_token_given)
