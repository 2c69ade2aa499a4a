"""Which rows are counted in the load of experts: the same on every grid and with every switch that skips rows.

Contract: a row is counted where every grid computes it. Padding and the last clean block, which some grids drop, never are;
in the last layer, where some grids compute nothing else, the rows that carry loss are and no others. Of the other layers'
rows the configuration takes both streams or one; where a model has one stream only, that one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bd3_megatron.model.pair_batch import PairBatch
from bd3_megatron.parallel.pair_split import PairLayout


def counted_positions(layout: PairLayout, rows: str) -> Tensor:
    """Of every row of a rank, whether layers before the last count it where it is text: bool [P].

    Args:
        layout: of the phase.
        rows: both, noisy or clean.
    """
    if not layout.num_noisy or not layout.num_clean:
        return torch.ones(layout.num_rows, dtype=torch.bool)
    is_noisy_P = torch.arange(layout.num_rows) < layout.num_noisy
    is_live_clean_P = ~is_noisy_P & (layout.position_P < layout.length - layout.block_size)
    return {"both": is_noisy_P | is_live_clean_P, "noisy": is_noisy_P, "clean": is_live_clean_P}[rows]


@dataclass
class CountedRows:
    """The rows that one layer counts, as a mask over its rows on this rank.

    Args:
        rows: both, noisy or clean.
        is_last: the layer is the model's last.
        part: (this rank, ranks) that the rows of a sequence are cut over by sequence parallelism.
    """

    rows: str
    is_last: bool
    part: tuple[int, int]
    is_trimmed: bool = False
    """The layer is handed rows that carry loss alone."""
    _of: PairLayout | None = field(init=False, default=None)
    _mask_P: Tensor = field(init=False, default_factory=lambda: torch.empty(0))

    def mask(self, layout: PairLayout, batch: PairBatch, num_rows: int) -> Tensor:
        """int64 [num_rows], 1 where a row counts.

        Args:
            layout: of the phase.
            batch: whose rows they are.
            num_rows: that the layer was handed, all samples together.
        """
        device, size = batch.loss_row_R.device, layout.num_rows * batch.batch_size
        # It is handed exactly the rows that carry loss.
        if self.is_trimmed:
            return torch.ones(num_rows, dtype=torch.int64, device=device)
        if self.is_last:
            whole = torch.zeros(size, dtype=torch.int64, device=device).index_fill_(0, batch.loss_row_R, 1)
        else:
            whole = self._positions(layout, device).repeat_interleave(batch.batch_size, output_size=size)
            # Padding is end tokens by the thousand, which would all go to the same experts.
            whole = whole if batch.is_text_PB is None else whole * batch.is_text_PB.flatten()
        # As sequence parallelism cuts the rows of the layer.
        return whole.chunk(self.part[1])[self.part[0]]

    def _positions(self, layout: PairLayout, device: torch.device) -> Tensor:
        # sent to the device once a phase
        if self._of is not layout:
            self._of, self._mask_P = layout, counted_positions(layout, self.rows).long().to(device)
        return self._mask_P
