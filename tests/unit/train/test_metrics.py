"""What a step says of itself: sums by block and by noise level, added once and divided once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bd3_megatron.diffusion.noise_level import Interval
from bd3_megatron.diffusion.objective import BlockDiffusion
from bd3_megatron.diffusion.token_nll import block_losses
from bd3_megatron.model.loss_sums import NUM_BINS, loss_sums
from bd3_megatron.parallel.pair_split import pair_layout
from bd3_megatron.train.batches import Noise, make_micro_batch
from bd3_megatron.train.metrics import StepSums
from tests import tolerances
from tests.unit.cost.cases import case
from tests.unit.train.samples import LENGTH, Samples

NOISE = Noise(seed=1, mask_id=60, group_size=8, block_size=4, interval=Interval())


@pytest.mark.parametrize("cp", [1, 2])
def test_block_sums_are_those_of_the_objective(cp: int) -> None:
    clean, diffusion = Samples().batch_for(torch.arange(8)), case().diffusion
    noisy = NOISE.corrupt(clean, diffusion)
    nll_BL = torch.rand(8, LENGTH, generator=torch.Generator().manual_seed(1))
    found = torch.zeros(8, LENGTH // 4, dtype=torch.float64)
    bins = torch.zeros(2, NUM_BINS, dtype=torch.float64)
    for cp_rank in range(cp):
        layout = pair_layout(BlockDiffusion(block_size=4), length=LENGTH, cp=cp, cp_rank=cp_rank)
        batch = make_micro_batch(clean, NOISE, diffusion, layout).pair
        sums = loss_sums(batch, layout.loss_rows([nll_BL]).t().flatten()[batch.loss_row_R])
        assert torch.equal(sums.weighted_nll_B, sums.weighted_nll_BK.sum(1))
        found += sums.weighted_nll_BK
        bins += sums.bins
    # context-parallel ranks have parts: together they are the whole
    assert torch.allclose(found / 4, block_losses(nll_BL.double(), noisy), atol=tolerances.EXACT_FP64)
    level_BL = noisy.t_BK.repeat_interleave(4, dim=1)[noisy.is_masked_BL]
    counts = torch.histc(level_BL, bins=NUM_BINS, min=0.0, max=1.0)
    assert bins[1].tolist() == counts.tolist() and bins[0].sum().item() == pytest.approx(
        nll_BL[noisy.is_masked_BL].sum().item(), rel=1e-6
    )


def test_full_masking_falls_in_the_last_bin() -> None:
    noise = replace(NOISE, block_size=1, interval=Interval(1.0, 1.0))
    layout = pair_layout(BlockDiffusion(block_size=1), length=LENGTH)
    made = make_micro_batch(Samples().batch_for(torch.arange(2)), noise, case(kind="s1").diffusion, layout)
    bins = loss_sums(made.pair, torch.ones(2 * LENGTH)).bins
    assert bins[:, -1].tolist() == [2 * LENGTH, 2 * LENGTH] and bins[:, :-1].abs().sum() == 0


def test_the_record_names_what_was_summed() -> None:
    bins = torch.zeros(2, NUM_BINS, dtype=torch.float64)
    bins[:, 3] = torch.tensor([12.0, 4.0])
    sums = StepSums(weighted_nll_nats=50.0, token_count=20, masked_count=4, text_count=20, bins=bins)
    # another term is another entry: the bound stays what it is
    with_term = replace(sums, weighted_entropy_nats=5.0).metrics()
    assert with_term == {**sums.metrics(), "loss/confidence_nats_per_token": 0.25}
    assert sums.metrics() == {
        "loss/train_nats_per_token": 2.5,
        "noise/masked_fraction": 0.2,
        "loss/nll_nats_at_t_0.3": 3.0,
    }


def test_a_step_without_tokens_has_loss_zero() -> None:
    sums = StepSums(weighted_nll_nats=0.0, token_count=0, masked_count=0, text_count=0, bins=torch.zeros(2, NUM_BINS))
    assert sums.metrics() == {"loss/train_nats_per_token": 0.0, "noise/masked_fraction": 0.0}
