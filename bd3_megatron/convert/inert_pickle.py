"""Read a torch checkpoint without executing what is pickled in it.

A Lightning .ckpt pickles arbitrary objects beside its tensors, and unpickling an object runs code of the file's author.
Here only names on a short list are resolved (containers, numbers, and torch's own tensor rebuilding); every other class
or function becomes a subclass of `Inert`, which keeps the arguments and state it was given and does nothing. The reader
reports each name that it made inert. Refuses files that are not torch's zip format.
Source: CPython pickle protocol (GLOBAL, REDUCE, NEWOBJ, BUILD); torch/serialization.py, `pickle_module`.
"""

from __future__ import annotations

import builtins
import pickle
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar

import torch

from bd3_megatron.errors import CheckpointError

# Constructors that only build a value from their arguments.
PLAIN_BUILTINS = frozenset(
    {"bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "set", "str", "tuple"}
)
TENSOR_REBUILDERS = frozenset({"_rebuild_tensor_v2", "_rebuild_parameter"})


class Inert:
    """A placeholder for an object that was not rebuilt: its name, the arguments and the state in the file.

    Args:
        arguments: whatever the file passed; kept, never called.
    """

    qualified_name: ClassVar[str] = ""
    arguments: tuple[Any, ...]
    state: Any
    items: list[Any]

    def __new__(cls, *arguments: Any, **keywords: Any) -> Inert:
        made = object.__new__(cls)
        made.arguments, made.state, made.items = (*arguments, *keywords.values()), None, []
        return made

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        """Everything was kept by __new__, which pickle may call alone."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def __call__(self, *arguments: Any, **keywords: Any) -> Inert:
        return type(self)(*arguments, **keywords)

    def append(self, value: Any) -> None:
        """Keep an element that the file adds."""
        self.items.append(value)

    def extend(self, values: Any) -> None:
        """Keep elements that the file adds."""
        self.items.extend(values)

    def add(self, value: Any) -> None:
        """Keep an element that the file adds."""
        self.items.append(value)


def resolve(module: str, name: str) -> Any | None:
    """The real object behind a pickled name when it is on the list, else None."""
    if module in ("builtins", "__builtin__"):
        if name == "long":
            return int
        return getattr(builtins, name) if name in PLAIN_BUILTINS else None
    if (module, name) == ("collections", "OrderedDict"):
        return OrderedDict
    if module == "torch._utils" and name in TENSOR_REBUILDERS:
        return torch._utils.__dict__[name]
    if module == "torch":
        found = torch.__dict__.get(name)
        return found if isinstance(found, torch.dtype) or found in (torch.Size, torch.device) else None
    return None


def restricted_pickle(made_inert: set[str]) -> types.ModuleType:
    """A stand-in for the `pickle` module whose unpickler resolves listed names only; adds the others to `made_inert`."""

    class RestrictedUnpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            found = resolve(module, name)
            if found is not None:
                return found
            full_name = f"{module}.{name}"
            made_inert.add(full_name)
            return type(name.rpartition(".")[2], (Inert,), {"qualified_name": full_name})

    stand_in = types.ModuleType("restricted_pickle")
    stand_in.Unpickler = RestrictedUnpickler  # type: ignore[attr-defined]
    stand_in.load = lambda file, **options: RestrictedUnpickler(file, **options).load()  # type: ignore[attr-defined]
    return stand_in


def read_inert(path: Path) -> tuple[Any, list[str]]:
    """Content of a torch checkpoint, with every unknown class inert.

    Args:
        path: a file written by torch.save (zip format).

    Returns:
        The unpickled content (tensors on the CPU), and the names made inert, sorted.

    Raises:
        CheckpointError: the file is missing, not in zip format, or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; give a Lightning .ckpt file.")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} is not a torch checkpoint in zip format, or is cut short; copy it again, or save it with torch >= 1.6."
        )
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("constants.pkl") for name in archive.namelist()):
            raise CheckpointError(
                f"{path} is a TorchScript program, which would run when loaded; give a plain checkpoint."
            )
    made_inert: set[str] = set()
    try:
        content = torch.load(path, map_location="cpu", pickle_module=restricted_pickle(made_inert), weights_only=False)
    except Exception as error:  # noqa: BLE001 - a damaged or hostile pickle can raise anything
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}); copy it again.") from None
    return content, sorted(made_inert)


def plain_value(node: Any, depth: int = 16) -> Any:
    """What an inert configuration node says, as dicts, lists and scalars; None where it cannot be told.

    Reads omegaconf's DictConfig and ListConfig (`_content`) and value nodes (`_val`), and plain containers.
    """
    if depth == 0:
        return None
    if isinstance(node, Inert):
        state = node.state[0] if isinstance(node.state, tuple) and node.state else node.state
        if not isinstance(state, dict):
            return None
        inner = state.get("_content", state.get("_val"))
        return plain_value(inner, depth - 1)
    if isinstance(node, dict):
        return {key: plain_value(value, depth - 1) for key, value in node.items() if isinstance(key, str)}
    if isinstance(node, (list, tuple)):
        return [plain_value(value, depth - 1) for value in node]
    return node if isinstance(node, (bool, int, float, str)) else None
