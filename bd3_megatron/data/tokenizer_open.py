"""Opening a tokenizer by name or folder, whatever class runs it.

Refuses: names that resolve to nothing, folders of a newer version or changed after they were written.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from bd3_megatron.data.sentencepiece_model import load_sentencepiece
from bd3_megatron.data.special_ids import SpecialTexts
from bd3_megatron.data.tokenizer import META_FILE, META_VERSION, Tokenizer
from bd3_megatron.data.tokenizer_bytes import ByteTokenizer
from bd3_megatron.data.tokenizer_fast import FastTokenizer
from bd3_megatron.data.tokenizer_import import import_tokenizer
from bd3_megatron.errors import TokenizerError


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
    """Open a tokenizer by name: `bytes`, a folder with a record, a SentencePiece .model, or a Hugging Face folder or
    hub name (whose mask token is appended where it has none).

    Raises:
        TokenizerError: nothing readable goes by that name, or it lacks what training needs.
    """
    if str(name) == "bytes":
        return ByteTokenizer()
    path = Path(name)
    if (path / META_FILE).is_file():
        return load_tokenizer(path)
    if path.suffix == ".model" or (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file():
        return load_sentencepiece(path if path.suffix == ".model" else path / "tokenizer.model")
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
