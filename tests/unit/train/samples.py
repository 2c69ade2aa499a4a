"""Samples as a function of their index, and a micro-batch taken apart into what stands where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bd3_megatron.data.batch import CleanBatch
from bd3_megatron.data.loader import BatchLoader, BatchSource
from bd3_megatron.model.pair_batch import PairBatch
from bd3_megatron.parallel.pair_split import PairLayout
from bd3_megatron.train.dataset import DataState, Indices, RowReading
from bd3_megatron.train.plan import RunPlan

LENGTH, WORDS = 32, 60


class Samples:
    """A source whose dataset has `num_rows` rows: index i holds row i modulo that."""

    def __init__(self, num_rows: int = 1000, *, padded: bool = False) -> None:
        self.num_rows, self._padded = num_rows, padded

    def batch_for(self, index_B: Tensor) -> CleanBatch:
        """As data.loader.BatchSource."""
        rows = index_B % self.num_rows
        tokens_BL = (rows[:, None] * 7 + torch.arange(LENGTH) ** 2) % WORDS
        padding_BL = torch.arange(LENGTH) >= LENGTH - rows[:, None] % 9 if self._padded else None
        return CleanBatch(tokens_BL=tokens_BL, index_B=index_B, is_padding_BL=padding_BL)


@dataclass(frozen=True)
class SourceRows:
    """Training rows of any source, as StepBatches reads them; nothing is remembered of them."""

    source: BatchSource

    def read(self, plan: RunPlan, indices: Indices, *, workers: int, saved: DataState | None) -> RowReading:
        """As train.dataset.TrainingRows."""
        return RowReading(iter(BatchLoader(self.source, indices(), num_workers=workers)), dict)


def rows_by_place(
    batch: PairBatch, index_B: Tensor, layout: PairLayout
) -> tuple[dict[Any, Any], dict[Any, tuple[float, ...]]]:
    """({(index, stream, position): token}, {(index, position): (target, weight, t, block)}), exact numbers."""
    index, position = index_B.tolist(), layout.position_P.tolist()
    tokens = {}
    for row, sample in enumerate(index):
        for place, token in enumerate(batch.token_BP[row].tolist()):
            tokens[sample, "noisy" if place < layout.num_noisy else "clean", position[place]] = token
    noise = {}
    columns = (batch.loss_row_R, batch.target_R, batch.weight_R, batch.level_R, batch.block_R)
    for row, *numbers in zip(*(column.tolist() for column in columns), strict=True):
        noise[index[row % len(index)], position[row // len(index)]] = tuple(numbers)
    return tokens, noise
