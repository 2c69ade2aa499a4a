"""Plain tensors by name, one at a time: from a checkpoint of a run, or from a folder of safetensors.

Decides: what a streamed conversion reads from. Nothing is held but the parallel tensor last asked for, because q, k and v
(or gate and up) lie in one. Refuses folders whose index names files elsewhere, and tensors that are not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bd3_megatron.checkpoint.layout import inside
from bd3_megatron.checkpoint.read import CheckpointReader, open_safetensors
from bd3_megatron.convert.name_table import NameTable
from bd3_megatron.errors import CheckpointError, ConversionError, counted
from bd3_megatron.files import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_COPY_AGAIN = "copy the folder again, completely"


class PlainSource(Protocol):
    """Tensors under plain names."""

    def names(self) -> list[str]:
        """All of them, in order of depth."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor."""

    def tensor(self, name: str) -> Tensor:
        """One tensor, whole, on the CPU, as stored."""

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """Some rows of a table, as `tensor(name)[start:end]`, without the others where that can be."""


class StateSource:
    """Tensors in memory.

    Args:
        state: by plain name.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state

    def names(self) -> list[str]:
        """As PlainSource, in the state's order."""
        return list(self._state)

    def shape(self, name: str) -> tuple[int, ...]:
        """As PlainSource."""
        return tuple(self._state[name].shape)

    def tensor(self, name: str) -> Tensor:
        """As PlainSource."""
        return self._state[name].detach().cpu()

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """As PlainSource."""
        return self.tensor(name)[start:end]


class CheckpointSource:
    """A checkpoint's weights under plain names.

    Args:
        reader: the checkpoint.
        table: names and shapes of its model.
        which: "ema" or "model".
    """

    def __init__(self, reader: CheckpointReader, table: NameTable, which: str) -> None:
        self.reader = reader
        self._table = table
        self._which = which
        self._parallel_name = {plain: name for name in table.parallel_names() for plain in table.plain_names(name)}
        # Both ways: a parameter too many is as much another model as one too few.
        missing = sorted(set(table.parallel_names()) ^ {*reader.names(), *reader.bias_names()})
        if missing:
            raise ConversionError(
                f"{reader.folder} and its configuration disagree on {counted(len(missing), 'parameter')}, {missing[0]} among "
                "them; "
                "the checkpoint is of another model."
            )
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def names(self) -> list[str]:
        """As PlainSource."""
        return list(self._parallel_name)

    def shape(self, name: str) -> tuple[int, ...]:
        """As PlainSource: the split of a fused tensor is taken of its shape alone."""
        parallel = self._parallel_name[name]
        # Shapes without bytes: a conversion checks all of them before it reads the first tensor.
        with torch.device("meta"):
            whole = torch.empty(self.reader.shape(parallel))
        return tuple(self._table.to_plain(parallel, whole)[name].shape)

    def tensor(self, name: str) -> Tensor:
        """As PlainSource; fp32."""
        parallel = self._parallel_name[name]
        if self._last[0] != parallel:
            self._last = ("", {})
            self._last = (parallel, self._table.to_plain(parallel, self.reader.tensor(parallel, self._which)))
        return self._last[1][name]

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """As PlainSource; the whole is kept until another tensor is asked for."""
        return self.tensor(name)[start:end]

    def release(self) -> None:
        """Let go of the tensor last asked for."""
        # Let go first: two fused tensors need not fit beside each other.
        self._last = ("", {})


class FolderSource:
    """The tensors of a Hugging Face folder (one safetensors file, or shards with their index).

    Args:
        folder: any model folder.

    Raises:
        CheckpointError: no safetensors there, or an index that names what is missing or lies elsewhere.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of = _index(folder)

    def names(self) -> list[str]:
        """As PlainSource, in the files' order."""
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """As PlainSource."""
        with self._opened(name) as opened:
            return tuple(opened.get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """As PlainSource."""
        with self._opened(name) as opened:
            return opened.get_tensor(name)

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """As PlainSource."""
        with self._opened(name) as opened:
            return opened.get_slice(name)[start:end]

    def _opened(self, name: str) -> Any:
        if name not in self._file_of:
            raise ConversionError(f"tensor '{name}' is missing in {self.folder}; the folder is of another model.")
        return open_safetensors(self._file_of[name])


def _index(folder: Path) -> dict[str, Path]:
    index = folder / INDEX
    if not index.is_file():
        single = folder / SINGLE
        if not single.is_file():
            raise CheckpointError(f"{folder} holds no {SINGLE} and no {INDEX}; give a folder with safetensors weights.")
        with open_safetensors(single) as opened:
            return dict.fromkeys(opened.keys(), single)
    weight_map = read_json(index, _COPY_AGAIN, kind=CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; {_COPY_AGAIN}.")
    # An index from elsewhere may name any path.
    files = {name: inside(folder, str(file)) for name, file in weight_map.items()}
    for path in sorted(set(files.values())):
        with open_safetensors(path) as opened:
            # Found now and not after an hour of writing.
            absent = {name for name, file in files.items() if file == path} - set(opened.keys())
        if absent:
            raise CheckpointError(f"{path} lacks '{min(absent):.80}', which the index names; {_COPY_AGAIN}.")
    return files
