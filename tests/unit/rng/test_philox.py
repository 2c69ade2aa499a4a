"""The generator is the published Philox4x32-10, and its key and counter never collide."""

from __future__ import annotations

import pytest
import torch

from bd3_megatron.hf import philox

# Random123, tests/kat_vectors: counter words, key words, expected words.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _hex(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def _philox_in_python(counter: list[int], key: list[int]) -> list[int]:
    """A second implementation, in unbounded integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        left, right = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(right >> 32) ^ c[1] ^ k[0], right % 2**32, (left >> 32) ^ c[3] ^ k[1], left % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
@pytest.mark.parametrize("width", [1, 3, 64])
def test_published_known_answers(counter: str, key: str, expected: str, width: int) -> None:
    c0, c1, c2, c3 = (torch.full((width,), word) for word in _hex(counter))
    key_0, key_1 = _hex(key)
    out = philox.philox4x32((c0, c1, c2, c3), (key_0, key_1))
    for word, wanted in zip(out, _hex(expected), strict=True):
        assert word.tolist() == [wanted] * width


def test_words_equal_a_second_implementation_in_unbounded_integers() -> None:
    generator = torch.Generator().manual_seed(5)
    index = torch.randint(0, 2**62, (50,), generator=generator)
    first = torch.randint(0, 2**32, (50,), generator=generator)
    seed, purpose = 2**47 + 12345, 7
    got = torch.stack(philox.words(seed, purpose, index, first, 3), dim=1)
    for i, c, row in zip(index.tolist(), first.tolist(), got.tolist(), strict=True):
        key = [seed % 2**32, (seed >> 32) * 2**16 + purpose]
        assert row == _philox_in_python([i % 2**32, i >> 32, c, 3], key)


def test_uniform_is_the_53_high_bits_of_two_words() -> None:
    high, low, _, _ = philox.words(1, 2, 3, 4, 5)
    exact = ((int(high) >> 5) * 2**26 + (int(low) >> 6)) / 2**53
    assert philox.uniform(1, 2, 3, 4, 5).item() == exact
    largest = philox.unit(torch.tensor(2**32 - 1), torch.tensor(2**32 - 1))
    assert largest.item() == 1 - 2**-53


def test_seed_purpose_and_counter_never_collide() -> None:
    keys = {philox.key_of(seed, purpose) for seed in (0, 1, 2**32, 2**47) for purpose in (0, 1, 2**16 - 1)}
    assert len(keys) == 12
    low, high = philox.uniform(0, 0, torch.tensor([7, 7 + 2**32]))
    assert low != high


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ((-1, 0, 0), r"seed=-1 is outside \[0, 2\^48\); use a seed in that range\."),
        ((2**48, 0, 0), r"seed=281474976710656 is outside"),
        ((0, 2**16, 0), r"purpose=65536 is outside \[0, 2\^16\)"),
        ((0, 0, -1), r"index=-1 is outside"),
        ((0, 0, 2**63), r"index=9223372036854775808 is outside"),
        ((0, 0, 0, 2**32), r"first coordinate=4294967296 is outside"),
        ((0, 0, 0, 0, -2), r"second coordinate=-2 is outside"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        philox.words(*arguments)
