"""Foreign tensors one by one under plain names: stacks of experts, and LLaDA2's names with its fused q, k, v.

Contract: a `PlainSource` under the plain model's names, whatever the folder's spelling; nothing is copied but what is asked for.
Source: transformers 4.5x (a matrix an expert), 5.x in memory (`gate_up_proj` [E, 2F, D], `down_proj` [E, D, F]); VeOmni's
merged folders (`gate_proj` [E, F, D]); the modelling file of inclusionAI/LLaDA2.0-mini.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bd3_megatron.convert.plain_source import FolderSource

LLADA2_NAMES = {
    "model.word_embeddings.": "model.embed_tokens.",
    ".attention.dense.": ".self_attn.o_proj.",
    ".attention.query_layernorm.": ".self_attn.q_norm.",
    ".attention.key_layernorm.": ".self_attn.k_norm.",
}
"""Parts of LLaDA2's names, and what the plain model says; all others are equal."""
FUSED_QKV = ".attention.query_key_value.weight"
# With and without .weight: parameters of a stack have none, linear layers have.
_STACKED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|gate_proj|up_proj|down_proj)(\.weight)?")
# Gate over up, as transformers 5.x stacks them.
_HALVES: Mapping[str, Mapping[str, int]] = {"gate_up_proj": {"gate_proj": 0, "up_proj": 1}}


@dataclass(frozen=True)
class _Part:
    """Where a plain tensor lies: in an expert of a stack, and there in half `half` of two (None: all of it)."""

    stored: str
    expert: int | None = None
    half: int | None = None
    rows: tuple[int, int] | None = None
    """Of a fused tensor."""


class SplitExperts:
    """A folder's tensors with stacks of experts taken apart.

    Args:
        folder: as stored.
        qkv_rows: rows of q, k and v in LLaDA2's fused tensor; None: a folder with Qwen3's names.
    """

    def __init__(self, folder: FolderSource, *, qkv_rows: tuple[int, int, int] | None = None) -> None:
        self._folder = folder
        self._qkv_rows = qkv_rows
        self._parts: dict[str, _Part] = {}
        # From names and shapes alone; no stack is read yet.
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
        if part.rows is not None:
            return (part.rows[1] - part.rows[0], *shape[1:])
        if part.expert is None:
            return shape
        return shape[1:] if part.half is None else (shape[1] // 2, *shape[2:])

    def tensor(self, name: str) -> Tensor:
        """As PlainSource."""
        part = self._parts[name]
        if part.rows is not None:
            # Only these rows are read: q, k and v need no copy of the whole.
            return self._folder.rows(part.stored, *part.rows)
        if part.expert is None:
            return self._folder.tensor(part.stored)
        if self._last[0] != part.stored:
            # one stack at a time: experts are asked for in turn
            self._last = ("", torch.empty(0))
            self._last = (part.stored, self._folder.tensor(part.stored))
        matrix = self._last[1][part.expert]
        return matrix if part.half is None else matrix.chunk(2)[part.half]

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """As PlainSource, of a table."""
        return self._folder.rows(self._parts[name].stored, start, end)

    def _parts_of(self, stored: str) -> dict[str, _Part]:
        if self._qkv_rows is not None and stored.endswith(FUSED_QKV):
            return self._fused(stored, self._qkv_rows)
        found = _STACKED.fullmatch(stored)
        # A matrix an expert, or no expert at all: under its own name.
        if found is None:
            return {self._plain(stored): _Part(stored)}
        prefix, matrix = found[1], found[2]
        number = self._folder.shape(stored)[0]
        halves: Mapping[str, int | None] = _HALVES.get(matrix, {matrix: None})
        return {
            f"{prefix}.{expert}.{name}.weight": _Part(stored, expert, half)
            for expert in range(number)
            for name, half in halves.items()
        }

    def _plain(self, stored: str) -> str:
        if self._qkv_rows is not None:
            for theirs, ours in LLADA2_NAMES.items():
                stored = stored.replace(theirs, ours)
        return stored

    @staticmethod
    def _fused(stored: str, qkv_rows: tuple[int, int, int]) -> dict[str, _Part]:
        """All heads of q, then those of k, then those of v."""
        parts, start = {}, 0
        for letter, rows in zip("qkv", qkv_rows, strict=True):
            name = stored.replace(FUSED_QKV, f".self_attn.{letter}_proj.weight")
            parts[name] = _Part(stored, rows=(start, start + rows))
            start += rows
        return parts
