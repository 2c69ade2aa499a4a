"""The batch that the data loader hands on: clean tokens and the index of each row in the order of consumption."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class CleanBatch:
    """B rows of exactly L clean tokens.

    The optional tensors are None where they would say nothing: one document per row, no padding, positions
    0..L-1.
    """

    tokens_BL: Tensor
    """int64 [B, L] in [0, V)."""
    index_B: Tensor
    """int64 [B]: index of each row in the order of consumption; what noise is drawn from."""
    document_id_BL: Tensor | None = None
    """int64 [B, L]: the attention mask lets positions see each other only inside one document."""
    is_padding_BL: Tensor | None = None
    """bool [B, L]: True where the token carries no loss."""
    position_BL: Tensor | None = None
    """int64 [B, L]: position for the rotary embedding, restarting at every document."""
    is_fill_BL: Tensor | None = None
    """bool [B, L]: end tokens that fill the block in which a document ends. They carry loss, so that a model knows where
    texts end in whatever order it reveals a block; evaluation does not count them as tokens of the text."""
    is_supervised_BL: Tensor | None = None
    """bool [B, L]: False at what is given and never predicted, as a prompt is; None: everything is predicted."""

    @property
    def scored_BL(self) -> Tensor | None:
        """bool [B, L]: tokens that may carry loss; None: all may."""
        text_BL = None if self.is_padding_BL is None else ~self.is_padding_BL
        if text_BL is None or self.is_supervised_BL is None:
            return text_BL if self.is_supervised_BL is None else self.is_supervised_BL
        return text_BL & self.is_supervised_BL

    def to(self, device: torch.device, *, non_blocking: bool = False) -> CleanBatch:
        """The batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def rows(self, start: int, stop: int) -> CleanBatch:
        """Rows [start, stop) as views."""
        return self._map(lambda tensor: tensor[start:stop])

    # One list of fields for all moves: a tensor that is forgotten would stay on the CPU.
    def _map(self, change: Callable[[Tensor], Tensor]) -> CleanBatch:
        def optional(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        return CleanBatch(
            tokens_BL=change(self.tokens_BL),
            index_B=change(self.index_B),
            document_id_BL=optional(self.document_id_BL),
            is_padding_BL=optional(self.is_padding_BL),
            position_BL=optional(self.position_BL),
            is_fill_BL=optional(self.is_fill_BL),
            is_supervised_BL=optional(self.is_supervised_BL),
        )
