"""The objective: which rows exist, which of them carry loss, what they predict, how they weigh, and what is counted.

Block diffusion over blocks of S tokens is masked diffusion (MDLM) at S = L and the chain rule at S = 1 with t = 1; next
token is the autoregressive baseline. Nobody else asks which objective runs: they ask it for rows, targets and counts.
Contract: importing this file imports no torch, because planners count rows on a login node.
Source: BD3-LM (arXiv 2503.09573), the NELBO over blocks; MDLM (arXiv 2406.07524); kuleshov-group/bd3lms diffusion.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from bd3_megatron.diffusion.axes import BD3_LM, Denominator, ObjectiveAxes
from bd3_megatron.errors import ConfigError, check_shape, either

if TYPE_CHECKING:
    from torch import Tensor

    from bd3_megatron.diffusion.corrupt import NoisyBatch


@dataclass(frozen=True)
class LossRows:
    """What one stream of a batch contributes to the loss; every tensor is [B, L] in the order of the clean tokens."""

    has_loss_BL: Tensor
    """bool: the row enters the sum."""
    target_BL: Tensor
    """int64: the id the row predicts."""
    weight_BL: Tensor
    """float32 or float64: its loss weight; read only where has_loss_BL."""
    level_BL: Tensor
    """float32: its noise level t, for diagnostics (1 where there is no noise)."""


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """One training objective at one block size. Lengths L are clean tokens of a sample, rows are rows of the model."""

    # One objective covers both ends: S = L is masked diffusion (MDLM), S = 1 at t = 1 is the chain rule.
    block_size: int = 1
    """S, tokens denoised together; 1 for next token."""
    views: int = 1
    """Noisy copies that share one clean pass."""
    axes: ObjectiveAxes = BD3_LM
    """Masks, weights and denominator; next token has none of them."""

    name: ClassVar[str]
    """The value of `diffusion.objective` and of an exported folder's `objective`."""
    has_noise: ClassVar[bool]
    """There are noisy rows, a mask token, noise levels and intervals."""

    @abstractmethod
    def at(self, block_size: int, *, views: int | None = None, axes: ObjectiveAxes | None = None) -> Objective:
        """The same objective in another phase; what is None stays."""

    @abstractmethod
    def noisy_rows(self, length: int) -> int:
        """Noisy rows of a sample, all views together."""

    @abstractmethod
    def clean_rows(self, length: int) -> int:
        """Clean rows of a sample; 0 where no noisy row sees them."""

    @abstractmethod
    def scored_rows(self, length: int, masked_fraction: float, *, dead_rows: float = 1.0) -> float:
        """Mean rows of a sample that carry loss.

        Args:
            length: L.
            masked_fraction: share of noisy rows that are masked.
            dead_rows: clean rows whose keys nobody needs (the last block of every document).
        """

    def loss_stream_rows(self, length: int) -> int:
        """Rows of the stream that carries the loss: the noisy one, or the clean one where there is no noise."""
        # Clean rows are only context for noisy ones and carry loss themselves only where there is no noise.
        return self.noisy_rows(length) or self.clean_rows(length)

    @abstractmethod
    def copies(self, draw: Callable[[int], NoisyBatch]) -> list[NoisyBatch]:
        """The noisy copies of a batch: `draw(view)` for every view, none where there is no noise."""

    @abstractmethod
    def loss_rows(
        self,
        tokens_BL: Tensor,
        copies: Sequence[NoisyBatch],
        *,
        document_id_BL: Tensor | None = None,
        is_scored_BL: Tensor | None = None,
    ) -> list[LossRows]:
        """Loss rows of every stream that carries loss.

        Args:
            tokens_BL: int64 [B, L] clean tokens.
            copies: what `copies` gave for these tokens.
            document_id_BL: int [B, L] where packed documents do not see each other.
            is_scored_BL: bool [B, L]: False at padding and at what is given; None: everything is predicted.
        """

    @abstractmethod
    def token_count(self, rows: Sequence[LossRows], copies: Sequence[NoisyBatch]) -> int:
        """These rows' share of the loss's denominator; the loss is the sum of weight x NLL over its global number."""

    @property
    @abstractmethod
    def count_varies(self) -> bool:
        """The denominator is another number in every batch although all samples are full of text."""

    @abstractmethod
    def text_count(self, rows: Sequence[LossRows], copies: Sequence[NoisyBatch]) -> int:
        """Tokens that could carry loss if all were masked, whatever the denominator counts."""

    def refuse(self, *, num_phases: int, searches: bool) -> None:
        """Refuse settings that contradict the objective.

        Raises:
            ConfigError: with the setting and the remedy.
        """
        if not self.has_noise and (num_phases or searches or self.views != 1 or self.axes != BD3_LM):
            raise ConfigError(
                f"objective={self.name} has no noise; remove diffusion.phases, diffusion.views, diffusion.axes and "
                "search_every_steps."
            )


@dataclass(frozen=True)
class _Denominator:
    """What the loss is divided by."""

    counted: Callable[[LossRows, NoisyBatch], Tensor]
    """True for each thing of a copy that is counted, bool of any shape."""
    varies: bool = False
    """The count depends on the draw."""
    is_per_answer: bool = False
    """The sum over each document of a row is divided by its own length; one that rows cut in two counts in both."""


_DENOMINATORS: Mapping[Denominator, _Denominator] = {
    "maskable": _Denominator(lambda rows, copy: copy.countable_BL),
    "all": _Denominator(lambda rows, copy: copy.text_BL),
    "loss_rows": _Denominator(lambda rows, copy: rows.has_loss_BL, varies=True),
    "answer_length": _Denominator(lambda rows, copy: _per_document(copy)[0] > 0, is_per_answer=True),
}


@dataclass(frozen=True, kw_only=True)
class BlockDiffusion(Objective):
    """Masked tokens of every block of S, given the noisy block and the clean blocks before it. S = L is MDLM."""

    name: ClassVar[str] = "block"
    has_noise: ClassVar[bool] = True

    def at(self, block_size: int, *, views: int | None = None, axes: ObjectiveAxes | None = None) -> BlockDiffusion:
        return replace(
            self,
            block_size=block_size,
            views=self.views if views is None else views,
            axes=self.axes if axes is None else axes,
        )

    def noisy_rows(self, length: int) -> int:
        return self.views * length

    def clean_rows(self, length: int) -> int:
        # with one block no noisy row has a clean block before it
        return length if self.block_size < length else 0

    def scored_rows(self, length: int, masked_fraction: float, *, dead_rows: float = 1.0) -> float:
        # An expectation for planners: the real number varies with the draw.
        return masked_fraction * self.noisy_rows(length)

    def copies(self, draw: Callable[[int], NoisyBatch]) -> list[NoisyBatch]:
        # The views share one clean pass, which makes a further copy cheaper than a further sample.
        return [draw(view) for view in range(self.views)]

    def loss_rows(
        self,
        tokens_BL: Tensor,
        copies: Sequence[NoisyBatch],
        *,
        document_id_BL: Tensor | None = None,
        is_scored_BL: Tensor | None = None,
    ) -> list[LossRows]:
        # corrupt() has left what is not scored out of is_masked_BL, and a row predicts its own token in any document
        rows = [LossRows(copy.is_masked_BL, copy.clean_BL, copy.weight_BL, copy.level_BL) for copy in copies]
        if not self._denominator.is_per_answer:
            return rows
        # document by document: the sum over one's rows is a mean over its tokens, and documents are counted
        lengths = [_countable_in_document(copy).clamp_min(1) for copy in copies]
        return [replace(one, weight_BL=one.weight_BL / n_BL) for one, n_BL in zip(rows, lengths, strict=True)]

    def token_count(self, rows: Sequence[LossRows], copies: Sequence[NoisyBatch]) -> int:
        # Counted over all copies: with V views numerator and denominator both grow V times.
        counted = self._denominator.counted
        return sum(int(counted(one, copy).sum()) for one, copy in zip(rows, copies, strict=True))

    @property
    def count_varies(self) -> bool:
        return self._denominator.varies

    @property
    def _denominator(self) -> _Denominator:
        return _DENOMINATORS[self.axes.denominator]

    def text_count(self, rows: Sequence[LossRows], copies: Sequence[NoisyBatch]) -> int:
        return sum(int(copy.text_BL.sum()) for copy in copies)


@dataclass(frozen=True, kw_only=True)
class NextToken(Objective):
    """The autoregressive baseline: every clean row predicts the token after it, causally."""

    name: ClassVar[str] = "ar"
    has_noise: ClassVar[bool] = False

    def at(self, block_size: int, *, views: int | None = None, axes: ObjectiveAxes | None = None) -> NextToken:
        return self

    def noisy_rows(self, length: int) -> int:
        return 0

    def clean_rows(self, length: int) -> int:
        return length

    def scored_rows(self, length: int, masked_fraction: float, *, dead_rows: float = 1.0) -> float:
        # the last token of a document predicts nothing, and at S = 1 it is that document's only dead row
        return length - dead_rows

    def copies(self, draw: Callable[[int], NoisyBatch]) -> list[NoisyBatch]:
        return []

    def loss_rows(
        self,
        tokens_BL: Tensor,
        copies: Sequence[NoisyBatch],
        *,
        document_id_BL: Tensor | None = None,
        is_scored_BL: Tensor | None = None,
    ) -> list[LossRows]:
        # tensor methods only: this file must not import torch
        has_loss_BL = tokens_BL.new_ones(tokens_BL.shape).bool()
        # roll brings the first token of the row to its end; the last row has no target.
        has_loss_BL[:, -1] = False
        if document_id_BL is not None:
            check_shape("document_id_BL", document_id_BL.shape, tokens_BL.shape)
            has_loss_BL &= document_id_BL == document_id_BL.roll(-1, dims=1)
        if is_scored_BL is not None:
            check_shape("is_scored_BL", is_scored_BL.shape, tokens_BL.shape)
            # The target decides: the last text token before padding would else learn to predict padding, and the last
            # one of a prompt not what the answer begins with.
            has_loss_BL &= is_scored_BL.roll(-1, dims=1)
        ones_BL = tokens_BL.new_ones(tokens_BL.shape).float()
        return [LossRows(has_loss_BL, tokens_BL.roll(-1, dims=1), ones_BL, ones_BL)]

    def token_count(self, rows: Sequence[LossRows], copies: Sequence[NoisyBatch]) -> int:
        return sum(int(one.has_loss_BL.sum()) for one in rows)

    @property
    def count_varies(self) -> bool:
        return False

    def text_count(self, rows: Sequence[LossRows], copies: Sequence[NoisyBatch]) -> int:
        return self.token_count(rows, copies)


def objective_named(
    name: str, *, block_size: int = 1, views: int = 1, axes: ObjectiveAxes = BD3_LM
) -> BlockDiffusion | NextToken:
    """The objective of a configuration or of an exported folder.

    Args:
        name: "block" or "ar".
        block_size: S; next token has none and ignores it.
        views: noisy copies.
        axes: masks, weights and denominator.

    Raises:
        ConfigError: an unknown name.
    """
    if name == BlockDiffusion.name:
        return BlockDiffusion(block_size=block_size, views=views, axes=axes)
    if name == NextToken.name:
        return NextToken(views=views, axes=axes)
    raise ConfigError(f"objective={name!r} is unknown; use {either((BlockDiffusion.name, NextToken.name))}.")


def _per_document(copy: NoisyBatch) -> tuple[Tensor, Tensor]:
    """(tokens that may be masked by document of a row [B, D], document of each token [B, L])."""
    ids_BL = copy.document_id_BL
    ids_BL = copy.countable_BL.long() * 0 if ids_BL is None else ids_BL.long()
    counts_BD = ids_BL.new_zeros((ids_BL.shape[0], int(ids_BL.max()) + 1))
    return counts_BD.scatter_add(1, ids_BL, copy.countable_BL.long()), ids_BL


def _countable_in_document(copy: NoisyBatch) -> Tensor:
    """Tokens that may be masked in each token's document: int64 [B, L]."""
    counts_BD, ids_BL = _per_document(copy)
    return counts_BD.gather(1, ids_BL)
