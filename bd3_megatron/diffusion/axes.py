"""The axes of the training objective: independent answers to what is masked, how a row weighs and what is counted.

Contract: each default is BD3-LM's, and each axis is one field. A recipe of the field is a point in this space. Torch-free.
Refuses: fields that contradict each other, or the run around them.
Source: BD3-LM (arXiv 2503.09573), LLaDA (2502.09992), Dream (2508.15487), Efficient-DLM, Fast-dLLM v2, SDAR (2510.06303).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bd3_megatron.errors import ConfigError

LevelPer = Literal["block", "group", "sample"]
MaskedPositions = Literal["bernoulli", "exact"]
ViewPairing = Literal["independent", "complementary"]
RowWeight = Literal["elbo", "flat", "cart"]
Denominator = Literal["maskable", "all", "loss_rows", "answer_length"]


@dataclass(frozen=True, kw_only=True)
class ObjectiveAxes:
    """One point in the space of objectives.

    Raises:
        ConfigError: fields that contradict each other.
    """

    level_per: LevelPer = "block"
    """What shares one noise level t."""
    group_blocks: int | None = None
    """Blocks in a row that share a level, with level_per="group"."""
    positions: MaskedPositions = "bernoulli"
    """Every token masked by itself with probability p, or exactly k = round(p n) of the n maskable tokens of a block."""
    least_masked: int = 0
    """Smallest k of a block that has maskable tokens: 0 or 1."""
    position_half_life: float | None = None
    """Distance over which the draw's preference for later tokens doubles at p = 0, in blocks; None: all alike."""
    pairing: ViewPairing = "independent"
    """Whether view 2j + 1 masks just what view 2j leaves."""
    row_weight: RowWeight = "elbo"
    """Weight of a loss row: p'(t) / p(t), 1, or by how near the visible tokens are."""
    denominator: Denominator = "maskable"
    """What the weighted sum is divided by, over the whole step."""
    confidence: float = 0.0
    """Factor beta of the entropy of rows whose target is the likeliest token; 0: no such term."""

    def __post_init__(self) -> None:
        if (self.level_per == "group") != (self.group_blocks is not None):
            raise ConfigError(
                f"axes.level_per={self.level_per} with group_blocks={self.group_blocks}: only groups have a number of blocks; "
                "give both level_per=group and group_blocks, or neither."
            )
        for name, default in (("least_masked", 0), ("position_half_life", None)):
            if self.positions != "exact" and getattr(self, name) != default:
                raise ConfigError(
                    f"axes.{name}={getattr(self, name)} with positions={self.positions}, where every token is masked by "
                    f"itself and no number k is drawn; use positions=exact, or leave {name} unset."
                )

    def blocks_per_level(self, num_blocks: int) -> int:
        """Consecutive blocks that share a noise level, of the K blocks of a sample."""
        if self.level_per == "sample":
            return num_blocks
        return self.group_blocks or 1

    def refuse(
        self, *, views: int, resample: bool, searches: bool, interval: tuple[float, float] | None, num_blocks: int
    ) -> None:
        """Refuse axes that contradict the run.

        Args:
            views: noisy copies of a sample.
            resample: masks are redrawn until their fraction lies in the interval.
            searches: the run searches the interval of least variance.
            interval: of noise levels in force.
            num_blocks: K = L / S.

        Raises:
            ConfigError: with the axis, the reason and the remedy.
        """
        if resample and self.positions == "exact":
            raise ConfigError(
                "axes.positions=exact with diffusion.resample=true: both decide how many tokens of a block are masked; "
                "turn one of them off."
            )
        if self.group_blocks is not None and self.group_blocks > num_blocks:
            raise ConfigError(
                f"axes.group_blocks={self.group_blocks} exceeds the {num_blocks} blocks of a sample; use at most "
                f"{num_blocks}, or level_per=sample."
            )
        if self.pairing == "complementary":
            self._refuse_pairing(views=views, resample=resample, interval=interval)
        if searches:
            self._refuse_search()

    def _refuse_pairing(self, *, views: int, resample: bool, interval: tuple[float, float] | None) -> None:
        if views % 2:
            raise ConfigError(
                f"axes.pairing=complementary with diffusion.views={views}: views come in pairs; use an even number of views."
            )
        if resample:
            raise ConfigError(
                "axes.pairing=complementary with diffusion.resample=true: the complement of a fraction inside the interval "
                "lies outside; turn one of them off."
            )
        # everything masked leaves nothing for the second view
        if interval is not None and interval[0] == 1.0:
            raise ConfigError(
                "axes.pairing=complementary with interval [1, 1]: the second view of a pair would mask nothing; use "
                "pairing=independent or a wider interval."
            )

    def _refuse_search(self) -> None:
        # the search scores Bernoulli draws of single blocks under the bound's weights, and its answer holds for those only
        measured = (
            ("level_per", "block"),
            ("positions", "bernoulli"),
            ("row_weight", "elbo"),
            ("pairing", "independent"),
        )
        for name, default in measured:
            if getattr(self, name) != default:
                raise ConfigError(
                    f"axes.{name}={getattr(self, name)} with search_every_steps above 0: the search measures the variance of "
                    f"{name}={default}; set search_every_steps=0 and name an interval."
                )


BD3_LM = ObjectiveAxes()
"""The default of every axis."""
