"""Rows are what a naive reading of the packing rules gives, for every mode, sharding and length."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from bd3_megatron.data.packing import PackedRows, PackingRule
from bd3_megatron.data.shards import ShardFolder
from bd3_megatron.errors import ConfigError, DataError
from tests.unit.data.corpora import SPECIAL, answers, documents, write_split

Row = tuple[list[int], list[bool], list[int], list[int], list[bool]]


def naive_rows(shards: list[list[list[int]]], rule: PackingRule) -> list[Row]:
    """(tokens, is padding, document, position, is fill) of every row, token by token."""
    stream: list[tuple[int, bool, int, bool]] = []
    for number, document in enumerate(d for listed in shards for d in listed):
        real = document + [SPECIAL.eos] * rule.append_eos
        stream += [(token, False, number, False) for token in real]
        while rule.mode != "wrap" and rule.append_eos and len(stream) % (rule.block_size or 1):
            stream.append((SPECIAL.eos, False, number, True))
        while len(stream) % rule.alignment:
            stream.append((SPECIAL.pad, True, number, False))
    if rule.mode != "wrap":
        while len(stream) % rule.seq_len:
            stream.append((SPECIAL.pad, True, -1, False))
    rows = []
    for start in range(0, len(stream) - rule.payload + 1, rule.payload):
        chosen = stream[start : start + rule.payload]
        tokens, padding, numbers, fill = (list(column) for column in zip(*chosen, strict=True))
        place = {number: at for at, number in enumerate(dict.fromkeys(numbers))}
        begins = {number: numbers.index(number) for number in place}
        if rule.wrap_special:
            tokens = [SPECIAL.bos, *tokens, SPECIAL.eos]
        within = [i - begins[n] for i, n in enumerate(numbers)]
        rows.append((tokens, padding, [place[n] for n in numbers], within, fill))
    return rows


def cut(listed: list[list[int]], chosen: random.Random) -> list[list[list[int]]]:
    """The same documents in one to four shards."""
    bounds = sorted(chosen.sample(range(1, len(listed)), k=min(chosen.randint(0, 3), len(listed) - 1)))
    return [listed[a:b] for a, b in zip([0, *bounds], [*bounds, len(listed)], strict=True)]


@pytest.mark.parametrize("mode", ["wrap", "isolated", "pad"])
@pytest.mark.parametrize("append_eos", [True, False])
def test_rows_are_what_a_naive_reading_gives(tmp_path: Path, mode: str, append_eos: bool) -> None:
    chosen = random.Random(f"{mode}{append_eos}")
    for trial in range(12):
        block = chosen.choice([1, 2, 4, 8])
        length = block * chosen.randint(1, 6)
        listed = documents(chosen.randint(2, 20), seed=trial, longest=chosen.choice([3, 20, 70]))
        shards = cut(listed, chosen)
        rule = PackingRule(seq_len=length, mode=mode, block_size=block, append_eos=append_eos)
        expected = naive_rows(shards, rule)
        split = ShardFolder(write_split(tmp_path / str(trial), shards))
        if not expected:
            continue
        rows = PackedRows(split, rule)
        assert rows.num_rows == len(expected)
        got = rows.read(np.arange(rows.num_rows))
        tokens, padding, document, position, fill = (np.asarray(column) for column in zip(*expected, strict=True))
        np.testing.assert_array_equal(got.tokens_BL, tokens)
        if mode == "wrap":
            assert got.is_padding_BL is None and got.document_id_BL is None and got.position_BL is None
            assert rows.utilisation == 1.0
            continue
        assert got.is_padding_BL is not None
        np.testing.assert_array_equal(got.is_padding_BL, padding)
        assert rows.utilisation == pytest.approx(1.0 - (padding | fill).mean())
        if block > 1 and append_eos:
            assert got.is_fill_BL is not None
            np.testing.assert_array_equal(got.is_fill_BL, fill)
        else:
            assert got.is_fill_BL is None and not fill.any()
        if mode == "isolated":
            assert got.document_id_BL is not None and got.position_BL is not None
            np.testing.assert_array_equal(got.document_id_BL, document)
            np.testing.assert_array_equal(got.position_BL, position)
            assert all(np.all(np.diff(row) >= 0) for row in got.document_id_BL)


@pytest.mark.parametrize("append_eos", [True, False])
def test_special_rows_carry_bos_and_eos_around_the_payload(tmp_path: Path, append_eos: bool) -> None:
    shards = [documents(9, seed=1), documents(5, seed=2)]
    rule = PackingRule(seq_len=16, append_eos=append_eos, wrap_special=True)
    rows = PackedRows(ShardFolder(write_split(tmp_path, shards)), rule)
    expected = naive_rows(shards, rule)
    np.testing.assert_array_equal(rows.read(np.arange(rows.num_rows)).tokens_BL, [row[0] for row in expected])


def test_wrap_loses_less_than_one_row_of_the_whole_split(tmp_path: Path) -> None:
    shards = [documents(30, seed=s) for s in range(5)]
    total = sum(len(d) + 1 for listed in shards for d in listed)
    rows = PackedRows(ShardFolder(write_split(tmp_path, shards)), PackingRule(seq_len=64))
    assert rows.num_rows == total // 64


def test_rows_do_not_depend_on_the_order_in_which_they_are_asked_for(tmp_path: Path) -> None:
    listed = documents(40, seed=3)
    rows = PackedRows(
        ShardFolder(write_split(tmp_path, [listed], supervised=[answers(listed, 3)])),
        PackingRule(seq_len=8, mode="isolated", block_size=4),
    )
    whole = rows.read(np.arange(rows.num_rows))
    order = np.random.default_rng(0).permutation(rows.num_rows)
    shuffled = rows.read(order)
    for column, expected in zip(shuffled, whole, strict=True):
        assert column is not None and expected is not None
        np.testing.assert_array_equal(column, expected[order])


@pytest.mark.parametrize("mode", ["isolated", "pad"])
@pytest.mark.parametrize("append_eos", [True, False])
def test_what_is_predicted_follows_its_tokens_and_an_end_its_document(
    tmp_path: Path, mode: str, append_eos: bool
) -> None:
    chosen = random.Random(f"{mode}{append_eos}")
    for trial in range(8):
        block = chosen.choice([1, 2, 4])
        rule = PackingRule(seq_len=block * 3, mode=mode, block_size=block, append_eos=append_eos)
        listed = documents(12, seed=trial, longest=20)
        known = answers(listed, trial)
        shards = cut(listed, chosen)
        bounds = np.cumsum([0, *map(len, shards)])
        folder = write_split(
            tmp_path / f"{trial}", shards, supervised=[known[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
        )
        rows = PackedRows(ShardFolder(folder, verify=True), rule)
        got = rows.read(np.arange(rows.num_rows))
        assert got.is_supervised_BL is not None and got.is_padding_BL is not None
        # ids are below 256, so that a token carries its own flag through the naive reading
        marked = [[t + 300 * k for t, k in zip(*pair, strict=True)] for pair in zip(listed, known, strict=True)]
        plain, with_flags = naive_rows([listed], rule), naive_rows([marked], rule)
        flag = False
        for row, (tokens, padding, _, _, _) in enumerate(plain):
            np.testing.assert_array_equal(got.tokens_BL[row], tokens)
            for place, marked_token in enumerate(with_flags[row][0]):
                if padding[place]:
                    continue
                is_end = tokens[place] == SPECIAL.eos and marked_token == SPECIAL.eos
                # an end token has the flag of the token before it
                flag = flag if is_end else marked_token >= 300
                assert got.is_supervised_BL[row, place] == flag, (trial, row, place)


def test_answers_are_not_wrapped(tmp_path: Path) -> None:
    listed = documents(4, seed=1)
    shards = ShardFolder(write_split(tmp_path, [listed], supervised=[answers(listed, 1)]))
    with pytest.raises(ConfigError, match=r"packing=wrap cuts documents anywhere.*use packing=isolated, or pad\."):
        PackedRows(shards, PackingRule(seq_len=8))


def test_isolated_documents_begin_at_block_boundaries_and_pieces_of_long_ones_at_rows(tmp_path: Path) -> None:
    shards = [[[1] * 30, [2] * 3, [3] * 4]]
    rule = PackingRule(seq_len=16, mode="isolated", block_size=4)
    got = PackedRows(ShardFolder(write_split(tmp_path, shards)), rule).read(np.arange(3))
    assert got.document_id_BL is not None and got.position_BL is not None and got.is_padding_BL is not None
    assert got.document_id_BL.tolist() == [[0] * 16, [0] * 16, [0] * 4 + [1] * 8 + [2] * 4]
    assert got.position_BL.tolist()[1] == list(range(16))
    assert got.tokens_BL[2].tolist() == [2, 2, 2, 257, 3, 3, 3, 3, *[257] * 4, *[258] * 4]
    assert got.is_padding_BL[2].tolist() == [False] * 12 + [True] * 4
    assert got.is_fill_BL is not None and got.is_fill_BL[2].tolist() == [False] * 9 + [True] * 3 + [False] * 4


def test_a_split_shorter_than_one_row_is_refused(tmp_path: Path) -> None:
    split = ShardFolder(write_split(tmp_path, [[[1, 2, 3]]]))
    with pytest.raises(DataError, match="holds 4 tokens, fewer than one row of seq_len=64; use a shorter seq_len"):
        PackedRows(split, PackingRule(seq_len=64))
    assert PackedRows(split, PackingRule(seq_len=64, mode="pad")).num_rows == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"seq_len": 8, "mode": "stack"}, "packing=stack is not known; use wrap, isolated or pad"),
        ({"seq_len": 0}, "seq_len=0 holds no text; use 1 or more"),
        ({"seq_len": 2, "wrap_special": True}, "seq_len=2 holds no text; use 3 or more"),
        ({"seq_len": 8, "mode": "pad", "wrap_special": True}, "wrap_special=True needs packing=wrap, not pad"),
        ({"seq_len": 8, "mode": "isolated"}, "block_size is None; give a divisor of seq_len"),
        (
            {"seq_len": 10, "mode": "isolated", "block_size": 4},
            "seq_len=10 is not a multiple of block_size=4; use 8 or 12",
        ),
    ],
)
def test_rules_that_cannot_be_are_refused(options: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        PackingRule(**options)


def test_a_token_outside_the_vocabulary_is_named_with_its_row(tmp_path: Path) -> None:
    split = ShardFolder(write_split(tmp_path, [[[1] * 20, [7, 300, 7, 7]]]))
    rows = PackedRows(split, PackingRule(seq_len=8))
    rows.read(np.asarray([0, 1]))
    with pytest.raises(DataError, match=r"row 2 of .* holds token 300, outside \[0, 260\): the shard is damaged"):
        rows.read(np.asarray([1, 2]))
