"""The tokenizer that needs no training: a token is a byte of UTF-8.

Decides: ids 0..255 are the bytes, then <bos>, <eos>, <pad>, <mask>; V = 260. Encoding takes the bytes as they lie in
memory; the saved tokenizer.json (byte-level BPE without merges) gives the same ids to those who load it elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bd3_megatron.data.dialogue import ChatTemplate
from bd3_megatron.data.special_ids import SpecialIds, SpecialTexts
from bd3_megatron.data.tokenizer import Tokens, write_tokenizer_folder
from bd3_megatron.data.tokenizer_fingerprint import fingerprint_of

_TEXTS = SpecialTexts(bos="<bos>", eos="<eos>", pad="<pad>", mask="<mask>")
# Ids 0..255 are the bytes themselves; V = 260 includes these four.
_SPECIAL = SpecialIds(bos=256, eos=257, pad=258, mask=259)


class ByteTokenizer:
    """Bytes of UTF-8 as ids."""

    kind = "bytes"

    @property
    def vocab_size(self) -> int:
        return 260

    @property
    def special(self) -> SpecialIds:
        return _SPECIAL

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(byte_tokenizer_json(), _SPECIAL)

    def encode(self, text: str) -> Tokens:
        # The shorter way: the ids are those of the tokenizer.json, without the library.
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint32)

    @property
    def chat_template(self) -> ChatTemplate | None:
        return None

    def encode_batch(self, texts: Sequence[str], *, with_control: bool = False) -> list[Tokens]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | NDArray[np.integer], *, skip_special: bool = False) -> str:
        values = np.asarray(ids, dtype=np.int64).reshape(-1)
        texts: list[str] = []
        start = 0
        # Runs of bytes are decoded whole: one letter may take four bytes.
        for place in [*np.flatnonzero(values >= 256).tolist(), len(values)]:
            texts.append(values[start:place].astype(np.uint8).tobytes().decode("utf-8", errors="replace"))
            if place < len(values) and not skip_special:
                texts.append(_text_of(int(values[place])))
            start = place + 1
        return "".join(texts)

    def save(self, folder: Path) -> None:
        write_tokenizer_folder(folder, self, byte_tokenizer_json(), _TEXTS)


def byte_tokenizer_json() -> str:
    """The same tokenizer for the `tokenizers` library: byte-level BPE with no merges."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    letters = {letter: byte for byte, letter in _byte_letters().items()}
    built = tokenizers.Tokenizer(models.BPE(vocab=letters, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.decoder = decoders.ByteLevel()
    # The library gives ids in the order of addition, so the order of ids is kept.
    names = sorted(("bos", "eos", "pad", "mask"), key=lambda name: getattr(_SPECIAL, name))
    built.add_special_tokens(
        [tokenizers.AddedToken(getattr(_TEXTS, name), special=True, normalized=False) for name in names]
    )
    return json.dumps(json.loads(built.to_str()), ensure_ascii=False, indent=1) + "\n"


def _byte_letters() -> dict[int, str]:
    """The printable letter byte-level BPE writes for every byte.

    Source: GPT-2's bytes_to_unicode: printable Latin-1 stands for itself, the rest move to U+0100 and up, in order.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    rest = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + place) for place, byte in enumerate(rest)}


def _text_of(token_id: int) -> str:
    for name, value in _SPECIAL.as_dict().items():
        if value == token_id:
            return str(getattr(_TEXTS, name))
    return "\ufffd"
