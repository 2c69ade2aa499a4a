"""The visibility rule: who may see whom in the pair [noisy; clean], and across documents.

Training's statement of the rule is `sees`, and `Visibility` is the rule for the rows that one rank holds. The tables of the
backends (`tiles`, `intervals`, `rectangles`) reach the same answers by arithmetic and tests hold them to `sees`; so is the
second, independent statement that travels with an exported model. Refuses rows out of range, a noisy block cut in two,
missing keys, and document ids that are not on the host.
Source: BD3-LM (arXiv 2503.09573), vectorised training; models/dit.py of kuleshov-group/bd3lms, block_diff_mask.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from bd3_megatron.errors import RangeError, ShapeError, check_multiple

Rows = tuple[tuple[int, int], ...]
Table = TypeVar("Table")


def sees(
    *,
    q_is_noisy: bool | Tensor,
    q_block: Tensor,
    k_is_noisy: bool | Tensor,
    k_block: Tensor,
    q_document: Tensor | None = None,
    k_document: Tensor | None = None,
) -> Tensor:
    """Whether a query row sees a key row. Everything broadcasts.

    noisy -> noisy: the same block, which is denoised as one. noisy -> clean: blocks before its own. clean -> clean: blocks
    up to its own (S = 1 is causal). clean -> noisy: never, or the context would depend on the draw. With documents only
    inside one document, also where two of them share a block.

    Args:
        q_is_noisy, k_is_noisy: bool, or bool tensor: the half the row belongs to.
        q_block, k_block: int tensor: position // block_size.
        q_document, k_document: int tensor: document id of the row; both or neither.

    Returns:
        bool tensor of the broadcast shape.
    """
    q_noisy = torch.as_tensor(q_is_noisy, device=q_block.device)
    k_noisy = torch.as_tensor(k_is_noisy, device=q_block.device)
    same_block = q_block == k_block
    past_block = k_block < q_block
    # one expression without branches: FlexAttention compiles this very function into its kernels
    visible = torch.where(k_noisy, q_noisy & same_block, past_block | (~q_noisy & same_block))
    if q_document is not None and k_document is not None:
        visible = visible & (q_document == k_document)
    return visible


@dataclass(frozen=True, eq=False)
class Visibility:
    """The visibility rule for the rows that one rank holds.

    Raises:
        ConfigError: `length` is not a multiple of `block_size`.
        RangeError: rows that overlap or leave [0, length), a noisy block cut in two, clean keys that are missing.
        ShapeError: documents that are not int [B, length].
    """

    block_size: int
    """S, positions in a diffusion block; divides `length`."""
    length: int
    """L, clean positions of a whole sequence, over all context-parallel ranks."""
    noisy_rows: Rows
    """Half-open ranges of positions whose noisy rows are queries (and noisy keys) here; () = no noisy stream."""
    clean_rows: Rows
    """Half-open ranges of positions whose clean rows are queries here; () = none."""
    clean_key_rows: Rows
    """Half-open ranges of positions whose clean keys are here; = clean_rows unless gathered by context parallelism."""
    document_id_BL: Tensor | None = None
    """int [B, L] on the host, the document of every position of the whole sequence; None = all one document."""
    # the tables die with the visibility, so that none outlives a micro-batch's documents
    _tables: dict[Hashable, object] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_multiple("length", self.length, "block_size", self.block_size)
        for name in ("noisy_rows", "clean_rows", "clean_key_rows"):
            self._check_rows(name, getattr(self, name))
        cut = [edge for pair in self.noisy_rows for edge in pair if edge % self.block_size]
        if cut:
            raise RangeError(
                f"noisy_rows end at position {cut[0]}, inside a block of block_size={self.block_size}; "
                f"use multiples of {self.block_size}, since a noisy row sees all of its block."
            )
        self._check_keys()
        documents = self.document_id_BL
        if documents is not None and (
            documents.dim() != 2 or documents.shape[1] != self.length or documents.is_floating_point()
        ):
            raise ShapeError(
                f"document_id_BL is {documents.dtype} {list(documents.shape)}; expected integers [any, {self.length}]."
            )
        # ids on a GPU would be read back by every layer, and the host would wait for the device each time
        if documents is not None and documents.device.type != "cpu":
            raise ShapeError(f"document_id_BL is on {documents.device}; keep document ids on the host (cpu).")

    @classmethod
    def pair(cls, length: int, block_size: int, documents: Tensor | None = None) -> Visibility:
        """Both halves of whole sequences: block-diffusion training."""
        rows = ((0, length),)
        return cls(block_size, length, rows, rows, rows, documents)

    @classmethod
    def noisy_only(cls, length: int, documents: Tensor | None = None) -> Visibility:
        """One block of the whole length and no clean half: masked diffusion (MDLM) is S = L."""
        return cls(length, length, ((0, length),), (), (), documents)

    @classmethod
    def clean_only(cls, length: int, block_size: int, documents: Tensor | None = None) -> Visibility:
        """Clean rows alone, block-causal: inference, and with block_size = 1 the autoregressive baseline."""
        rows = ((0, length),)
        return cls(block_size, length, (), rows, rows, documents)

    def table(self, name: Hashable, build: Callable[[], Table]) -> Table:
        """What a backend derives from this visibility, built when first asked for and kept as long as the visibility.

        Args:
            name: of the table; whatever it depends on beside the visibility is part of it.
            build: makes the table.
        """
        if name not in self._tables:
            self._tables[name] = build()
        return self._tables[name]  # type: ignore[return-value]

    @cached_property
    def without_clean_queries(self) -> Visibility:
        """Noisy rows alone ask, of the same keys: the last layer, and every noisy view but the first."""
        # clean keys stay, for noisy rows still see them; the copy begins without tables, which depend on the rows
        return replace(self, clean_rows=())

    @cached_property
    def document_layouts(self) -> list[list[int]] | None:
        """Document ids of every sequence as plain numbers, or None without documents."""
        # read once: the tables of every backend walk the ids as Python numbers
        return None if self.document_id_BL is None else self.document_id_BL.tolist()

    def block_of(self, position: Tensor) -> Tensor:
        """The diffusion block of positions (int tensor in [0, L))."""
        return torch.div(position, self.block_size, rounding_mode="floor")

    def mask(self, *, q_is_noisy: bool, k_is_noisy: bool, device: torch.device | str = "cpu") -> Tensor:
        """Who sees whom between two halves, row by row.

        Returns:
            bool [B, Q, K] (B = 1 without documents) over the query rows and key rows held here.
        """
        q_position = positions(self.noisy_rows if q_is_noisy else self.clean_rows, device)
        k_position = positions(self.noisy_rows if k_is_noisy else self.clean_key_rows, device)
        documents = None if self.document_id_BL is None else self.document_id_BL.to(device)
        return sees(
            q_is_noisy=q_is_noisy,
            q_block=self.block_of(q_position)[None, :, None],
            k_is_noisy=k_is_noisy,
            k_block=self.block_of(k_position)[None, None, :],
            q_document=None if documents is None else documents[:, q_position, None],
            k_document=None if documents is None else documents[:, None, k_position],
        )

    def pair_mask(self, device: torch.device | str = "cpu") -> Tensor:
        """The mask over [noisy; clean] query rows and [noisy; clean] key rows: bool [B, Q, K]."""
        return torch.cat([self.queries_mask(q_is_noisy=q, device=device) for q in (True, False)], dim=1)

    def queries_mask(self, *, q_is_noisy: bool, device: torch.device | str = "cpu") -> Tensor:
        """The mask of one half's queries over [noisy; clean] key rows: bool [B, Q, K]."""
        halves = [self.mask(q_is_noisy=q_is_noisy, k_is_noisy=k, device=device) for k in (True, False)]
        return torch.cat(halves, dim=2)

    def _check_rows(self, name: str, rows: Rows) -> None:
        previous = 0
        for start, stop in rows:
            if not previous <= start < stop <= self.length:
                raise RangeError(
                    f"{name}={rows} is not a rising list of disjoint, non-empty ranges inside [0, {self.length}); "
                    f"use ((start, stop), ...) with start < stop."
                )
            previous = stop

    def _check_keys(self) -> None:
        """Every clean key that some query row must see is present: [0, first position nobody here looks at)."""
        # a noisy block sees clean keys up to its own start, a clean row up to the end of its block
        noisy_end = max((stop for _, stop in self.noisy_rows), default=self.block_size) - self.block_size
        clean_end = max((-(-stop // self.block_size) * self.block_size for _, stop in self.clean_rows), default=0)
        needed, present = max(noisy_end, clean_end), 0
        for start, stop in self.clean_key_rows:
            # only keys without a gap count: backends index clean keys by position
            present = stop if start == present else present
        if present < needed:
            raise RangeError(
                f"clean_key_rows={self.clean_key_rows} lack positions {present} to {needed - 1}, which the query rows "
                f"see; give keys for all of [0, {needed})."
            )


def positions(rows: Rows, device: torch.device | str = "cpu") -> Tensor:
    """The positions of a list of half-open ranges, in order: int64 [number of rows]."""
    ranges = [torch.arange(start, stop, device=device) for start, stop in rows]
    return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64, device=device)


def num_rows(rows: Rows) -> int:
    """How many positions a list of half-open ranges holds."""
    return sum(stop - start for start, stop in rows)


def on_device(table: Tensor, device: torch.device) -> Tensor:
    """A tensor made on the host, on `device`; the host does not wait for the device."""
    if device.type != "cuda":
        return table.to(device)
    # from pageable memory the copy would first let the device finish all that it was given
    return table.pin_memory().to(device, non_blocking=True)
