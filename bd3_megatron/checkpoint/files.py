"""Files of tensors, hashed while they are written.

A file's record (size, SHA-256) describes what was meant to be written, not what is read back. Free space is checked
before the first byte.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from bd3_megatron.checkpoint.layout import FileRecord
from bd3_megatron.errors import CheckpointError
from bd3_megatron.files import stream

# Bytes hashed at a time: far above the cost of a call, far below what a rank may spend on memory.
READ_BYTES = 8 * 2**20
SAFETENSORS_NAMES = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16"}
"""safetensors' names; others are not written."""
SPACE_MARGIN = 1.05
"""Archives, sidecars and the manifest cost a little beyond the tensors."""


class HashingFile:
    """What torch.save writes to: counts and hashes the bytes on their way to the disk."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.bytes = 0
        self.failure: OSError | None = None
        """What the disk said when it took no more."""

    def write(self, data: Any) -> int:
        """Write a buffer."""
        view = memoryview(data).cast("B")
        # Hashed before it is written: a disk that changes bytes is found when the file is verified.
        self._digest.update(view)
        self.bytes += view.nbytes
        try:
            self._file.write(view)
        except OSError as error:
            self.failure = error
            raise
        return view.nbytes

    def flush(self) -> None:
        """Called by torch.save."""
        self._file.flush()

    def record(self) -> FileRecord:
        """Size and checksum of all that was written."""
        return FileRecord(self.bytes, self._digest.hexdigest())


def write_torch(path: Path, state: Any) -> FileRecord:
    """torch.save, flushed to the disk."""
    with stream(path) as file:
        hashing = HashingFile(file)
        try:
            # torch.save needs no more of a file than write() and flush().
            torch.save(state, hashing)  # type: ignore[arg-type]
        except RuntimeError as error:
            # torch reports a full disk as an archive at an unexpected position
            raise hashing.failure or error from None
    return hashing.record()


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> FileRecord:
    """A safetensors file, written tensor by tensor from where the tensors are, flushed to the disk.

    Args:
        path: of the file; the folder is made.
        tensors: on the CPU.
        metadata: text beside them.
    """
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return stream_safetensors(path, specs, tensors.__getitem__, metadata)


def stream_safetensors(
    path: Path,
    specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    produce: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> FileRecord:
    """A safetensors file whose tensors are made one at a time, in the order of `specs`.

    Args:
        path: of the file; the folder is made.
        specs: dtype and shape of each tensor, known beforehand.
        produce: makes the tensor of a name, on the CPU, in that dtype and shape.
        metadata: text beside them.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in specs.items():
        # Offsets follow from the specs, so the header is written before any tensor exists.
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    # The format wants the data aligned to 8 bytes; readers map them as they lie.
    text += b" " * (-len(text) % 8)
    with stream(path) as file:
        hashing = HashingFile(file)
        # Source: the safetensors format, a little-endian header length, the header in JSON, then the data.
        hashing.write(struct.pack("<Q", len(text)) + text)
        for name, (dtype, shape) in specs.items():
            tensor = produce(name).detach().contiguous()
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, announced as {dtype} {list(shape)}")
            if tensor.numel():
                # numpy has no bfloat16: the bytes are written, whatever they mean
                hashing.write(tensor.flatten().view(torch.uint8).numpy())
            # the next one is made without this one beside it
            del tensor
    return hashing.record()


def record_of(path: Path) -> FileRecord:
    """Size and checksum of a file as it is on the disk."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        # In chunks: a rank's file may be larger than the host's free memory.
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(size, digest.hexdigest())


def check_space(folder: Path, needed_bytes: int) -> None:
    """Refuse to start writing what will not fit.

    Raises:
        CheckpointError: with the sizes and the remedy.
    """
    needed = int(needed_bytes * SPACE_MARGIN)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder} has {free / 2**30:.2f} GiB free and a checkpoint needs {needed / 2**30:.2f} GiB; free some space, "
            "or lower checkpoint.keep_last."
        )


def tensor_bytes(values: Iterable[Any]) -> int:
    """Bytes of all tensors in nested containers, each storage counted once."""
    seen: dict[int, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            # Keyed by address, so that views of one storage count once; empty tensors all have address 0.
            if value.numel():
                seen[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, Mapping):
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                walk(inner)

    for value in values:
        walk(value)
    return sum(seen.values())
