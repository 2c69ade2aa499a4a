"""A tokenizer's files after its mask has got another id, as the model's rows have.

Only the mask's id changes. A vocabulary that is a list, where a token's place is its id, cannot hold an id beyond its end;
such a tokenizer is left as it was, and the caller says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bd3_megatron.errors import TokenizerError
from bd3_megatron.files import read_json, write_json

AGAIN = "copy the tokenizer's files again"


def move_mask(folder: Path, old: int, new: int) -> bool:
    """Give the mask of a folder's tokenizer another id.

    Args:
        folder: holds tokenizer.json.
        old: its id there.
        new: its id afterwards; of no token so far.

    Returns:
        Whether the tokenizer now says `new`.

    Raises:
        TokenizerError: files that are damaged.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return False
    tree = read_json(path, AGAIN, kind=TokenizerError)
    model = tree.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    added = [token for token in tree.get("added_tokens") or [] if token.get("id") == old]
    # An id that another token has already would make two texts one.
    if not isinstance(vocabulary, dict) or not added or new in vocabulary.values():
        return False
    text = added[0]["content"]
    added[0]["id"] = new
    # an added token takes the next free id when the file is read, unless the vocabulary itself knows it by another
    vocabulary[text] = new
    write_json(path, tree)
    _rename_key(folder / "tokenizer_config.json", "added_tokens_decoder", str(old), str(new))
    # The older format's file says it once more.
    _set_value(folder / "added_tokens.json", text, new)
    # its checksum and its ids are of the tokenizer that trained the model
    (folder / "bd3_tokenizer.json").unlink(missing_ok=True)
    return True


def _rename_key(path: Path, table: str, old: str, new: str) -> None:
    if not path.is_file():
        return
    tree: dict[str, Any] = read_json(path, AGAIN, kind=TokenizerError)
    if isinstance(tree.get(table), dict) and old in tree[table]:
        tree[table][new] = tree[table].pop(old)
        write_json(path, tree)


def _set_value(path: Path, key: str, value: int) -> None:
    if not path.is_file():
        return
    tree = read_json(path, AGAIN, kind=TokenizerError)
    if key in tree:
        write_json(path, tree | {key: value})
