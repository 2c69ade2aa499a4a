"""Experts of a foreign folder one by one: folders store each expert's matrices, or all of a layer's stacked in one tensor.

Contract: a `PlainSource` under the plain model's names, whatever the folder's spelling; nothing is copied but what is asked for.
Source: transformers 4.5x (a matrix an expert), 5.x in memory (`gate_up_proj` [E, 2F, D], `down_proj` [E, D, F]).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from bd3_megatron.convert.plain_source import FolderSource

_STACKED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|gate_proj|up_proj|down_proj)(\.weight)?")


@dataclass(frozen=True)
class _Part:
    """Where a plain tensor lies: in an expert of a stack, and there in half `half` of two (None: all of it)."""

    stored: str
    expert: int | None = None
    half: int | None = None


class SplitExperts:
    """A folder's tensors with stacks of experts taken apart.

    Args:
        folder: as stored.
    """

    def __init__(self, folder: FolderSource) -> None:
        self._folder = folder
        self._parts: dict[str, _Part] = {}
        for stored in folder.names():
            self._parts |= self._parts_of(stored)
        self._last: tuple[str, Tensor] = ("", torch.empty(0))

    def names(self) -> list[str]:
        """As PlainSource."""
        return list(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """As PlainSource."""
        part = self._parts[name]
        shape = self._folder.shape(part.stored)
        if part.expert is None:
            return shape
        return shape[1:] if part.half is None else (shape[1] // 2, *shape[2:])

    def tensor(self, name: str) -> Tensor:
        """As PlainSource."""
        part = self._parts[name]
        if part.expert is None:
            return self._folder.tensor(part.stored)
        if self._last[0] != part.stored:
            # one stack at a time: experts are asked for in turn
            self._last = ("", torch.empty(0))
            self._last = (part.stored, self._folder.tensor(part.stored))
        matrix = self._last[1][part.expert]
        return matrix if part.half is None else matrix.chunk(2)[part.half]

    def _parts_of(self, stored: str) -> dict[str, _Part]:
        found = _STACKED.fullmatch(stored)
        if found is None:
            return {stored: _Part(stored)}
        prefix, kind = found[1], found[2]
        number = self._folder.shape(stored)[0]
        halves = {"gate_proj": 0, "up_proj": 1} if kind == "gate_up_proj" else {kind: None}
        return {
            f"{prefix}.{expert}.{name}.weight": _Part(stored, expert, half)
            for expert in range(number)
            for name, half in halves.items()
        }
