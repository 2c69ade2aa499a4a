"""The blocks that a batch is filling: their ids and which positions are decided, on the device.

Contract: every block handed in has at least one undecided position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .window_bd3 import SequenceState


@dataclass
class BlockState:
    """Blocks of B sequences while they are being filled."""

    # The spare last column takes the writes of padding rows, so that a forward of fixed shape may decide a different
    # number of positions in every sequence.
    ids_BT: Tensor
    """int64 [B, S + 1] on the device; mask ids (0 without a mask token) where undecided"""
    is_undecided_BT: Tensor
    """bool [B, S + 1] on the device; the spare column is False"""
    is_masked_BS: Tensor
    """bool [B, S] on the host: undecided at the start"""
    start_B: Tensor
    """int64 [B] on the host: first position of each block"""
    active_B: list[bool]
    """sequences with undecided positions, as last read by `refresh_active`"""
    seen_BU: Tensor | None = None
    """bool [B, V + 1] on the device, with a spare column: visible tokens, kept only for a repetition penalty"""

    @staticmethod
    def new(states: list[SequenceState], block_size: int, mask_id: int | None, device: torch.device) -> BlockState:
        """The current blocks of some sequences; positions without a token are undecided."""
        filler = 0 if mask_id is None else mask_id
        ids, undecided = [], []
        for state in states:
            known = state.ids[state.block_start : state.block_start + block_size]
            missing = block_size - len(known)
            ids.append(known + [filler] * (missing + 1))
            undecided.append([token == mask_id for token in known] + [True] * missing + [False])
        is_undecided_BT = torch.tensor(undecided)
        return BlockState(
            ids_BT=torch.tensor(ids).to(device),
            is_undecided_BT=is_undecided_BT.to(device),
            is_masked_BS=is_undecided_BT[:, :-1],
            start_B=torch.tensor([state.block_start for state in states]),
            active_B=[True] * len(states),
        )

    @property
    def seen_BV(self) -> Tensor | None:
        """Visible tokens without the spare column."""
        return None if self.seen_BU is None else self.seen_BU[:, :-1]

    @property
    def ids_BS(self) -> Tensor:
        """The blocks without the spare column."""
        return self.ids_BT[:, :-1]

    def track_seen(self, states: list[SequenceState], vocab_size: int, length: int, mask_id: int | None) -> None:
        """Mark the newest `length` tokens of every sequence as seen."""
        seen_BU = torch.zeros(len(states), vocab_size + 1, dtype=torch.bool)
        for b, state in enumerate(states):
            seen_BU[b, [token for token in state.ids[-length:] if token != mask_id]] = True
        self.seen_BU = seen_BU.to(self.ids_BT.device)

    def write(self, rows_BR: Tensor, decides_BR: Tensor, token_BR: Tensor) -> None:
        """Decide some positions: candidates of other rows go to the spare column."""
        # scatter_ has no "skip": rows that decide nothing write their candidate where nobody reads
        spare = self.ids_BT.shape[1] - 1
        target_BR = rows_BR.where(decides_BR, spare)
        self.ids_BT.scatter_(1, target_BR, token_BR)
        self.is_undecided_BT.scatter_(1, target_BR, False)
        if self.seen_BU is not None:
            self.seen_BU.scatter_(1, token_BR.where(decides_BR, self.seen_BU.shape[1] - 1), True)

    def refresh_active(self) -> bool:
        """Ask the device which sequences have undecided positions left; waits for it. Returns whether any has."""
        # the one host read of a block, for rules that choose their own number of forwards
        self.active_B = self.is_undecided_BT.any(dim=1).tolist()
        return any(self.active_B)
