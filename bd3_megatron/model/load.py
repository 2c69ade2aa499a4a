"""Which rows are counted in the load of experts: the same on every grid and with every switch that skips rows.

Contract: a row is counted where every grid computes it. Padding and the last clean block, which some grids drop, never are;
in the last layer, where some grids compute nothing else, the rows that carry loss are and no others. Of the other layers'
rows the configuration takes both streams or one; where a model has one stream only, that one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bd3_megatron.model.loss_sums import NUM_BINS, level_bins
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


@dataclass(frozen=True)
class LayerRows:
    """What is known of the R rows that a layer was handed on this rank."""

    counts_R: Tensor
    """int64, 1 where a row is counted in the load."""
    bin_R: Tensor
    """int64, bin of the noise level of a row that carries loss; NUM_BINS elsewhere."""
    sample_R: Tensor
    """int64, which sample of the micro-batch."""
    num_samples: int


@dataclass
class CountedRows:
    """The rows that one layer counts.

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

    def of(self, layout: PairLayout, batch: PairBatch) -> LayerRows:
        """The rows of a micro-batch that the layer is handed.

        Args:
            layout: of the phase.
            batch: whose rows they are.
        """
        here, ranks = self.part
        bin_R, num_samples = level_bins(batch.level_R), batch.batch_size
        if self.is_trimmed:
            # It is handed exactly the rows that carry loss, dealt out one by one.
            row_r, bin_r = batch.loss_row_R[here::ranks], bin_R[here::ranks]
            return LayerRows(torch.ones_like(row_r), bin_r, row_r % num_samples, num_samples)
        device, size = batch.loss_row_R.device, layout.num_rows * num_samples
        bin_n = torch.full((size,), NUM_BINS, dtype=torch.int64, device=device).index_copy_(0, batch.loss_row_R, bin_R)
        if self.is_last:
            counts_n = (bin_n < NUM_BINS).long()
        else:
            counts_n = self._positions(layout, device).repeat_interleave(num_samples, output_size=size)
            # Padding is end tokens by the thousand, which would all go to the same experts.
            counts_n = counts_n if batch.is_text_PB is None else counts_n * batch.is_text_PB.flatten()
        sample_n = torch.arange(size, device=device) % num_samples
        # As sequence parallelism cuts the rows of the layer.
        counts_R, bin_R, sample_R = (whole_n.chunk(ranks)[here] for whole_n in (counts_n, bin_n, sample_n))
        return LayerRows(counts_R, bin_R, sample_R, num_samples)

    def _positions(self, layout: PairLayout, device: torch.device) -> Tensor:
        # sent to the device once a phase
        if self._of is not layout:
            self._of, self._mask_P = layout, counted_positions(layout, self.rows).long().to(device)
        return self._mask_P
