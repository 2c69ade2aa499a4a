"""The four ids that training needs beside the text's own: beginning, end, mask and padding.

Decides: which of a tokenizer's own tokens play these parts, and what happens when one is missing. The mask is the
tokenizer's own or is appended (algorithm: mask id = V, V += 1); beginning falls back to [CLS], then to the end token;
end falls back to [SEP]; padding falls back to the end token, which is harmless because padded positions carry no loss.
Refuses: a tokenizer without any end token, because documents could not be told apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from bd3_megatron.errors import TokenizerError

MASK_TEXT = "<|mask|>"
"""Text of the mask token where a tokenizer has none of its own."""


@dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """Ids of the tokens with a part of their own; all lie in [0, V)."""

    bos: int
    eos: int
    mask: int
    pad: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, int], vocab_size: int) -> SpecialIds:
        """Read the four ids of a header.

        Raises:
            TokenizerError: an id is missing or outside [0, V).
        """
        ids = {name: values.get(name, -1) for name in ("bos", "eos", "mask", "pad")}
        for name, value in ids.items():
            if not 0 <= value < vocab_size:
                raise TokenizerError(
                    f"the {name} id {value} lies outside [0, {vocab_size}); prepare the tokenizer folder again."
                )
        return SpecialIds(**ids)


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
        eos = named.get("eos_token") or named.get("sep_token")
        if not eos:
            raise TokenizerError(
                f"tokenizer {where} has neither eos_token nor sep_token, so documents cannot be separated; "
                "name one in its tokenizer_config.json."
            )
        bos = named.get("bos_token") or named.get("cls_token") or eos
        return SpecialTexts(
            bos=bos, eos=eos, mask=named.get("mask_token") or MASK_TEXT, pad=named.get("pad_token") or eos
        )
