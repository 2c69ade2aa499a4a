"""megatron-core's indexed datasets (PREFIX.bin + PREFIX.idx), read only, for people who have them.

Contract: what the format stores as documents are our documents; its sequences are joined inside a document.
Refuses: another magic or version, truncated files, dtypes that are no integers, sequences that are not end to end.
Source: megatron/core/datasets/indexed_dataset.py, _IndexReader (megatron-core 0.16).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bd3_megatron.data.shard_header import HEADER_FILE
from bd3_megatron.data.shards import FileMaps, ShardFolder, TokenShards
from bd3_megatron.data.special_ids import SpecialIds
from bd3_megatron.data.tokenizer_open import load_tokenizer
from bd3_megatron.errors import DataError
from bd3_megatron.files import disk_errors

_MAGIC = b"MMIDIDX\x00\x00"
# Magic, version, dtype code, number of sequences, number of document bounds; "<" also means no padding bytes.
_HEAD = struct.Struct("<9sQBQQ")
# Codes 6 and 7 are floats in the format, which hold no token ids.
_DTYPES: tuple[tuple[int, str], ...] = ((1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2"))
_COPY_AGAIN = "copy the dataset again or make it anew"


def open_shards(path: Path | str, *, verify: bool = False, maps: FileMaps | None = None) -> TokenShards:
    """Open a split folder of ours, or a megatron indexed dataset by its prefix.

    Args:
        path: DIR/train or a sibling, or a prefix with or without .bin or .idx.
        verify: compare all checksums first.
        maps: shared with other folders; None: its own.

    Raises:
        DataError: neither is there, or what is there is damaged.
    """
    path = Path(path)
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    index = prefix.with_name(prefix.name + ".idx")
    # A split folder wins where both exist: it carries checksums and the tokenizer's fingerprint.
    if not (path / HEADER_FILE).is_file() and index.is_file():
        return MegatronIndexed(prefix)
    return ShardFolder(path, verify=verify, maps=maps)


class MegatronIndexed:
    """One indexed dataset as a single shard."""

    def __init__(self, prefix: Path | str) -> None:
        """Open PREFIX.idx and PREFIX.bin.

        Raises:
            DataError: see the module's refusals.
            TokenizerError: the tokenizer folder beside it is damaged.
        """
        self.prefix = Path(prefix)
        dtype, lengths, pointers, documents = self._read_index()
        self._check(dtype, lengths, pointers, documents)
        tokenizer = load_tokenizer(self._tokenizer_folder())
        self._special, self._vocab_size = tokenizer.special, tokenizer.vocab_size
        self._fingerprint = tokenizer.fingerprint
        # int64: the format stores lengths as int32, whose sum overflows beyond 2^31 tokens.
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        document_ends = ends[documents[1:]].astype(np.int64)
        # The format keeps documents without tokens; here a document has at least one.
        self._ends: NDArray[np.int64] = document_ends[np.diff(document_ends, prepend=0) > 0]
        self._dtype, self._num_tokens = dtype, int(ends[-1])
        self._tokens: NDArray[np.integer] | None = None

    @property
    def where(self) -> str:
        return str(self.prefix)

    @property
    def num_shards(self) -> int:
        return 1

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    @property
    def num_documents(self) -> int:
        return len(self._ends)

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def special(self) -> SpecialIds:
        return self._special

    @property
    def tokenizer_fingerprint(self) -> str:
        return self._fingerprint

    @property
    def packing_rule(self) -> dict[str, bool]:
        # The format records no rule. Such sets usually hold an end token after every document already: open them with
        # append_eos=False then.
        return {}

    @property
    def held_out_fraction(self) -> float:
        # Nothing is known about what was held out, so nothing is promised.
        return 0.0

    @property
    def source(self) -> Mapping[str, Any]:
        return {}

    def shard_size(self, shard: int) -> tuple[int, int]:
        return self._num_tokens, self.num_documents

    def tokens(self, shard: int) -> NDArray[np.integer]:
        if self._tokens is None:
            with disk_errors(f"opening {self._file('.bin')}", _COPY_AGAIN):
                self._tokens = np.asarray(np.memmap(self._file(".bin"), dtype=self._dtype, mode="r"))
        return self._tokens

    def document_ends(self, shard: int) -> NDArray[np.integer]:
        return self._ends

    @property
    def num_supervised(self) -> int | None:
        return None

    def supervised(self, shard: int) -> NDArray[np.integer] | None:
        # the format has no such file
        return None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tokens": None}

    def _file(self, suffix: str) -> Path:
        return self.prefix.with_name(self.prefix.name + suffix)

    def _tokenizer_folder(self) -> Path:
        # The tokenizer is not in the format, so it is looked for beside it: PREFIX_tokenizer/, then tokenizer/.
        own = self.prefix.with_name(self.prefix.name + "_tokenizer")
        return own if own.is_dir() else self.prefix.with_name("tokenizer")

    def _read_index(self) -> tuple[np.dtype[Any], NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
        path = self._file(".idx")
        with disk_errors(f"reading {path}", _COPY_AGAIN):
            content = path.read_bytes()
        if len(content) < _HEAD.size or content[:9] != _MAGIC:
            raise DataError(f"{path} is no megatron index (wrong magic); give the prefix of a .bin/.idx pair.")
        _, version, code, num_sequences, num_documents = _HEAD.unpack_from(content)
        if version != 1:
            raise DataError(f"{path} has version {version}; only version 1 is known, {_COPY_AGAIN}.")
        names = dict(_DTYPES)
        if code not in names:
            raise DataError(f"{path} stores tokens as dtype code {code}, which is no integer; {_COPY_AGAIN}.")
        # 4 bytes of length and 8 of pointer a sequence, 8 a document bound; multimodal sets append more, which is
        # ignored.
        if len(content) < _HEAD.size + 12 * num_sequences + 8 * num_documents:
            raise DataError(f"{path} is truncated: {len(content)} bytes for {num_sequences} sequences; {_COPY_AGAIN}.")
        at = _HEAD.size
        lengths = np.frombuffer(content, dtype="<i4", count=num_sequences, offset=at)
        pointers = np.frombuffer(content, dtype="<i8", count=num_sequences, offset=at + 4 * num_sequences)
        documents = np.frombuffer(content, dtype="<i8", count=num_documents, offset=at + 12 * num_sequences)
        return np.dtype(names[code]), lengths, pointers, documents

    def _check(
        self,
        dtype: np.dtype[Any],
        lengths: NDArray[np.int32],
        pointers: NDArray[np.int64],
        documents: NDArray[np.int64],
    ) -> None:
        path = self._file(".bin")
        ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
        # Pointers are byte offsets. Gaps would make a document of tokens that belong to none.
        if not np.array_equal(pointers, np.concatenate([[0], ends])[: len(pointers)]):
            raise DataError(f"{self._file('.idx')} has sequences that are not end to end; {_COPY_AGAIN}.")
        bad = (
            len(documents) == 0 or documents[0] != 0 or documents[-1] != len(lengths) or np.any(np.diff(documents) < 0)
        )
        if bad:
            raise DataError(f"{self._file('.idx')} has document bounds out of order; {_COPY_AGAIN}.")
        expected = int(ends[-1]) if len(ends) else 0
        if not path.is_file() or path.stat().st_size != expected:
            actual = path.stat().st_size if path.is_file() else 0
            raise DataError(f"{path} has {actual} bytes, its index says {expected}; {_COPY_AGAIN}.")
