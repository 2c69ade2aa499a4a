"""The sentences users read: value, law, remedy."""

from __future__ import annotations

import pytest

from bd3_megatron import errors
from bd3_megatron.errors import (
    EXIT_CODES,
    SENTENCE_CHARACTERS,
    SHOWN_CHARACTERS,
    BD3Error,
    ConfigError,
    FolderHeldError,
    GridError,
    LeakError,
    NodeFailure,
    NonFiniteError,
    RangeError,
    ShapeError,
    check_divides,
    check_multiple,
    check_shape,
    counted,
    cut,
    divisors,
    either,
    final_codes,
    sentence,
    shown,
)


def test_every_error_is_a_users_mistake_with_exit_code_2_except_the_named_few() -> None:
    others = {NodeFailure: 1, LeakError: 3, FolderHeldError: 4, NonFiniteError: 5}
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, BD3Error)]
    assert len(kinds) >= 12
    for kind in kinds:
        assert kind.exit_code == others.get(kind, 2)
        assert kind.__doc__
        assert str(kind.exit_code) in {row.code for row in EXIT_CODES}


def test_another_attempt_is_made_only_where_it_may_end_otherwise() -> None:
    assert final_codes() == [2, 3, 4, 5]
    assert NodeFailure.exit_code not in final_codes()


@pytest.mark.parametrize(("actual", "expected"), [((2, 3), (2, 3)), ((2, 3), (None, 3)), ((), ()), ((0, 5), (0, None))])
def test_matching_shapes_pass(actual: tuple[int, ...], expected: tuple[int | None, ...]) -> None:
    check_shape("x", actual, expected)


@pytest.mark.parametrize(("actual", "expected"), [((2, 3), (3, 2)), ((2, 3), (2,)), ((), (1,)), ((2, 3), (None, 4))])
def test_other_shapes_are_refused_with_both_sides(actual: tuple[int, ...], expected: tuple[int | None, ...]) -> None:
    with pytest.raises(ShapeError, match=r"^x has shape \[.*\]; expected \[.*\]\.$"):
        check_shape("x", actual, expected)


def test_the_shape_sentence_says_any_for_free_dims() -> None:
    with pytest.raises(ShapeError, match=r"^tokens_BL has shape \[2, 3\]; expected \[any, 4\]\.$"):
        check_shape("tokens_BL", (2, 3), (None, 4))


def test_a_shape_error_is_also_a_value_error() -> None:
    with pytest.raises(ValueError):
        check_shape("x", (1,), (2,))


@pytest.mark.parametrize(
    ("number", "expected"), [(1, [1]), (16, [1, 2, 4, 8, 16]), (7, [1, 7]), (36, [1, 2, 3, 4, 6, 9, 12, 18, 36])]
)
def test_divisors_ascend_and_hold_each_once(number: int, expected: list[int]) -> None:
    assert divisors(number) == expected


def test_divisor_sentence_names_the_legal_ones() -> None:
    check_divides("tp", 4, "num_heads", 16)
    with pytest.raises(GridError, match=r"^tp=3 does not divide num_heads=16; use 1, 2, 4, 8 or 16\.$"):
        check_divides("tp", 3, "num_heads", 16, kind=GridError)


@pytest.mark.parametrize("divisor", [0, -2])
def test_no_divisor_below_one(divisor: int) -> None:
    with pytest.raises(ConfigError, match="does not divide n=4; use 1, 2 or 4"):
        check_divides("d", divisor, "n", 4)


def test_multiple_sentence_names_the_nearest_two() -> None:
    check_multiple("seq_len", 1024, "block_size", 16)
    with pytest.raises(ConfigError, match=r"^seq_len=1000 is not a multiple of block_size=16; use 992 or 1008\.$"):
        check_multiple("seq_len", 1000, "block_size", 16)


@pytest.mark.parametrize(("number", "remedy"), [(5, "use 16"), (0, "use 16"), (-3, "use 16"), (17, "use 16 or 32")])
def test_the_nearest_multiple_is_never_below_one(number: int, remedy: str) -> None:
    with pytest.raises(ConfigError, match=rf"{remedy}\.$"):
        check_multiple("n", number, "s", 16)


@pytest.mark.parametrize(("options", "words"), [([1], "1"), ([1, 2], "1 or 2"), (["a", "b", "c"], "a, b or c")])
def test_either_reads_like_a_sentence(options: list[object], words: str) -> None:
    assert either(options) == words


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 parts, 0 GPUs are"), (1, "1 part, 1 GPU is"), (2, "2 parts, 2 GPUs are")]
)
def test_what_is_counted_stands_in_its_number(count: int, words: str) -> None:
    assert f"{counted(count, 'part')}, {counted(count, 'GPU is', 'GPUs are')}" == words


def test_of_many_legal_values_the_first_and_the_last_are_named() -> None:
    sentence = either(divisors(720720))
    assert sentence.startswith("1, 2, 3, ") and sentence.endswith(", ... or 720720")
    assert len(sentence) < 200


def test_divisors_that_would_take_too_long_are_not_looked_for() -> None:
    with pytest.raises(
        RangeError, match=r"^1000000000001 has too many digits to list its divisors; use at most 1e\+12"
    ):
        divisors(10**12 + 1)
    with pytest.raises(ConfigError, match=r"^d=0 does not divide n=1000000000000000000; use one of its divisors\.$"):
        check_divides("d", 0, "n", 10**18)


@pytest.mark.parametrize(
    "value", ["x" * 1000, list(range(1000)), 10**5000, {"a": "b\n" * 99}], ids=["text", "list", "int", "map"]
)
def test_a_long_value_is_repeated_in_one_short_line(value: object) -> None:
    line = shown(value)
    assert len(line) <= SHOWN_CHARACTERS and "\n" not in line


def test_a_short_value_is_repeated_whole_and_a_long_path_keeps_both_ends() -> None:
    assert (shown("a"), shown(1.5), cut("a/b")) == ("'a'", "1.5", "a/b")
    assert cut("/home/" + "deep/" * 99 + "file.yaml").startswith("/home/deep/")
    assert cut("/home/" + "deep/" * 99 + "file.yaml").endswith("/deep/file.yaml")


def test_a_message_is_one_line_of_bounded_length() -> None:
    assert sentence(ConfigError("a is b;\nuse c.")) == "a is b; use c."
    long = sentence(ConfigError("x" * 5000))
    assert len(long) <= SENTENCE_CHARACTERS and "..." in long
