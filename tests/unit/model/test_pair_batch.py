"""A micro-batch's rows: what stands where, which rows carry loss, and where their positions restart."""

from __future__ import annotations

import pytest
import torch

from bd3_megatron.data.batch import CleanBatch
from bd3_megatron.diffusion.noise_level import Interval
from bd3_megatron.diffusion.objective import BlockDiffusion, NextToken
from bd3_megatron.model.pair_batch import PairBatch, pair_batch
from bd3_megatron.parallel.pair_split import PairLayout, pair_layout
from bd3_megatron.train.batches import Noise
from tests.unit.cost.cases import case

L, S, MASK_ID = 16, 2, 30


def clean_batch() -> CleanBatch:
    """Two samples; the first has documents of 6 and 10, the second of 12 and 4, and positions that restart there."""
    cuts = torch.tensor([[6], [12]])
    document_BL = (torch.arange(L)[None] >= cuts).long()
    position_BL = torch.arange(L)[None] - cuts * document_BL
    generator = torch.Generator().manual_seed(1)
    tokens_BL = torch.randint(0, MASK_ID, (2, L), generator=generator)
    return CleanBatch(
        tokens_BL=tokens_BL, index_B=torch.tensor([4, 5]), document_id_BL=document_BL, position_BL=position_BL
    )


def made(layout: PairLayout, clean: CleanBatch) -> PairBatch:
    noise = Noise(seed=1, mask_id=MASK_ID, group_size=8, block_size=layout.block_size, interval=Interval())
    return pair_batch(clean, [noise.corrupt(clean, case().diffusion)], layout)


@pytest.mark.parametrize(("cp", "cp_rank"), [(1, 0), (2, 0), (2, 1)])
def test_positions_restart_with_documents_in_both_streams(cp: int, cp_rank: int) -> None:
    layout, clean = pair_layout(BlockDiffusion(block_size=S), length=L, cp=cp, cp_rank=cp_rank), clean_batch()
    batch = made(layout, clean)
    assert clean.position_BL is not None
    expected = clean.position_BL[:, layout.position_P].t()
    assert torch.equal(batch.position_PB, expected)
    # documents stay whole: the visibility rule asks for those of every key
    assert batch.visibility.document_id_BL is clean.document_id_BL


def test_without_documents_positions_are_those_of_the_rows() -> None:
    layout = pair_layout(BlockDiffusion(block_size=S), length=L, drop_last_clean=False)
    plain = CleanBatch(tokens_BL=clean_batch().tokens_BL, index_B=torch.tensor([4, 5]))
    assert made(layout, plain).position_PB.tolist() == [*range(L), *range(L)]


@pytest.mark.parametrize(("cp", "cp_rank"), [(1, 0), (2, 1)])
def test_loss_rows_point_at_mask_tokens(cp: int, cp_rank: int) -> None:
    layout, clean = pair_layout(BlockDiffusion(block_size=S), length=L, cp=cp, cp_rank=cp_rank), clean_batch()
    batch = made(layout, clean)
    row, sample = batch.loss_row_R // batch.batch_size, batch.loss_row_R % batch.batch_size
    assert (batch.token_BP[sample, row] == MASK_ID).all()
    assert len(batch.loss_row_R) == (batch.token_BP == MASK_ID).sum()
    position = layout.position_P[row]
    assert torch.equal(batch.target_R, clean.tokens_BL[sample, position])
    assert torch.equal(batch.block_R, position // S) and batch.num_blocks == L // S
    assert batch.weight_R.dtype == batch.level_R.dtype == torch.float32
    assert torch.allclose(batch.weight_R, 1 / batch.level_R)


def test_the_ar_baseline_has_one_stream_and_no_mask_token() -> None:
    layout, clean = pair_layout(NextToken(), length=L), clean_batch()
    batch = pair_batch(clean, [], layout)
    (rows,) = NextToken().loss_rows(clean.tokens_BL, [], document_id_BL=clean.document_id_BL)
    assert torch.equal(batch.token_BP, clean.tokens_BL)
    assert torch.equal(batch.target_R, rows.target_BL.t()[rows.has_loss_BL.t()])
    assert len(batch.target_R) == 2 * L - 4, "no prediction crosses from one document to the next"
    assert batch.weight_R.unique().tolist() == batch.level_R.unique().tolist() == [1.0]


def test_a_moved_batch_is_the_same_batch() -> None:
    batch = made(pair_layout(BlockDiffusion(block_size=S), length=L), clean_batch())
    moved = batch.to(torch.device("cpu"))
    for name, value in vars(batch).items():
        same = (
            torch.equal(value, getattr(moved, name))
            if isinstance(value, torch.Tensor)
            else value == getattr(moved, name)
        )
        assert same, name
