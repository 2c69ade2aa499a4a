"""Text to ids and back behind one protocol; what is saved is a Hugging Face tokenizer folder.

Decides: every tokenizer of the house, however it was made, runs from one `tokenizer.json` through the `tokenizers`
library (bytes take a shorter way to the same ids), so the ids in the shards are the ids an exported folder gives. Text
is text: a document that spells "<s>" or "[MASK]" is encoded letter by letter and can never forge a special token.
(Loaded by `transformers`, the same folder follows that library's custom and does recognise them.)
Refuses: folders without a tokenizer, ids that do not fit together, a mask text that the vocabulary already uses.
Costs: about 3 MB/s of English a core. No torch and no transformers unless a foreign tokenizer is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bd3_megatron.data.special_ids import SpecialIds, SpecialTexts
from bd3_megatron.data.text_cutting import cut_text, is_cuttable
from bd3_megatron.errors import TokenizerError

META_FILE = "bd3_tokenizer.json"
META_VERSION = 1
CUT_CHARACTERS = 4096
"""Longer documents are encoded in pieces of about this size where that is exact: time grows faster than length."""

Tokens = NDArray[np.uint32]


class Tokenizer(Protocol):
    """What the rest of the house needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """V: ids are in [0, V), mask included."""

    @property
    def special(self) -> SpecialIds: ...

    @property
    def fingerprint(self) -> str:
        """64 hex digits that change when any id of any text could."""

    def encode(self, text: str) -> Tokens:
        """Ids of a text, no special tokens added: uint32 [num_tokens]."""

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """`encode` of many texts."""

    def decode(self, ids: Sequence[int] | NDArray[np.integer], *, skip_special: bool = False) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""

    def save(self, folder: Path) -> None:
        """Write the folder `transformers.AutoTokenizer.from_pretrained` and `load_tokenizer` read."""


class FastTokenizer:
    """A tokenizer that runs on the `tokenizers` library from the text of a tokenizer.json."""

    kind = "fast"

    def __init__(self, tokenizer_json: str, texts: SpecialTexts, *, clean_up: bool = False) -> None:
        """Build from the text of a tokenizer.json whose vocabulary holds the four special texts.

        Args:
            tokenizer_json: kept byte for byte, since the fingerprint is taken from it.
            texts: the special tokens as written.
            clean_up: transformers' clean_up_tokenization_spaces for the exported folder.

        Raises:
            TokenizerError: not a tokenizer.json, or a special token is not in its vocabulary.
        """
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"tokenizer.json cannot be read ({error}); export the tokenizer again.") from error
        self._json, self._texts, self._clean_up = tokenizer_json, texts, clean_up
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self._vocab_size = max(vocabulary.values()) + 1
        ids = {name: vocabulary.get(getattr(texts, name), -1) for name in ("bos", "eos", "mask", "pad")}
        self._special = SpecialIds.from_dict(ids, self._vocab_size)
        self._cuttable = is_cuttable(json.loads(tokenizer_json))

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def special(self) -> SpecialIds:
        return self._special

    @property
    def fingerprint(self) -> str:
        ids = json.dumps(self._special.as_dict(), sort_keys=True)
        return hashlib.sha256(f"{self._json}\n{ids}".encode()).hexdigest()

    def encode(self, text: str) -> Tokens:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        pieces = [self._pieces(text) for text in texts]
        encodings = iter(self._tokenizer.encode_batch_fast([p for ps in pieces for p in ps], add_special_tokens=False))
        return [
            np.concatenate([np.asarray(next(encodings).ids, dtype=np.uint32) for _ in ps], dtype=np.uint32)
            if ps
            else np.zeros(0, dtype=np.uint32)
            for ps in pieces
        ]

    def decode(self, ids: Sequence[int] | NDArray[np.integer], *, skip_special: bool = False) -> str:
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special))

    def save(self, folder: Path) -> None:
        write_folder(folder, self, self._json, self._texts, clean_up=self._clean_up)

    def _pieces(self, text: str) -> list[str]:
        if not text:
            return []
        return cut_text(text, CUT_CHARACTERS) if self._cuttable else [text]


def write_folder(
    folder: Path, tokenizer: Tokenizer, tokenizer_json: str, texts: SpecialTexts, *, clean_up: bool = False
) -> None:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and the house's own record."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {"bos_token": texts.bos, "eos_token": texts.eos, "mask_token": texts.mask, "pad_token": texts.pad}
    config = {
        **named,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": clean_up,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    record = {
        "version": META_VERSION,
        "kind": getattr(tokenizer, "kind", FastTokenizer.kind),
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
        "special_ids": tokenizer.special.as_dict(),
    }
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    for name, content in (
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", named),
        (META_FILE, record),
    ):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Open a folder written by `Tokenizer.save`.

    Raises:
        TokenizerError: a file is missing or unreadable, the record is of a newer version, or the fingerprint does not
            match the files (someone changed them).
    """
    folder = Path(folder)
    record, config = _read_json(folder / META_FILE), _read_json(folder / "tokenizer_config.json")
    if record.get("version") != META_VERSION:
        raise TokenizerError(
            f"{folder / META_FILE} has version {record.get('version')}; this release reads version {META_VERSION}, "
            "use the release that wrote it or prepare the data again."
        )
    texts = SpecialTexts(**{name: config[f"{name}_token"] for name in ("bos", "eos", "mask", "pad")})
    tokenizer: Tokenizer
    if record["kind"] == "bytes":
        from bd3_megatron.data.tokenizer_bytes import ByteTokenizer

        tokenizer = ByteTokenizer()
    else:
        text = _read_text(folder / "tokenizer.json")
        tokenizer = FastTokenizer(text, texts, clean_up=bool(config.get("clean_up_tokenization_spaces", False)))
    if tokenizer.fingerprint != record["fingerprint"]:
        raise TokenizerError(
            f"{folder} was changed after it was written: fingerprint {tokenizer.fingerprint[:12]} is not the recorded "
            f"{str(record['fingerprint'])[:12]}; prepare the data again or restore the folder."
        )
    return tokenizer


def open_tokenizer(name: str | Path) -> Tokenizer:
    """Open a tokenizer by name: `bytes`, a folder of the house, a SentencePiece .model, or a Hugging Face folder or
    hub name (whose mask token is appended where it has none).

    Raises:
        TokenizerError: nothing readable goes by that name, or it lacks what training needs.
    """
    if str(name) == "bytes":
        from bd3_megatron.data.tokenizer_bytes import ByteTokenizer

        return ByteTokenizer()
    path = Path(name)
    if (path / META_FILE).is_file():
        return load_tokenizer(path)
    if path.suffix == ".model" or (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file():
        from bd3_megatron.data.sentencepiece_model import load_sentencepiece

        return load_sentencepiece(path if path.suffix == ".model" else path / "tokenizer.model")
    from bd3_megatron.data.tokenizer_import import import_tokenizer

    return import_tokenizer(str(name))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise TokenizerError(f"{path} cannot be read ({reason}); give a tokenizer folder.") from error


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise TokenizerError(f"{path} is not JSON ({error}); prepare the tokenizer folder again.") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} holds no JSON object; prepare the tokenizer folder again.")
    return content
