"""Token shards on disk: tokens in .bin, document ends in .idx, everything else in the header of the split.

Contract: DIR/{train,valid,...}/ holds header.json (see shard_header) and part-00000.bin, part-00000.idx, ...;
DIR/tokenizer/ is a Hugging Face tokenizer folder.
Refuses: missing and truncated files when opened, document ends out of order when used, flipped bits when verified.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bd3_megatron.data.shard_header import PREPARE_AGAIN, ShardRecord, read_header
from bd3_megatron.data.special_ids import SpecialIds
from bd3_megatron.errors import DataError
from bd3_megatron.files import disk_errors, write_bytes

# .bin holds little-endian uint16 (V <= 65536) or uint32 tokens, documents end to end; .idx holds little-endian uint64
# [num_documents], the end of each document in tokens; where only answers are predicted, .sup holds a byte a token: 1 is an
# answer's.
SHARD_SUFFIXES = (".bin", ".idx")
SUPERVISED_SUFFIX = ".sup"
END_DTYPE = np.dtype("<u8")
MOST_MAPS = 256
"""Files mapped at a time: each keeps a descriptor, of which a process has 1,024 as a rule."""
_READ_BYTES = 1 << 22


class ShardWriter:
    """Writes the files of a shard inside a folder that is published when it is complete."""

    def __init__(self, stem: Path, dtype: np.dtype[Any], *, answers_only: bool = False) -> None:
        """Open the file of tokens.

        Args:
            stem: path of the shard without .bin and .idx.
            dtype: uint16 or uint32.
            answers_only: a file of what is supervised is written too.
        """
        self._stem, self._dtype = stem, dtype
        self._supervised: IO[bytes] | None = open(self._path(SUPERVISED_SUFFIX), "wb") if answers_only else None  # noqa: SIM115
        self._supervised_hash, self._num_supervised = hashlib.sha256(), 0
        # Written as it comes: a shard may be larger than memory. Only the ends, 8 bytes a document, are kept.
        self._tokens: IO[bytes] = open(self._path(".bin"), "wb")  # noqa: SIM115
        self._hash = hashlib.sha256()
        # an array of machine integers: a list would keep an object of 40 bytes for each
        self._ends: array[int] = array("Q")
        self._num_tokens = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def add(self, documents: list[NDArray[np.uint32]], supervised: list[NDArray[np.bool_]] | None = None) -> None:
        """Append documents, each uint32 [num_tokens], none of them empty, and which of their tokens are supervised."""
        if not documents:
            return
        if self._supervised is not None and supervised is not None:
            flags = np.concatenate(supervised).astype(np.uint8).tobytes()
            self._supervised.write(flags)
            self._supervised_hash.update(flags)
            self._num_supervised += sum(flags)
        # The dtype holds every id of the vocabulary, so the narrowing loses nothing.
        content = np.concatenate(documents).astype(self._dtype).tobytes()
        self._tokens.write(content)
        self._hash.update(content)
        for document in documents:
            self._num_tokens += len(document)
            self._ends.append(self._num_tokens)

    def finish(self) -> ShardRecord | None:
        """Write the ends; None (and no files) where no document was added."""
        self._close()
        # numpy refuses to map an empty file, and a header may not list a shard without tokens.
        if not self._ends:
            self._path(".bin").unlink()
            self._path(SUPERVISED_SUFFIX).unlink(missing_ok=True)
            return None
        ends = np.frombuffer(self._ends, dtype=np.uint64).astype(END_DTYPE, copy=False).tobytes()
        write_bytes(self._path(".idx"), ends)
        return ShardRecord(
            name=self._stem.name,
            num_tokens=self._num_tokens,
            num_documents=len(self._ends),
            bin_sha256=self._hash.hexdigest(),
            idx_sha256=hashlib.sha256(ends).hexdigest(),
            num_supervised=None if self._supervised is None else self._num_supervised,
            sup_sha256=None if self._supervised is None else self._supervised_hash.hexdigest(),
        )

    def _close(self) -> None:
        self._tokens.close()
        if self._supervised is not None:
            self._supervised.close()

    def _path(self, suffix: str) -> Path:
        return self._stem.with_name(self._stem.name + suffix)


class FileMaps:
    """Files mapped into memory; past a limit, the one that was used longest ago is let go."""

    def __init__(self, most: int = MOST_MAPS) -> None:
        self._most = most
        self._maps: OrderedDict[Path, NDArray[np.integer]] = OrderedDict()

    def get(self, path: Path, dtype: np.dtype[Any]) -> NDArray[np.integer]:
        """The file as an array [number of items]. Callers keep no view of it beyond the call they serve.

        Raises:
            DataError: it cannot be opened; the system's own reason is given.
        """
        found = self._maps.get(path)
        if found is None:
            # Dropping the reference closes the map once no view is left, which is why callers may keep none.
            while len(self._maps) >= self._most:
                self._maps.popitem(last=False)
            with disk_errors(f"opening {path}", PREPARE_AGAIN):
                # A plain array on top of the map: indexing the memmap subclass costs three times as much.
                found = self._maps[path] = np.asarray(np.memmap(path, dtype=dtype, mode="r"))
        self._maps.move_to_end(path)
        return found

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would carry the whole shard to a loader process.
        return self.__dict__ | {"_maps": OrderedDict()}


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

    @property
    def held_out_fraction(self) -> float:
        """Share of documents held out by content; see held_out."""

    @property
    def source(self) -> Mapping[str, Any]:
        """Where the text came from and how it was cut and cleaned, as header.json states it; empty where nobody knows."""

    def shard_size(self, shard: int) -> tuple[int, int]:
        """(tokens, documents) of a shard."""

    def tokens(self, shard: int) -> NDArray[np.integer]:
        """All tokens of a shard, mapped: unsigned [num_tokens]."""

    def document_ends(self, shard: int) -> NDArray[np.integer]:
        """End of each document in the shard's tokens: [num_documents], increasing to the number of tokens."""

    @property
    def num_supervised(self) -> int | None:
        """Tokens that are predicted; None: all are."""

    def supervised(self, shard: int) -> NDArray[np.integer] | None:
        """Which of a shard's tokens are predicted, mapped: uint8 [num_tokens], 1 where they are; None: all are."""


class ShardFolder:
    """One split of a prepared folder, opened for reading."""

    def __init__(self, folder: Path | str, *, verify: bool = False, maps: FileMaps | None = None) -> None:
        """Open a split folder and check its header against the files' sizes.

        Args:
            folder: DIR/train or a sibling.
            verify: also compare every checksum (reads all tokens).
            maps: shared with other folders; None: its own.

        Raises:
            DataError: the folder, header or a file is missing, truncated, damaged or of a newer version.
        """
        self.folder = Path(folder)
        self.header = read_header(self.folder)
        self._maps = maps or FileMaps()
        self._in_order: set[int] = set()
        for shard in self.header.shards:
            # Sizes cost one stat a file; checksums would read all tokens at every start.
            _check_size(self._path(shard, ".bin"), shard.num_tokens * self.header.dtype.itemsize)
            _check_size(self._path(shard, ".idx"), shard.num_documents * END_DTYPE.itemsize)
            if shard.sup_sha256 is not None:
                _check_size(self._path(shard, SUPERVISED_SUFFIX), shard.num_tokens)
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

    @property
    def held_out_fraction(self) -> float:
        return self.header.held_out_fraction

    @property
    def source(self) -> Mapping[str, Any]:
        return self.header.source

    def shard_size(self, shard: int) -> tuple[int, int]:
        record = self.header.shards[shard]
        return record.num_tokens, record.num_documents

    def tokens(self, shard: int) -> NDArray[np.integer]:
        # Ids are not checked here: the packing checks the rows that it reads.
        return self._maps.get(self._path(self.header.shards[shard], ".bin"), self.header.dtype)

    def document_ends(self, shard: int) -> NDArray[np.integer]:
        record = self.header.shards[shard]
        path = self._path(record, ".idx")
        ends = self._maps.get(path, END_DTYPE)
        # Sizes say nothing about content: ends out of order would make rows of other documents, or a traceback.
        if shard not in self._in_order:
            if ends[0] == 0 or np.any(ends[1:] <= ends[:-1]) or int(ends[-1]) != record.num_tokens:
                raise DataError(f"{path} does not increase to {record.num_tokens}; {PREPARE_AGAIN}.")
            self._in_order.add(shard)
        return ends

    @property
    def num_supervised(self) -> int | None:
        return self.header.num_supervised

    def supervised(self, shard: int) -> NDArray[np.integer] | None:
        record = self.header.shards[shard]
        if record.sup_sha256 is None:
            return None
        return self._maps.get(self._path(record, SUPERVISED_SUFFIX), np.dtype(np.uint8))

    def verify(self) -> Iterator[ShardRecord]:
        """Check every byte; yields each shard that is sound.

        Raises:
            DataError: a checksum differs, document ends are out of order, or a token is outside [0, V).
        """
        for number, shard in enumerate(self.header.shards):
            expected_of = (
                (".bin", shard.bin_sha256),
                (".idx", shard.idx_sha256),
                (SUPERVISED_SUFFIX, shard.sup_sha256),
            )
            for suffix, expected in expected_of:
                if expected is not None and _sha256(self._path(shard, suffix)) != expected:
                    raise DataError(
                        f"{self._path(shard, suffix)} is damaged (checksum differs from the header); {PREPARE_AGAIN}."
                    )
            # A checksum proves that the file is as it was written, not that what was written makes sense.
            self.document_ends(number)
            if int(self.tokens(number).max()) >= self.vocab_size:
                raise DataError(
                    f"{self._path(shard, '.bin')} holds a token outside [0, {self.vocab_size}); {PREPARE_AGAIN}."
                )
            yield shard

    def _path(self, shard: ShardRecord, suffix: str) -> Path:
        return self.folder / f"{shard.name}{suffix}"


def _check_size(path: Path, expected_bytes: int) -> None:
    if not path.is_file():
        raise DataError(f"{path} is missing; {PREPARE_AGAIN}.")
    actual = path.stat().st_size
    if actual != expected_bytes:
        # A copy that was interrupted is the usual cause, and the remedy differs from a damaged disk's.
        state = "truncated" if actual < expected_bytes else "too long"
        raise DataError(
            f"{path} is {state}: {actual} bytes, the header says {expected_bytes}; copy it again or {PREPARE_AGAIN}."
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while content := file.read(_READ_BYTES):
            digest.update(content)
    return digest.hexdigest()
