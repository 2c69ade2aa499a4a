"""Pairs counted in closed form are the pairs of the visibility rule, and those the backends compute."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from bd3_megatron.attention import structured
from bd3_megatron.attention.visibility import Visibility, sees
from bd3_megatron.cost.pairs import Pairs, attended_pairs, executed_pairs, mean_pairs
from bd3_megatron.cost.shape import shape_of
from bd3_megatron.diffusion.objective import BlockDiffusion
from bd3_megatron.errors import ConfigError, ShapeError
from tests.unit.cost.cases import case


def _brute(length: int, block: int, documents: list[int]) -> Pairs:
    """The same four numbers from the predicate, pair by pair."""
    position = torch.arange(length)
    document = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents))

    def seen(q_is_noisy: bool, k_is_noisy: bool) -> torch.Tensor:
        return sees(
            q_is_noisy=torch.tensor(q_is_noisy),
            q_block=(position // block)[:, None],
            k_is_noisy=torch.tensor(k_is_noisy),
            k_block=(position // block)[None, :],
            q_document=document[:, None],
            k_document=document[None, :],
        )

    noisy_clean, clean_clean = seen(True, False), seen(False, False)
    dead = ~noisy_clean.any(dim=0)
    return Pairs(
        noisy=int(seen(True, True).sum() + noisy_clean.sum()),
        clean=int(clean_clean.sum()),
        dead_rows=int(dead.sum()),
        dead_pairs=int(clean_clean[dead].sum()),
    )


def _layouts() -> list[tuple[int, int, list[int]]]:
    cases = [(32, s, [32]) for s in (1, 4, 16, 32)] + [(32, 4, [8, 20, 4]), (32, 8, [3, 1, 17, 11]), (24, 4, [1] * 24)]
    draw = random.Random(1)
    for _ in range(20):
        cuts = sorted({draw.randrange(1, 48) for _ in range(draw.randrange(1, 6))})
        cases.append(
            (48, draw.choice([1, 2, 8, 16, 48]), [b - a for a, b in zip([0, *cuts], [*cuts, 48], strict=True)])
        )
    return cases


@pytest.mark.parametrize(("length", "block", "documents"), _layouts())
def test_closed_pairs_are_the_pairs_of_the_predicate(length: int, block: int, documents: list[int]) -> None:
    assert attended_pairs(length, block, documents) == _brute(length, block, documents)


@pytest.mark.parametrize("block", [1, 4, 16, 64])
def test_without_documents_a_pair_of_streams_has_l_times_l_plus_s_pairs(block: int) -> None:
    pairs = attended_pairs(64, block)
    assert pairs.noisy + pairs.clean == 64 * (64 + block)
    assert pairs == attended_pairs(64, block, [64])


def test_mean_pairs_is_the_mean() -> None:
    one, two = attended_pairs(32, 4), attended_pairs(32, 4, [16, 16])
    assert mean_pairs([one, two]).noisy == (one.noisy + two.noisy) / 2


@pytest.mark.parametrize("kind", ["s1", "s4", "s16", "mdlm", "ar"])
@pytest.mark.parametrize("documents", [None, [7, 13, 12]])
def test_structured_executes_what_is_counted(kind: str, documents: list[int] | None) -> None:
    shape = shape_of(case(kind=kind))
    ids = None if documents is None else torch.repeat_interleave(torch.arange(3), torch.tensor(documents))[None]
    length, block = shape.length, shape.block
    if kind == "ar":
        visibility = Visibility.clean_only(length, 1, ids)
    elif kind == "mdlm":
        visibility = replace(Visibility.noisy_only(length), document_id_BL=ids)
    else:
        visibility = Visibility.pair(length, block, ids)
    counted = executed_pairs(shape, "structured", pairs=attended_pairs(length, block, documents))
    assert structured.executed_pairs(visibility) == counted


def test_dropping_the_last_clean_block_drops_its_pairs() -> None:
    shape = shape_of(case(kind="s4"))
    kept = replace(Visibility.pair(32, 4), clean_rows=((0, 28),), clean_key_rows=((0, 28),))
    assert structured.executed_pairs(kept) == executed_pairs(shape, "structured", dropped_rows=4) == 32 * 36 - 32 * 4


@pytest.mark.parametrize(("length", "block"), [(1024, 16), (2048, 32), (512, 64)])
def test_flex_runs_l_squared_plus_two_tiles_of_l(length: int, block: int) -> None:
    shape = replace(shape_of(case()), length=length, objective=BlockDiffusion(block_size=block))
    assert executed_pairs(shape, "flex") == length**2 + 256 * length


@pytest.mark.parametrize("block", [1, 4, 16, 32, 64])
@pytest.mark.parametrize("dropped", [0, 1])
def test_flex_tiles_are_those_that_hold_a_pair(block: int, dropped: int) -> None:
    length, tile = 64, 8
    clean = length - dropped * block
    kind = "mdlm" if block == length else "block"
    if kind == "mdlm" and dropped:
        return
    shape = replace(shape_of(case()), length=length, objective=BlockDiffusion(block_size=block))
    q, k = torch.arange(length)[:, None] // block, torch.arange(length)[None, :] // block
    own, before = q == k, (k < q)[:, :clean]
    causal = (k <= q)[:clean, :clean]
    masks = [own] if kind == "mdlm" else [own, before, causal]
    area = sum(_tiles_with_a_pair(m, tile) for m in masks) * tile * tile
    assert executed_pairs(shape, "flex", dropped_rows=dropped * block, tile=tile) == area


def _tiles_with_a_pair(mask: torch.Tensor, tile: int) -> int:
    rows = -(-mask.shape[0] // tile) * tile
    columns = -(-mask.shape[1] // tile) * tile
    padded = torch.zeros(rows, columns, dtype=torch.bool)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    return int(padded.view(rows // tile, tile, columns // tile, tile).any(dim=3).any(dim=1).sum())


def test_dense_runs_the_whole_square() -> None:
    assert executed_pairs(shape_of(case(kind="s4")), "dense") == 64**2
    assert executed_pairs(shape_of(case(kind="mdlm")), "dense") == 32**2


def test_documents_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"documents \[8, 8\] add up to 16 tokens .* adding up to seq_len=32"):
        attended_pairs(32, 4, [8, 8])
    with pytest.raises(ShapeError, match="a shortest of 0"):
        attended_pairs(32, 4, [32, 0])


def test_a_block_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="seq_len=32 is not a multiple of block_size=5; use 30 or 35"):
        attended_pairs(32, 5)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match="attention backend 'magic' has no count; use structured, dense, flex"):
        executed_pairs(shape_of(case()), "magic")


def test_the_mean_of_nothing_is_refused() -> None:
    with pytest.raises(ShapeError, match="no sequence was given"):
        mean_pairs([])
