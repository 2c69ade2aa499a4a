"""Which rows of the pair [noisy; clean] a rank holds, for every objective and context-parallel rank.

Decides: the order of rows on a rank is [its noisy rows; its clean rows], each in rising position. Several noisy views
may share one clean half: then the noisy rows are [view 0; view 1; ...], each of the same positions. Sequence parallelism
cuts them further inside megatron; nothing here depends on it, except that tp must divide the number of rows.
Source: the zigzag order of ring attention for causal models, here for both halves of the pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bd3_megatron.attention.visibility import Rows, Visibility, num_rows, positions
from bd3_megatron.config.validate import check_context_slices
from bd3_megatron.diffusion.objective import Objective


@dataclass(frozen=True)
class PairLayout:
    """The rows of one rank. `length` and `block_size` are global; row ranges are positions of the clean sequence."""

    length: int
    objective: Objective
    """At the block size and number of noisy views in force."""
    noisy_rows: Rows
    clean_rows: Rows
    clean_key_rows: Rows

    @property
    def block_size(self) -> int:
        return self.objective.block_size

    @property
    def views(self) -> int:
        """Noisy copies of the same positions; each sees itself and the one clean half."""
        return self.objective.views

    @cached_property
    def num_noisy(self) -> int:
        """Noisy rows of all views."""
        return self.views * num_rows(self.noisy_rows)

    @cached_property
    def num_clean(self) -> int:
        return num_rows(self.clean_rows)

    @property
    def num_loss_rows(self) -> int:
        """Rows of the stream that carries the loss: the noisy one, or for the AR baseline the clean one."""
        return self.num_noisy or self.num_clean

    @property
    def num_rows(self) -> int:
        """P of this rank: 2 L / cp for block diffusion, less the dropped block."""
        return self.num_noisy + self.num_clean

    @cached_property
    def position_P(self) -> Tensor:
        """Position in [0, L) of every row: int64 [P], 0..L-1 twice on a rank that holds everything."""
        # rotary angles go by position: a noisy row has those of the clean row that it denoises
        return torch.cat([positions(self.noisy_rows).repeat(self.views), positions(self.clean_rows)])

    def visibility(self, document_id_BL: Tensor | None = None) -> Visibility:
        """The visibility rule over these rows; documents are those of the whole sequences, [B, L].

        Without documents it is one object for the life of the layout, and so are the tables that backends keep with it.
        """
        return self._without_documents if document_id_BL is None else self._visibility(document_id_BL)

    @cached_property
    def _without_documents(self) -> Visibility:
        return self._visibility(None)

    def _visibility(self, document_id_BL: Tensor | None) -> Visibility:
        return Visibility(
            self.block_size, self.length, self.noisy_rows, self.clean_rows, self.clean_key_rows, document_id_BL
        )

    def rows_of(self, noisy_BL: Sequence[Tensor], clean_BL: Tensor) -> Tensor:
        """Tokens (or anything [B, L]) of this rank's rows, from each view's and the clean whole sequences: [B, P]."""
        noisy = [view[:, a:b] for view in noisy_BL for a, b in self.noisy_rows]
        return torch.cat([*noisy, *(clean_BL[:, a:b] for a, b in self.clean_rows)], dim=1)

    def loss_rows(self, value_BL: Sequence[Tensor]) -> Tensor:
        """Each view's [B, L] at the rows that carry the loss here: [B, noisy rows] (clean rows for the AR baseline)."""
        rows = self.noisy_rows or self.clean_rows
        return torch.cat([view[:, a:b] for view in value_BL for a, b in rows], dim=1)


def pair_layout(
    objective: Objective, *, length: int, cp: int = 1, cp_rank: int = 0, drop_last_clean: bool = True
) -> PairLayout:
    """The layout of one context-parallel rank.

    Args:
        objective: says which streams there are.
        length: L, clean tokens of a sample.
        cp, cp_rank: context-parallel size and this rank in it.
        drop_last_clean: leave out the last clean block where no row that carries loss sees it and nothing is cut (cp = 1).

    Raises:
        GridError: L / (2 cp) is not a multiple of S.
    """
    rows = _zigzag(length, objective.block_size, cp, cp_rank)
    noisy = rows if objective.noisy_rows(length) else ()
    # masked diffusion (S = L) has no clean rows, the AR baseline no noisy ones
    if not objective.clean_rows(length):
        return PairLayout(length, objective, noisy, (), ())
    # a clean row carries loss only where there is no noisy stream: then its last block is needed too
    if cp == 1 and noisy and drop_last_clean:
        clean: Rows = ((0, length - objective.block_size),)
        return PairLayout(length, objective, noisy, clean, clean)
    # clean keys of all positions, gathered over the context-parallel ranks
    return PairLayout(length, objective, noisy, rows, ((0, length),))


def _zigzag(length: int, block_size: int, cp: int, cp_rank: int) -> Rows:
    if cp == 1:
        return ((0, length),)
    check_context_slices(length, block_size, cp)
    # Both streams are cut alike into 2 cp chunks, and rank r holds chunks r and 2 cp - 1 - r: the work of a row grows
    # linearly with its position in both streams, so this is exactly balanced.
    size = length // (2 * cp)
    first, second = cp_rank * size, (2 * cp - 1 - cp_rank) * size
    return ((first, first + size), (second, second + size))
