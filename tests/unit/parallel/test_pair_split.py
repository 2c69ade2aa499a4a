"""Rows of the pair over context-parallel ranks: each once, whole blocks, equal work, and nothing that no loss can see."""

from __future__ import annotations

import pytest
import torch

from bd3_megatron.attention.visibility import positions
from bd3_megatron.diffusion.objective import BlockDiffusion, objective_named
from bd3_megatron.errors import GridError
from bd3_megatron.parallel.pair_split import PairLayout, pair_layout

LENGTH = 48


def all_ranks(block_size: int, cp: int, objective: str = "block") -> list[PairLayout]:
    made = objective_named(objective, block_size=block_size)
    return [pair_layout(made, length=LENGTH, cp=cp, cp_rank=rank, drop_last_clean=False) for rank in range(cp)]


CASES = [(1, 2), (2, 4), (4, 2), (4, 3), (8, 3), (1, 8), (2, 1), (24, 1)]


@pytest.mark.parametrize(("block_size", "cp"), CASES)
def test_every_row_is_held_once(block_size: int, cp: int) -> None:
    layouts = all_ranks(block_size, cp)
    for name in ("noisy_rows", "clean_rows"):
        held = torch.cat([positions(getattr(layout, name)) for layout in layouts])
        assert held.sort().values.tolist() == list(range(LENGTH))
    assert all(layout.num_rows == 2 * LENGTH // cp for layout in layouts)
    assert all(positions(layout.clean_key_rows).tolist() == list(range(LENGTH)) for layout in layouts)


@pytest.mark.parametrize(("block_size", "cp"), CASES)
def test_all_ranks_have_equal_work(block_size: int, cp: int) -> None:
    # the visibility rule itself counts the pairs; it also refuses a noisy block that is cut in two
    pairs = [int(layout.visibility().pair_mask("cpu").sum()) for layout in all_ranks(block_size, cp)]
    assert len(set(pairs)) == 1


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_the_ar_baseline_is_causal_over_all_ranks(cp: int) -> None:
    layouts = all_ranks(16, cp, "ar")
    assert all((layout.block_size, layout.num_noisy) == (1, 0) for layout in layouts)
    assert torch.cat([layout.position_P for layout in layouts]).sort().values.tolist() == list(range(LENGTH))
    assert all(layout.num_loss_rows == layout.num_clean == LENGTH // cp for layout in layouts)


def test_masked_diffusion_has_no_clean_rows() -> None:
    layout = pair_layout(BlockDiffusion(block_size=LENGTH), length=LENGTH)
    assert (layout.num_noisy, layout.num_clean, layout.num_rows) == (LENGTH, 0, LENGTH)


@pytest.mark.parametrize("block_size", [1, 4, 24])
def test_only_rows_that_no_loss_sees_are_dropped(block_size: int) -> None:
    whole = all_ranks(block_size, 1)[0]
    short = pair_layout(BlockDiffusion(block_size=block_size), length=LENGTH)
    kept = LENGTH - block_size
    assert (short.num_noisy, short.num_clean) == (LENGTH, kept)
    mask = whole.visibility().pair_mask("cpu")[0]
    dropped = torch.arange(LENGTH + kept, 2 * LENGTH)
    assert not mask[: LENGTH + kept, dropped].any(), "a row that stays sees one that is dropped"
    stays = torch.arange(LENGTH + kept)
    assert torch.equal(short.visibility().pair_mask("cpu")[0], mask[stays][:, stays])


@pytest.mark.parametrize(("block_size", "cp"), CASES)
def test_rows_are_taken_from_both_streams(block_size: int, cp: int) -> None:
    noisy_BL, clean_BL = torch.arange(2 * LENGTH).view(2, LENGTH), -torch.arange(2 * LENGTH).view(2, LENGTH)
    for layout in all_ranks(block_size, cp):
        split, position = layout.num_noisy, layout.position_P
        rows_BP = layout.rows_of([noisy_BL], clean_BL)
        assert torch.equal(rows_BP[:, :split], noisy_BL[:, position[:split]])
        assert torch.equal(rows_BP[:, split:], clean_BL[:, position[split:]])
        assert torch.equal(layout.loss_rows([noisy_BL]), rows_BP[:, :split])


@pytest.mark.parametrize("block_size", [16, 48])
def test_slices_that_cut_a_block_are_refused(block_size: int) -> None:
    sentence = rf"^cp=2 cuts seq_len=48 into slices of 12, not a multiple of block_size={block_size}; use cp=1"
    with pytest.raises(GridError, match=sentence):
        pair_layout(BlockDiffusion(block_size=block_size), length=LENGTH, cp=2)


def test_without_documents_every_call_gets_one_visibility() -> None:
    layout = pair_layout(BlockDiffusion(block_size=4), length=16)
    assert layout.visibility() is layout.visibility(None)
    documents = torch.zeros(1, 16, dtype=torch.int64)
    assert layout.visibility(documents) is not layout.visibility(documents)
