"""Read an official checkpoint whose author pickled objects of his libraries beside the tensors.

torch's weights-only reader opens it; every name that it does not know becomes an `Unread`, which keeps arguments and
state and runs nothing. A file that names functions of Python itself, as one written to run code does, is refused.
Source: torch/serialization.py, get_unsafe_globals_in_checkpoint and safe_globals.
"""

from __future__ import annotations

import sys
from _compat_pickle import IMPORT_MAPPING
from pathlib import Path
from typing import Any

from bd3_megatron.checkpoint.restricted_pickle import open_pt, unlisted_names
from bd3_megatron.errors import CheckpointError

PLAIN_BUILTINS = (bool, bytes, dict, float, frozenset, int, list, str, tuple)
"""Types that only build a value; configurations name them as the types of their fields."""
DATA_MODULES = frozenset({"argparse", "collections", "copyreg", "datetime", "enum", "functools", "pathlib", "typing"})
"""Modules of Python whose objects stand in configurations; a stand-in keeps what they hold."""
# Configurations nest a handful of levels; a hostile file may refer to itself.
MAX_DEPTH = 16


class Unread:
    """What a file says of an object whose class is not loaded.

    Args:
        arguments: whatever the file passes; kept, never called.
    """

    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> Unread:
        # pickle calls __new__ alone
        made = object.__new__(cls)
        made.arguments, made.state = arguments, None
        return made

    def __init__(self, *arguments: Any) -> None:
        """__new__ has kept everything."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_foreign(path: Path) -> tuple[Any, list[str]]:
    """Content of a torch checkpoint, and the names that were not loaded, sorted.

    Args:
        path: a file written by torch.save (zip format).

    Raises:
        CheckpointError: missing, not in zip format, damaged, or made to run code.
    """
    # Listed from the file's instructions, before any of them is carried out.
    names = unlisted_names(path)
    plain = {f"builtins.{kind.__name__}": kind for kind in PLAIN_BUILTINS}
    harmful = [name for name in names if name not in plain and _is_code_of_python(name)]
    if harmful:
        raise CheckpointError(
            f"{path} would call {', '.join(harmful[:3])} when unpickled, which no model needs; it was not opened, "
            "do not use it."
        )
    # a default dictionary is filled item by item, which the reader allows for plain dictionaries only
    known: dict[str, Any] = plain | {"collections.defaultdict": _empty_dictionary}
    content = open_pt(path, stand_ins=[(known.get(name, Unread), name) for name in names])
    return content, [name for name in names if name not in known]


def _is_code_of_python(name: str) -> bool:
    module = name.partition(".")[0]
    # torch.save writes names of Python 2: subprocess is called commands
    module = IMPORT_MAPPING.get(module, module).partition(".")[0]
    return module in sys.stdlib_module_names and module not in DATA_MODULES


def _empty_dictionary(*_: Any) -> dict[Any, Any]:
    return {}


def plain_value(node: Any, depth: int = MAX_DEPTH) -> Any:
    """What an unread configuration node says, as dicts, lists and scalars; None where it cannot be told.

    Reads omegaconf's DictConfig and ListConfig (`_content`) and value nodes (`_val`), and plain containers.
    """
    if depth == 0:
        return None
    if isinstance(node, Unread):
        state = node.state[0] if isinstance(node.state, tuple) and node.state else node.state
        if not isinstance(state, dict):
            return None
        # omegaconf keeps a container's content under the one name and a value under the other.
        inner = state.get("_content", state.get("_val"))
        return plain_value(inner, depth - 1)
    if isinstance(node, dict):
        return {key: plain_value(value, depth - 1) for key, value in node.items() if isinstance(key, str)}
    if isinstance(node, (list, tuple)):
        return [plain_value(value, depth - 1) for value in node]
    return node if isinstance(node, (bool, int, float, str)) else None
