"""Which positions a block may look back on, and where their keys lie: the absolute block grid and the two windows.

Decides slots, rotary positions and visible prefixes (one `end` a row) for any mixture of sequences. Pure integer
arithmetic on the host: no tensor here waits for a device. While a text is shorter than the trained length L the two
windows do not differ; beyond it see `WINDOWS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache_bd3 import RowPlan


@dataclass
class SequenceState:
    """Where one sequence stands: what is known, and what of it is in the cache."""

    ids: list[int]
    """every token so far; mask ids where a position is still to be filled"""
    block_start: int
    """first position of the block being filled, a multiple of S"""
    committed: int = 0
    """positions below this have their keys in the cache (those in the window)"""
    window_start: int = 0
    """position that has rotary position 0 in the cache"""


@dataclass(frozen=True)
class Layout:
    """The rows of a block's first forward: C clean rows to commit (left-aligned, padded), then W rows of the block."""

    clean_ids_BC: Tensor
    plan: RowPlan
    """of the C + W rows"""
    block_plan: RowPlan | None
    """of the W rows alone, for the block's other forwards; None where no block is looked at"""
    num_clean_B: list[int]


@dataclass(frozen=True)
class Window(ABC):
    """Arithmetic of one kind of window.

    Args:
        length: L, the most tokens visible at once.
        block_size: S of the grid.
        block_rows: rows of the block in a forward: S, or 0 for autoregressive models, which have no noisy rows.
        capacity: slots of the cache without the bin; min(L, tokens ever) rounded up to S.
        span_multiple: spans are rounded up to this (for fixed shapes on a GPU); 1 = exact.
    """

    length: int
    block_size: int
    block_rows: int
    capacity: int
    span_multiple: int = 1

    @abstractmethod
    def enter_block(self, state: SequenceState) -> None:
        """Move a sequence's window to its current block, before its clean rows are committed."""

    def commit_stop(self, state: SequenceState, max_rows: int) -> int:
        """Where the next forward's clean rows of a sequence must end: its block's start, or earlier.

        Earlier when more than `max_rows` are due, and under eviction where they would overwrite keys that rows of the
        same forward still see: then up to the end of the ring, and block by block beyond it.
        """
        # whole blocks only: a clean row sees its own block to the end, so a block must be committed in one forward
        due = state.block_start - state.committed
        allowed = max_rows // self.block_size * self.block_size if due > max_rows else due
        return state.committed + min(due, max(self._free_rows(state, allowed), self.block_size))

    @abstractmethod
    def _free_rows(self, state: SequenceState, allowed: int) -> int:
        """Of so many clean rows those that one forward may commit without overwriting what it sees."""

    @abstractmethod
    def clean_rows(self, position_BR: Tensor, window_start_B1: Tensor) -> Tensor:
        """(rotary position, slot, end) of clean positions, int64 [3, B, R]."""

    def block_rows_of(self, block_start_B1: Tensor, window_start_B1: Tensor) -> Tensor:
        """(rotary position, slot, end) of the blocks' own rows, int64 [3, B, block_rows]."""
        offset_R = torch.arange(self.block_rows)
        position_B1, first_B1 = self._block_position_and_slot(block_start_B1, window_start_B1)
        end_BR = (first_B1 + self.block_rows).expand(-1, self.block_rows)
        return torch.stack([position_B1 + offset_R, first_B1 + offset_R, end_BR])

    @abstractmethod
    def _block_position_and_slot(self, block_start_B1: Tensor, window_start_B1: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary position and slot of the blocks' first rows."""

    def layout(
        self, states: list[SequenceState], stop_B: list[int], device: torch.device, *, with_block: bool
    ) -> Layout:
        """Rows of a forward that commits [committed, stop) of every sequence and, if asked, looks at its block.

        Args:
            states: the batch.
            stop_B: where each sequence's clean rows end.
            device: where the tensors go.
            with_block: append the rows of the blocks being filled.
        """
        count_B = [stop - state.committed for state, stop in zip(states, stop_B, strict=True)]
        width = max(count_B)
        first_B1 = torch.tensor([[state.committed] for state in states])
        window_start_B1 = torch.tensor([[state.window_start] for state in states])
        offset_C = torch.arange(width)
        table_3BR = self.clean_rows(first_B1 + offset_C, window_start_B1)
        if min(count_B) < width:
            # Padding rows: token 0 at position 0, written to the bin, seeing slot 0 (zeros or real, never NaN).
            is_real_BC = offset_C < torch.tensor(count_B)[:, None]
            padding_311 = torch.tensor([0, self.capacity, 1])[:, None, None]
            table_3BR = torch.where(is_real_BC, table_3BR, padding_311)
        ids = [
            state.ids[state.committed : stop] + [0] * (width - count)
            for state, stop, count in zip(states, stop_B, count_B, strict=True)
        ]
        block_plan = None
        if with_block:
            block_start_B1 = torch.tensor([[state.block_start] for state in states])
            block_3BR = self.block_rows_of(block_start_B1, window_start_B1)
            table_3BR = torch.cat([table_3BR, block_3BR], dim=2)
            block_plan = self.row_plan(block_3BR, device)
        return Layout(
            clean_ids_BC=torch.tensor(ids, dtype=torch.int64).to(device),
            plan=self.row_plan(table_3BR, device),
            block_plan=block_plan,
            num_clean_B=count_B,
        )

    def row_plan(self, table_3BR: Tensor, device: torch.device) -> RowPlan:
        """The plan of rows whose (position, slot, end) are given on the host; finds the cheap form where it holds."""
        exact_span = int(table_3BR[2].max())
        span = min(-(-exact_span // self.span_multiple) * self.span_multiple, self.capacity)
        slot_BR = table_3BR[1]
        first_slot, rows = int(slot_BR[0, 0]), slot_BR.shape[1]
        is_fixed_shape = self.span_multiple > 1
        is_same_place = not is_fixed_shape and bool((table_3BR == table_3BR[:, :1]).all())
        is_range = is_same_place and bool((slot_BR[0] == first_slot + torch.arange(rows)).all())
        kept = table_3BR[:, :1] if is_same_place else table_3BR
        return RowPlan(
            position_BR=kept[0].to(device),
            slots=slice(first_slot, first_slot + rows) if is_range else slot_BR.to(device),
            end_BR=kept[2].to(device),
            span=span,
            is_uniform=not is_fixed_shape and bool((table_3BR[2] == span).all()),
        )


@dataclass(frozen=True)
class RecomputedWindow(Window):
    """The newest L - S tokens, encoded anew for every block with positions from 0, as if the text began there.

    Exact for the model; costs a pass over L rows a block.
    """

    def enter_block(self, state: SequenceState) -> None:
        oldest = max(0, state.block_start - (self.length - self.block_rows))
        if state.window_start != oldest:
            state.window_start, state.committed = oldest, oldest

    def _free_rows(self, state: SequenceState, allowed: int) -> int:
        return allowed

    def clean_rows(self, position_BR: Tensor, window_start_B1: Tensor) -> Tensor:
        block_end_BR = (position_BR // self.block_size + 1) * self.block_size
        inside_BR = position_BR - window_start_B1
        return torch.stack([inside_BR, inside_BR, block_end_BR - window_start_B1])

    def _block_position_and_slot(self, block_start_B1: Tensor, window_start_B1: Tensor) -> tuple[Tensor, Tensor]:
        inside_B1 = block_start_B1 - window_start_B1
        return inside_B1, inside_B1


@dataclass(frozen=True)
class EvictedWindow(Window):
    """The oldest block's keys are overwritten, the others stay.

    Cheap, and not what the model would compute anew: kept keys were made while now forgotten tokens were visible, so
    older information leaks through.
    """

    @property
    def ring(self) -> int:
        """Slots for finished blocks."""
        return self.capacity - self.block_rows

    def enter_block(self, state: SequenceState) -> None:
        # Without slots for a finished block (S = L) none is ever seen, so none is committed.
        state.committed = state.block_start if self.ring == 0 else state.committed

    def _free_rows(self, state: SequenceState, allowed: int) -> int:
        if state.block_start <= self.ring:
            return allowed
        free = self.ring - state.committed if state.committed < self.ring else self.block_size
        return min(allowed, free)

    def clean_rows(self, position_BR: Tensor, window_start_B1: Tensor) -> Tensor:
        block_end_BR = (position_BR // self.block_size + 1) * self.block_size
        return torch.stack([position_BR, position_BR % max(self.ring, 1), block_end_BR.clamp(max=self.ring)])

    def _block_position_and_slot(self, block_start_B1: Tensor, window_start_B1: Tensor) -> tuple[Tensor, Tensor]:
        # positions go on past L: rotary attention depends on differences only
        return block_start_B1, block_start_B1.clamp(max=self.ring)


# A model trained on L tokens sees at most L: the block being filled (S) and the L - S tokens before it. Beyond L:
WINDOWS: dict[str, type[Window]] = {"recomputed": RecomputedWindow, "evicted": EvictedWindow}
