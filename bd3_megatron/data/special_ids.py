"""The four ids that training needs beside the text's own: beginning, end, mask and padding.

Contract: the mask is the tokenizer's own token or is appended (id V, then V + 1 ids); beginning falls back to [CLS], then
to the end token; end falls back to [SEP]; padding falls back to the end token.
Refuses: a tokenizer without an end token, ids outside [0, V), a mask that is also another of the four.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bd3_megatron.errors import TokenizerError, either

MASK_TEXT = "<|mask|>"
"""Text of the mask token where a tokenizer has none of its own."""
# The only names that training reads; a tokenizer may have more.
NAMES = ("bos", "eos", "mask", "pad")


def check_special_ids(ids: Mapping[str, Any], vocab_size: int, where: str) -> None:
    """Refuse special ids that no model can be trained with; called wherever ids enter.

    Args:
        ids: by name, of `NAMES`; names that are absent or None are not checked.
        vocab_size: V.
        where: the tokenizer, file or folder that states them, for the error.

    Raises:
        TokenizerError: an id is no whole number or lies outside [0, V), or the mask shares its id with another name.
    """
    stated = {name: ids[name] for name in NAMES if ids.get(name) is not None}
    for name, value in stated.items():
        # True is an int in Python, and JSON from outside may hold one
        if type(value) is not int or not 0 <= value < vocab_size:
            raise TokenizerError(
                f"{where}: the {name} id {value!r:.40} is no whole number in [0, {vocab_size}); "
                "give a tokenizer whose special tokens are in its vocabulary."
            )
    # Every masked position would then be a document's end, and the loss of an end a loss of the mask: NaN or nonsense.
    shared = [name for name, value in stated.items() if name != "mask" and value == stated.get("mask")]
    if shared:
        raise TokenizerError(
            f"{where}: the mask id {stated['mask']} is also the id of {' and '.join(shared)}; give the mask a token of its "
            "own, or leave mask_token out of tokenizer_config.json, and one is added."
        )


@dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """Ids of the tokens with a part of their own; all lie in [0, V), and the mask is no other of them."""

    bos: int
    eos: int
    mask: int
    pad: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any], vocab_size: int, where: str) -> SpecialIds:
        """Read the four ids of a header or a tokenizer.

        Args:
            values: by name.
            vocab_size: V.
            where: what states them, for the error.

        Raises:
            TokenizerError: one is missing, or `check_special_ids` refuses them.
        """
        missing = [name for name in NAMES if values.get(name) is None]
        if missing:
            raise TokenizerError(f"{where} has no {either(missing)} id; give a tokenizer that has all four.")
        check_special_ids(values, vocab_size, where)
        return SpecialIds(**{name: values[name] for name in NAMES})


@dataclass(frozen=True, kw_only=True)
class SpecialTexts:
    """How the four tokens are written; the names Hugging Face's tokenizer_config.json uses for them."""

    bos: str
    eos: str
    mask: str
    pad: str

    @staticmethod
    def choose(named: Mapping[str, str | None], where: str) -> SpecialTexts:
        """Choose the four from a tokenizer's named tokens (bos_token, eos_token, cls_token, sep_token, ...).

        Args:
            named: text of each named special token, None or absent where the tokenizer has none.
            where: the tokenizer's name, for the error.

        Raises:
            TokenizerError: there is neither an eos_token nor a sep_token.
        """
        # BERT-like tokenizers end a text by [SEP] and begin it by [CLS].
        eos = named.get("eos_token") or named.get("sep_token")
        if not eos:
            raise TokenizerError(
                f"tokenizer {where} has neither eos_token nor sep_token, so documents cannot be separated; "
                "name one in its tokenizer_config.json."
            )
        # Padding carries no loss, so the end token serves where there is no other.
        bos, pad = named.get("bos_token") or named.get("cls_token") or eos, named.get("pad_token") or eos
        return SpecialTexts(bos=bos, eos=eos, mask=named.get("mask_token") or MASK_TEXT, pad=pad)
