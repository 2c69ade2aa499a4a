"""The `diffusion.axes` section: one field an axis, of a run or of one of its phases. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from bd3_megatron.config.ranges import Range
from bd3_megatron.diffusion.axes import (
    Denominator,
    LevelPer,
    MaskedPositions,
    ObjectiveAxes,
    RowWeight,
    ViewPairing,
)


@dataclass(frozen=True, kw_only=True)
class AxesConfig:
    level_per: LevelPer = ObjectiveAxes.level_per
    """What shares one noise level: a block (BD3-LM), group_blocks blocks in a row, or a whole sample (LLaDA, SDAR).
    Everything masked (TiDAR, I-DLM) is interval: [1, 1], at any block size."""
    group_blocks: Annotated[int, Range(1, 1e8)] | None = ObjectiveAxes.group_blocks
    """Blocks of a group, with level_per: group."""
    positions: MaskedPositions = ObjectiveAxes.positions
    """bernoulli: every token is masked by itself with the level's probability p. exact: round(p n) of the n maskable tokens of
    a block (Efficient-DLM), which has less variance and a bias of the rounding."""
    least_masked: Annotated[int, Range(0, 1)] = ObjectiveAxes.least_masked
    """With exact: the least number of masked tokens of a block."""
    position_half_life: Annotated[float, Range(0.001, 1000)] | None = ObjectiveAxes.position_half_life
    """With exact: token i of a block is drawn in proportion to 2^((1 - p) i / (h S)) for this h (Efficient-DLM: 0.25);
    null: all tokens alike."""
    pairing: ViewPairing = ObjectiveAxes.pairing
    """independent: every view has a mask of its own. complementary: view 2 masks just what view 1 leaves, and so on in pairs
    (Fast-dLLM v2, LLaDA 2.0)."""
    row_weight: RowWeight = ObjectiveAxes.row_weight
    """Weight of a masked token: elbo p'/p (the bound; of a complementary view p'/(1 - p)), flat 1 (SDAR, dFactory), cart by
    the nearness of visible tokens (Dream)."""
    denominator: Denominator = ObjectiveAxes.denominator
    """The loss is divided by the step's tokens that may be masked, by all its tokens (the official training loss), by its
    masked tokens, or sample by sample by the tokens that may be masked and then by samples (answer_length: SDAR)."""
    confidence: Annotated[float, Range(0, 1000)] = ObjectiveAxes.confidence
    """Factor on the entropy of masked tokens that are the model's first choice, added to their NLL under the same weight
    (CAP of LLaDA 2.0: 2.0); it makes right predictions sharper, for parallel decoding. 0: none."""

    def axes(self) -> ObjectiveAxes:
        """The axes as the objective asks for them.

        Raises:
            ConfigError: fields that contradict each other.
        """
        return ObjectiveAxes(**vars(self))
