"""What a tokenizer is, in memory (a protocol) and on disk (a Hugging Face folder with one more file, its record).

Contract: every tokenizer runs from one `tokenizer.json` (bytes take a shorter way to the same ids), so the ids in the
shards are the ids an exported folder gives. Text is text: a document that spells "<s>" or "[MASK]" is encoded letter by
letter and never becomes a special token, although `transformers` does recognise it in the same folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bd3_megatron.data.dialogue import ChatTemplate
from bd3_megatron.data.special_ids import SpecialIds, SpecialTexts
from bd3_megatron.files import write_json, write_text

META_FILE = "bd3_tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
"""Where transformers keeps a chat template beside tokenizer.json."""
META_VERSION = 2
"""2: the fingerprint is of what decides the ids; 1: of the bytes of tokenizer.json."""

# uint32 holds every vocabulary; shards narrow it to uint16 where V allows.
Tokens = NDArray[np.uint32]


class Tokenizer(Protocol):
    """What everything else needs of a tokenizer."""

    @property
    def kind(self) -> str:
        """`bytes` or `fast`: which class opens the saved folder."""

    @property
    def vocab_size(self) -> int:
        """V: ids are in [0, V), mask included."""

    @property
    def special(self) -> SpecialIds: ...

    @property
    def chat_template(self) -> ChatTemplate | None:
        """How chats are written; None: nobody said."""

    @property
    def fingerprint(self) -> str:
        """64 hex digits that change when any id of any text could; see tokenizer_fingerprint."""

    def encode(self, text: str) -> Tokens:
        """Ids of a text, no special tokens added: uint32 [num_tokens]."""

    def encode_batch(self, texts: Sequence[str], *, with_control: bool = False) -> list[Tokens]:
        """`encode` of many texts; with_control: texts of control tokens become them, since a template wrote them."""

    def decode(self, ids: Sequence[int] | NDArray[np.integer], *, skip_special: bool = False) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""

    def save(self, folder: Path) -> None:
        """Write the folder that `transformers.AutoTokenizer.from_pretrained` and `load_tokenizer` read."""


def write_tokenizer_folder(
    folder: Path, tokenizer: Tokenizer, tokenizer_json: str, texts: SpecialTexts, *, clean_up: bool = False
) -> None:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and the record."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {"bos_token": texts.bos, "eos_token": texts.eos, "mask_token": texts.mask, "pad_token": texts.pad}
    # The general class of transformers, which runs tokenizer.json as it is; a model's own class may change the text
    # first.
    config = {
        **named,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": clean_up,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    record = {
        "version": META_VERSION,
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
        "special_ids": tokenizer.special.as_dict(),
    }
    if tokenizer.chat_template is not None:
        write_text(folder / TEMPLATE_FILE, tokenizer.chat_template.source)
    write_text(folder / "tokenizer.json", tokenizer_json)
    # tokenizer.json goes first and the record last: a folder that has the record is complete.
    for name, content in (
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", named),
        (META_FILE, record),
    ):
        write_json(folder / name, content)
