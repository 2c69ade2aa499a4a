"""Text pieces: what new tokens add, characters cut by a block's end, stop strings across blocks."""

from __future__ import annotations

from collections.abc import Sequence

from bd3_megatron.hf.text_bd3 import StopStrings, continuation_text
from bd3_megatron.sampling.text import TextStream, cut_at_stop


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8; 256 is special."""

    mask_token_id = bos_token_id = eos_token_id = pad_token_id = None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return bytes(token for token in token_ids if token < 256).decode(errors="replace")


class Pieces:
    """A tokenizer that, as many do, drops the space in front of the first word it decodes."""

    mask_token_id = bos_token_id = eos_token_id = pad_token_id = None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return "".join(f" {token}" for token in token_ids).removeprefix(" ")


def test_a_continuation_keeps_the_space_in_front_of_its_first_word() -> None:
    assert continuation_text(Pieces(), [1, 2], [3, 4]) == " 3 4"
    assert continuation_text(Pieces(), [], [3, 4]) == "3 4"


def test_a_character_cut_by_a_block_waits_for_the_rest() -> None:
    stream, data = TextStream(Bytes(), list(b"a")), "bé".encode()
    assert [stream.push(data[:2]), stream.push(data[2:]), stream.finish()] == ["", "bé", ""]
    stream.push("é".encode()[:1])
    assert stream.finish() == "\ufffd"


def test_a_stream_of_single_tokens_is_the_whole_text() -> None:
    text = "Grüße, Ωmega und 漢字 " * 8
    stream = TextStream(Bytes(), [])
    assert "".join(stream.push([byte]) for byte in text.encode()) + stream.finish() == text


def test_a_stop_string_over_two_blocks_is_found_at_the_token_that_completes_it() -> None:
    text = list(b"one two STOP three")
    stop = StopStrings(Bytes(), ["STOP"], [[], list(b"STOP is in the prompt ")])
    for request in (0, 1):
        assert stop(request, text[:10], 6) is None
        assert stop(request, text[:16], 6) == (12, "string")


def test_text_is_cut_before_the_first_stop_string() -> None:
    assert cut_at_stop("one two three", ["three", "two"]) == "one "
    assert cut_at_stop("one two three", []) == "one two three"
