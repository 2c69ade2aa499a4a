"""The visibility rule equals a mask written out by hand, the official mask, and holds for every split of the rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bd3_megatron.attention.visibility import Rows, Visibility, num_rows, positions
from bd3_megatron.errors import ConfigError, RangeError, ShapeError

GOLDEN = Path(__file__).parents[2] / "golden"
L = 32


def by_hand(length: int, block_size: int, documents: list[int] | None = None) -> torch.Tensor:
    """The mask over [noisy; clean], one pair of rows at a time."""
    mask = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    for q in range(2 * length):
        for k in range(2 * length):
            q_position, k_position = q % length, k % length
            q_block, k_block = q_position // block_size, k_position // block_size
            if q < length and k < length:
                visible = q_block == k_block
            elif q < length:
                visible = k_block < q_block
            elif k < length:
                visible = False
            else:
                visible = k_block <= q_block
            if documents is not None and documents[q_position] != documents[k_position]:
                visible = False
            mask[q, k] = visible
    return mask


@pytest.mark.parametrize("block_size", [1, 4, 8, 16, L])
def test_the_pair_mask_equals_the_mask_written_by_hand(block_size: int) -> None:
    mask = Visibility.pair(L, block_size).pair_mask()
    assert mask.shape == (1, 2 * L, 2 * L)
    assert torch.equal(mask[0], by_hand(L, block_size))
    assert mask.double().mean().item() == 1 / 4 + block_size / (4 * L)


@pytest.mark.parametrize("block_size", [1, 4, 12])
def test_documents_are_islands_wherever_their_seams_fall(block_size: int) -> None:
    rows = [[0] * 5 + [1] * 12 + [2] * 7, [4] * 8 + [9] * 16]
    mask = Visibility.pair(24, block_size, torch.tensor(rows)).pair_mask()
    for got, documents in zip(mask, rows, strict=True):
        assert torch.equal(got, by_hand(24, block_size, documents))


@pytest.mark.parametrize("block_size", [4, 16])
def test_the_mask_is_the_official_one(block_size: int) -> None:
    name = f"bd3lm_tiny_bs{block_size}.safetensors"
    assert json.loads((GOLDEN / "index.json").read_text())[name]["block_size"] == block_size
    golden = load_file(GOLDEN / name)["attn_mask"].bool()
    assert torch.equal(Visibility.pair(L, block_size).pair_mask()[0], golden)


def test_noisy_only_is_the_noisy_quarter_of_one_block() -> None:
    visibility = Visibility.noisy_only(L)
    assert visibility.block_size == L and visibility.clean_key_rows == ()
    assert torch.equal(visibility.pair_mask()[0], by_hand(L, L)[:L, :L])


@pytest.mark.parametrize("block_size", [1, 4])
def test_clean_only_is_block_causal(block_size: int) -> None:
    assert torch.equal(Visibility.clean_only(L, block_size).pair_mask()[0], by_hand(L, block_size)[L:, L:])
    if block_size == 1:
        assert torch.equal(Visibility.clean_only(L, 1).pair_mask()[0], torch.ones(L, L).tril().bool())


@pytest.mark.parametrize("rows", [((0, 8), (24, 32)), ((8, 24),)])
def test_a_rank_with_some_rows_sees_its_part_of_the_whole_mask(rows: Rows) -> None:
    documents = torch.arange(L)[None] // 10
    local = Visibility(4, L, rows, rows, ((0, L),), documents).pair_mask()[0]
    whole = Visibility.pair(L, 4, documents).pair_mask()[0]
    kept = positions(rows)
    q_rows = torch.cat([kept, L + kept])
    k_rows = torch.cat([kept, L + torch.arange(L)])
    assert torch.equal(local, whole[q_rows][:, k_rows])
    # No key that a row may see is missing from the rank.
    assert torch.equal(local.sum(1), whole[q_rows].sum(1))


def test_dead_rows_may_be_left_out() -> None:
    """Nobody in the loss sees the last clean block, and a last layer needs no clean queries."""
    last_layer = Visibility(4, L, ((0, L),), (), ((0, L - 4),))
    assert torch.equal(last_layer.pair_mask()[0], by_hand(L, 4)[:L, : 2 * L - 4])


def test_rows_are_listed_in_order() -> None:
    assert positions(((0, 2), (5, 7))).tolist() == [0, 1, 5, 6]
    assert positions(()).tolist() == [] and num_rows(((0, 2), (5, 7))) == 4


def test_what_breaks_the_law_is_refused() -> None:
    whole = ((0, 32),)
    with pytest.raises(ConfigError, match=r"length=33 is not a multiple of block_size=4; use 32 or 36\."):
        Visibility.pair(33, 4)
    with pytest.raises(RangeError, match=r"noisy_rows=.* is not a rising list of disjoint, non-empty ranges"):
        Visibility(4, 32, ((8, 16), (0, 4)), whole, whole)
    with pytest.raises(RangeError, match=r"clean_rows=.* inside \[0, 32\)"):
        Visibility(4, 32, whole, ((0, 36),), whole)
    with pytest.raises(
        RangeError, match=r"noisy_rows end at position 6, inside a block of block_size=4; use multiples"
    ):
        Visibility(4, 32, ((0, 6),), whole, whole)
    with pytest.raises(RangeError, match=r"clean_key_rows=\(\(0, 8\),\) lack positions 8 to 27"):
        Visibility(4, 32, whole, (), ((0, 8),))
    with pytest.raises(
        RangeError, match=r"lack positions 0 to 31, which the query rows see; give keys for all of \[0, 32"
    ):
        Visibility(4, 32, (), whole, ())
    with pytest.raises(ShapeError, match=r"document_id_BL is torch.int64 \[2, 16\]; expected integers \[any, 32\]\."):
        Visibility.pair(32, 4, torch.zeros(2, 16, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"document_id_BL is torch.float32"):
        Visibility.pair(32, 4, torch.zeros(2, 32))


def test_document_ids_stay_on_the_host() -> None:
    with pytest.raises(ShapeError, match=r"document_id_BL is on meta; keep document ids on the host \(cpu\)\."):
        Visibility.pair(32, 4, torch.zeros(1, 32, dtype=torch.int64, device="meta"))


def test_a_table_is_made_once_and_belongs_to_its_visibility() -> None:
    visibility, made = Visibility.pair(32, 4), []
    for name in ("a", "a", "b"):
        visibility.table(name, lambda: made.append(0) or len(made))
    assert len(made) == 2
    alone = visibility.without_clean_queries
    assert alone is visibility.without_clean_queries and alone.clean_rows == () and alone.noisy_rows == ((0, 32),)
    assert alone.table("a", lambda: "its own") == "its own"
