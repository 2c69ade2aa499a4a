"""What the record says of experts: entropies of their loads, of all rows and of masked ones, and the router's terms."""

from __future__ import annotations

import torch

from bd3_megatron.compat.device import HostCopy
from bd3_megatron.config.experts import ExpertsConfig
from bd3_megatron.model.loss_sums import NUM_BINS
from bd3_megatron.train.metrics import PendingLoads


def record(**fields: float) -> dict[str, float]:
    """Of two layers, one of them with experts: even over all rows; masked rows choose one of four at t 0.3, two at t 0.9."""
    experts = ExpertsConfig(number=4, top_k=1, width=8, leading_dense_layers=1, **fields)
    table = torch.zeros(2, (1 + NUM_BINS) * 4 + 2, dtype=torch.float64)
    counts_TE = table[1, :-2].view(1 + NUM_BINS, 4)
    counts_TE[0] = 5
    counts_TE[1 + 3] = torch.tensor([2.0, 0, 0, 0])
    counts_TE[1 + 9] = torch.tensor([1.0, 1, 0, 0])
    table[1, -2:] = torch.tensor([1.5, 2.0])
    return PendingLoads(HostCopy(table), experts).metrics()


def test_entropies_say_how_alike_rows_choose() -> None:
    found = record()
    assert found["experts/load_entropy_layer_01"] == 1.0 and found["experts/largest_load_share_layer_01"] == 0.25
    assert found["experts/masked_load_entropy_at_t_0.3"] == 0.0
    assert found["experts/masked_load_entropy_at_t_0.9"] == 0.5
    assert 0 < found["experts/masked_load_entropy_layer_01"] < 0.5
    # neither a layer without experts nor a level without rows, nor terms that are not in the loss
    assert len(found) == 5


def test_terms_are_recorded_without_their_factors() -> None:
    assert record(balance_loss=0.1)["experts/balance_term"] == 1.5
    assert record(z_loss=0.1)["experts/z_term"] == 2.0
