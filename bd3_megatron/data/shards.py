"""Token shards on disk: tokens in .bin, document ends in .idx, everything else in one JSON header per split.

Layout of a prepared folder:
    DIR/{train,valid,...}/header.json     version, dtype, tokenizer fingerprint, ids, source, counts, checksums
    DIR/{train,valid,...}/part-00000.bin  tokens, little-endian uint16 (V <= 65536) or uint32, documents end to end
    DIR/{train,valid,...}/part-00000.idx  little-endian uint64 [num_documents], end of each document in tokens
    DIR/tokenizer/                        the tokenizer as a Hugging Face folder
Decides: no special token is stored between documents; where they go is a rule of packing, so one folder serves all rules.
Refuses: missing, truncated, newer or inconsistent files when opened (names and sizes: instantly), flipped bits when
verified (reads everything).
Costs: a shard is mapped into memory, not read; opening is independent of its size.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bd3_megatron.data.special_ids import SpecialIds
from bd3_megatron.errors import DataError
from bd3_megatron.files import disk_errors, flush, move, read_json, write_bytes

FORMAT = "bd3_megatron shards"
SHARDS_VERSION = 1
HEADER_FILE = "header.json"
_PREPARE_AGAIN = "prepare the data again with tools/prepare_data.py"
_END_DTYPE = np.dtype("<u8")
_READ_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One .bin/.idx pair as the header knows it."""

    name: str
    num_tokens: int
    num_documents: int
    bin_sha256: str
    idx_sha256: str


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a split's header.json says."""

    dtype: str
    vocab_size: int
    special_ids: SpecialIds
    tokenizer_fingerprint: str
    shards: tuple[ShardRecord, ...]
    source: dict[str, Any] = field(default_factory=dict)
    """Where the text came from, and how it was cut and cleaned."""
    num_empty_documents: int = 0
    """Documents without any token; they are counted here and stored nowhere."""
    packing: dict[str, bool] = field(default_factory=dict)
    """The recipe's own rule for special tokens (append_eos, wrap_special), where it has one."""

    @property
    def num_tokens(self) -> int:
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def num_documents(self) -> int:
        return sum(shard.num_documents for shard in self.shards)

    def as_dict(self) -> dict[str, Any]:
        content = asdict(self) | {"special_ids": self.special_ids.as_dict()}
        totals = {"num_tokens": self.num_tokens, "num_documents": self.num_documents}
        return {"format": FORMAT, "version": SHARDS_VERSION, **content, **totals}


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Smallest stored dtype for ids in [0, V)."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class ShardWriter:
    """Writes one shard under temporary names; `finish` gives it its final ones."""

    def __init__(self, final_stem: Path, temporary_folder: Path, dtype: np.dtype[Any]) -> None:
        """Open the two files.

        Args:
            final_stem: path of the shard without .bin/.idx.
            temporary_folder: existing folder on the same file system.
            dtype: uint16 or uint32.
        """
        self._final, self._dtype = final_stem, dtype
        self._temporary = temporary_folder / f"{final_stem.parent.name}-{final_stem.name}.{os.getpid()}"
        self._tokens: IO[bytes] = open(self._path(".bin"), "wb")  # noqa: SIM115
        self._hash = hashlib.sha256()
        self._ends: list[int] = []
        self._num_tokens = 0

    @property
    def num_documents(self) -> int:
        return len(self._ends)

    def add(self, documents: list[NDArray[np.uint32]]) -> None:
        """Append documents, each uint32 [num_tokens], none of them empty."""
        if not documents:
            return
        content = np.concatenate(documents).astype(self._dtype).tobytes()
        self._tokens.write(content)
        self._hash.update(content)
        for document in documents:
            self._num_tokens += len(document)
            self._ends.append(self._num_tokens)

    def finish(self) -> ShardRecord | None:
        """Flush and publish both files; None (and no files) where no document was added."""
        if not self._ends:
            self.abandon()
            return None
        ends = np.asarray(self._ends, dtype=_END_DTYPE).tobytes()
        write_bytes(self._path(".idx"), ends)
        self._tokens.close()
        flush(self._path(".bin"))
        for suffix in (".bin", ".idx"):
            move(self._path(suffix), self._final.with_name(self._final.name + suffix))
        return ShardRecord(
            name=self._final.name,
            num_tokens=self._num_tokens,
            num_documents=len(self._ends),
            bin_sha256=self._hash.hexdigest(),
            idx_sha256=hashlib.sha256(ends).hexdigest(),
        )

    def abandon(self) -> None:
        """Remove the temporary files."""
        self._tokens.close()
        for suffix in (".bin", ".idx"):
            self._path(suffix).unlink(missing_ok=True)

    def _path(self, suffix: str) -> Path:
        return self._temporary.with_name(self._temporary.name + suffix)


class TokenShards(Protocol):
    """Read access to tokenised documents, ours or megatron-core's."""

    @property
    def where(self) -> str:
        """Name for error messages."""

    @property
    def num_shards(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_documents(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def special(self) -> SpecialIds: ...

    @property
    def tokenizer_fingerprint(self) -> str:
        """Of the tokenizer that made the ids; see tokenizer_fingerprint."""

    @property
    def packing_rule(self) -> dict[str, bool]:
        """The recipe's own append_eos and wrap_special, where it has them."""

    def shard_size(self, shard: int) -> tuple[int, int]:
        """(tokens, documents that have any) of a shard."""

    def tokens(self, shard: int) -> NDArray[np.integer]:
        """All tokens of a shard, mapped: unsigned [num_tokens]."""

    def document_ends(self, shard: int) -> NDArray[np.integer]:
        """End of each document in the shard's tokens: [num_documents], not decreasing."""


class ShardFolder:
    """One split of a prepared folder, opened for reading."""

    def __init__(self, folder: Path | str, *, verify: bool = False) -> None:
        """Open a split folder and check its header against the files' sizes.

        Args:
            folder: DIR/train or a sibling.
            verify: also compare every checksum (reads all tokens).

        Raises:
            DataError: the folder, header or a file is missing, truncated, damaged or of a newer version.
        """
        self.folder = Path(folder)
        self.header = read_header(self.folder)
        self._maps: dict[tuple[int, str], NDArray[np.integer]] = {}
        dtype_bytes = np.dtype(self.header.dtype).itemsize
        for shard in self.header.shards:
            _check_size(self._path(shard, ".bin"), shard.num_tokens * dtype_bytes)
            _check_size(self._path(shard, ".idx"), shard.num_documents * _END_DTYPE.itemsize)
        if verify:
            for _ in self.verify():
                pass

    @property
    def where(self) -> str:
        return str(self.folder)

    @property
    def num_shards(self) -> int:
        return len(self.header.shards)

    @property
    def num_tokens(self) -> int:
        return self.header.num_tokens

    @property
    def num_documents(self) -> int:
        return self.header.num_documents

    @property
    def vocab_size(self) -> int:
        return self.header.vocab_size

    @property
    def special(self) -> SpecialIds:
        return self.header.special_ids

    @property
    def tokenizer_fingerprint(self) -> str:
        return self.header.tokenizer_fingerprint

    @property
    def packing_rule(self) -> dict[str, bool]:
        return dict(self.header.packing)

    def shard_size(self, shard: int) -> tuple[int, int]:
        record = self.header.shards[shard]
        return record.num_tokens, record.num_documents

    def tokens(self, shard: int) -> NDArray[np.integer]:
        return self._map(shard, ".bin", np.dtype(self.header.dtype))

    def document_ends(self, shard: int) -> NDArray[np.integer]:
        return self._map(shard, ".idx", _END_DTYPE)

    def verify(self) -> Iterator[ShardRecord]:
        """Check every byte; yields each shard that is sound.

        Raises:
            DataError: a checksum differs, document ends are out of order, or a token is outside [0, V).
        """
        for number, shard in enumerate(self.header.shards):
            for suffix, expected in ((".bin", shard.bin_sha256), (".idx", shard.idx_sha256)):
                if _sha256(self._path(shard, suffix)) != expected:
                    raise DataError(
                        f"{self._path(shard, suffix)} is damaged (checksum differs from the header); {_PREPARE_AGAIN}."
                    )
            ends = self.document_ends(number).astype(np.int64)
            if np.any(np.diff(ends, prepend=0) <= 0) or int(ends[-1]) != shard.num_tokens:
                raise DataError(
                    f"{self._path(shard, '.idx')} does not increase to {shard.num_tokens}; {_PREPARE_AGAIN}."
                )
            if int(self.tokens(number).max()) >= self.vocab_size:
                raise DataError(
                    f"{self._path(shard, '.bin')} holds a token outside [0, {self.vocab_size}); {_PREPARE_AGAIN}."
                )
            yield shard

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would carry the whole shard to a loader process.
        return self.__dict__ | {"_maps": {}}

    def _map(self, shard: int, suffix: str, dtype: np.dtype[Any]) -> NDArray[np.integer]:
        key = (shard, suffix)
        if key not in self._maps:
            path = self._path(self.header.shards[shard], suffix)
            with disk_errors(f"opening {path}", _PREPARE_AGAIN):
                # A plain array on top of the map: indexing the memmap subclass costs three times as much.
                self._maps[key] = np.asarray(np.memmap(path, dtype=dtype, mode="r"))
        return self._maps[key]

    def _path(self, shard: ShardRecord, suffix: str) -> Path:
        return self.folder / f"{shard.name}{suffix}"


def read_header(folder: Path) -> Header:
    """Read and check a split's header.json.

    Raises:
        DataError: missing, not JSON, of another format, of a newer version, or with missing or wrong fields.
    """
    path = folder / HEADER_FILE
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist; give a folder made by tools/prepare_data.py.")
    content = read_json(path, _PREPARE_AGAIN)
    if content.get("format") != FORMAT:
        raise DataError(f"{path} is not a header of token shards; {_PREPARE_AGAIN}.")
    if content.get("version") != SHARDS_VERSION:
        raise DataError(
            f"{path} has version {content.get('version')}; this release reads version {SHARDS_VERSION}, "
            f"use the release that wrote it or {_PREPARE_AGAIN}."
        )
    try:
        header = Header(
            dtype=str(content["dtype"]),
            vocab_size=int(content["vocab_size"]),
            special_ids=SpecialIds.from_dict(content["special_ids"], int(content["vocab_size"]), str(path)),
            tokenizer_fingerprint=str(content["tokenizer_fingerprint"]),
            shards=tuple(ShardRecord(**shard) for shard in content["shards"]),
            source=content["source"],
            num_empty_documents=int(content["num_empty_documents"]),
            packing=content["packing"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is damaged (field {error}); {_PREPARE_AGAIN}.") from error
    if header.dtype not in ("<u2", "<u4") or header.num_tokens != content.get("num_tokens"):
        raise DataError(f"{path} is damaged (dtype or counts do not fit together); {_PREPARE_AGAIN}.")
    return header


def _check_size(path: Path, expected_bytes: int) -> None:
    if not path.is_file():
        raise DataError(f"{path} is missing; {_PREPARE_AGAIN}.")
    actual = path.stat().st_size
    if actual != expected_bytes:
        state = "truncated" if actual < expected_bytes else "too long"
        raise DataError(
            f"{path} is {state}: {actual} bytes, the header says {expected_bytes}; copy it again or {_PREPARE_AGAIN}."
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while content := file.read(_READ_BYTES):
            digest.update(content)
    return digest.hexdigest()
