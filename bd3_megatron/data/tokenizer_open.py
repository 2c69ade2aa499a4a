"""Opening a tokenizer by name or folder, whatever class runs it.

Refuses: names that resolve to nothing, folders of a newer version or changed after they were written.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from bd3_megatron.data.sentencepiece_model import load_sentencepiece
from bd3_megatron.data.special_ids import NAMES, SpecialTexts
from bd3_megatron.data.tokenizer import META_FILE, META_VERSION, TEMPLATE_FILE, Tokenizer
from bd3_megatron.data.tokenizer_bytes import ByteTokenizer
from bd3_megatron.data.tokenizer_fast import FastTokenizer
from bd3_megatron.data.tokenizer_fingerprint import check_same_tokenizer
from bd3_megatron.data.tokenizer_import import import_tokenizer
from bd3_megatron.errors import TokenizerError

_AGAIN = "restore the folder or prepare it again"


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Open a folder written by `Tokenizer.save`.

    Raises:
        TokenizerError: a file is missing or unreadable, the record is of a newer version, or the fingerprint does not
            match the files (someone changed them).
    """
    folder = Path(folder)
    record, config = _read_json(folder / META_FILE), _read_json(folder / "tokenizer_config.json")
    # Older records are refused too: their fingerprints were computed by another rule.
    if record.get("version") != META_VERSION:
        raise TokenizerError(
            f"{folder / META_FILE} has version {str(record.get('version'))[:40]}; this release reads version "
            f"{META_VERSION}, use the release that wrote it or prepare the data again."
        )
    kind, recorded = record.get("kind"), record.get("fingerprint")
    if kind not in (ByteTokenizer.kind, FastTokenizer.kind) or not isinstance(recorded, str):
        raise TokenizerError(
            f"{folder / META_FILE} is damaged (kind {str(kind)[:40]}, fingerprint {str(recorded)[:40]}); {_AGAIN}."
        )
    tokenizer: Tokenizer
    if kind == ByteTokenizer.kind:
        tokenizer = ByteTokenizer()
    else:
        texts = SpecialTexts(**{name: _special_text(folder, config, name) for name in NAMES})
        text = _read_text(folder / "tokenizer.json")
        clean_up = bool(config.get("clean_up_tokenization_spaces", False))
        template = folder / TEMPLATE_FILE
        written = _read_text(template) if template.is_file() else None
        tokenizer = FastTokenizer(text, texts, where=str(folder), clean_up=clean_up, chat_template=written)
    # The fingerprint is computed from the files: whoever swaps or edits one is told before a token is made of it.
    check_same_tokenizer((tokenizer.fingerprint, str(folder)), (recorded, f"its own record {META_FILE}"))
    # Copies of the record travel with runs and exported folders, where it is read without the tokenizer.
    for name, value in (("vocab_size", tokenizer.vocab_size), ("special_ids", tokenizer.special.as_dict())):
        if record.get(name) != value:
            raise TokenizerError(
                f"{folder / META_FILE} says {name}={str(record.get(name))[:60]} and the tokenizer has {value}; {_AGAIN}."
            )
    return tokenizer


def open_tokenizer(name: str | Path) -> Tokenizer:
    """Open a tokenizer by name: `bytes`, a folder with a record, a SentencePiece .model, or a Hugging Face folder or
    hub name (whose mask token is appended where it has none).

    Raises:
        TokenizerError: nothing readable goes by that name, or it lacks what training needs.
    """
    # The name wins over a folder called bytes.
    if str(name) == "bytes":
        return ByteTokenizer()
    path = Path(name)
    if (path / META_FILE).is_file():
        return load_tokenizer(path)
    # A folder with a tokenizer.json is read from it, because it is what transformers would run.
    if path.suffix == ".model" or (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file():
        return load_sentencepiece(path if path.suffix == ".model" else path / "tokenizer.model")
    return import_tokenizer(str(name))


def check_folder_tokenizer(folder: Path, recorded: tuple[str, str] | None) -> None:
    """Refuse a model's folder whose tokenizer is another one than recorded, however many ids both have.

    Args:
        folder: of the model; without a tokenizer there is nothing to compare.
        recorded: (fingerprint, what it belongs to); None: the record does not say.

    Raises:
        TokenizerError: they differ, or the folder's tokenizer cannot be read.
    """
    # transformers saves a tokenizer without our record; its fingerprint is then computed from the files
    has_tokenizer = (folder / META_FILE).is_file() or (folder / "tokenizer.json").is_file()
    if recorded is not None and has_tokenizer:
        check_same_tokenizer((open_tokenizer(folder).fingerprint, str(folder)), recorded)


def _special_text(folder: Path, config: dict, name: str) -> str:
    """Text of a special token; transformers writes it plainly or as {"content": text, ...}."""
    stated = config.get(f"{name}_token")
    text = stated.get("content") if isinstance(stated, dict) else stated
    if not isinstance(text, str):
        raise TokenizerError(f"{folder / 'tokenizer_config.json'} names no {name}_token; {_AGAIN}.")
    return text


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise TokenizerError(f"{path} cannot be read ({reason}); give a tokenizer folder.") from error


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(_read_text(path))
    # A hostile file may nest deeper than Python's stack.
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not JSON ({error!s:.200}); {_AGAIN}.") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} holds no JSON object; {_AGAIN}.")
    return content
