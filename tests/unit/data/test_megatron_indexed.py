"""megatron-core's indexed datasets read as it wrote them.

The files in golden/ were written by IndexedDatasetBuilder of megatron-core 0.16.1: four documents, the first of two
sequences, the third of none.
"""

from __future__ import annotations

import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch

from bd3_megatron.data.loader import TokenDataset
from bd3_megatron.data.megatron_indexed import MegatronIndexed, open_shards
from bd3_megatron.data.shards import ShardFolder
from bd3_megatron.errors import DataError, TokenizerError
from tests.unit.data.corpora import BYTES, SPECIAL, documents, write_split

GOLDEN = Path(__file__).parent / "golden"
TOKENS = [72, 101, 108, 108, 111, 33, 119, 111, 114, 108, 100, 257]


@pytest.fixture(params=["uint16", "int32"])
def prefix(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    for suffix in (".bin", ".idx"):
        shutil.copy(GOLDEN / f"megatron_{request.param}{suffix}", tmp_path / f"corpus{suffix}")
    BYTES.save(tmp_path / "tokenizer")
    return tmp_path / "corpus"


def test_documents_are_read_as_they_were_written(prefix: Path) -> None:
    opened = MegatronIndexed(prefix)
    assert opened.tokens(0).tolist() == TOKENS
    assert opened.document_ends(0).tolist() == [5, 6, 12]
    assert (opened.num_tokens, opened.num_documents, opened.num_shards) == (12, 3, 1)
    assert opened.shard_size(0) == (12, 3)
    assert opened.special == SPECIAL and opened.vocab_size == 260
    assert pickle.loads(pickle.dumps(opened)).tokens(0).tolist() == TOKENS


@pytest.mark.parametrize("name", ["corpus", "corpus.bin", "corpus.idx"])
def test_a_dataset_opens_by_prefix_or_file(prefix: Path, name: str) -> None:
    dataset = TokenDataset.open(prefix.with_name(name), seq_len=4, append_eos=False, shuffle=False)
    assert dataset.batch_for(torch.arange(3)).tokens_BL.flatten().tolist() == TOKENS
    padded = TokenDataset.open(prefix.with_name(name), seq_len=6, packing="pad", shuffle=False)
    assert padded.batch_for(torch.arange(3)).tokens_BL.tolist() == [
        [72, 101, 108, 108, 111, 257],
        [33, 257, 258, 258, 258, 258],
        [119, 111, 114, 108, 100, 257],
    ]


def test_a_tokenizer_folder_of_its_own_comes_first(prefix: Path) -> None:
    (prefix.with_name("tokenizer")).rename(prefix.with_name("corpus_tokenizer"))
    assert MegatronIndexed(prefix).vocab_size == 260
    shutil.rmtree(prefix.with_name("corpus_tokenizer"))
    with pytest.raises(TokenizerError, match=r"tokenizer/bd3_tokenizer.json cannot be read"):
        MegatronIndexed(prefix)


def test_our_own_folders_open_by_the_same_function(tmp_path: Path) -> None:
    write_split(tmp_path / "train", [documents(3, seed=1)])
    assert isinstance(open_shards(tmp_path / "train", verify=True), ShardFolder)
    with pytest.raises(DataError, match="nothing does not exist"):
        open_shards(tmp_path / "nothing")


def patched(path: Path, offset: int, content: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[offset : offset + len(content)] = content
    path.write_bytes(whole)


@pytest.mark.parametrize(
    ("offset", "content", "sentence"),
    [
        (0, b"OTHER", "is no megatron index .wrong magic.; give the prefix"),
        (9, struct.pack("<Q", 2), "has version 2; only version 1 is known"),
        (17, struct.pack("<B", 7), "stores tokens as dtype code 7, which is no integer"),
        (18, struct.pack("<Q", 10**6), "is truncated: .* bytes for 1000000 sequences"),
        (34, struct.pack("<i", 9), "has sequences that are not end to end"),
        (34 + 4 * 12, struct.pack("<q", 3), "has document bounds out of order"),
        (34 + 4 * 12 + 8, struct.pack("<q", 4), "has document bounds out of order"),
    ],
)
def test_damaged_indices_are_refused(prefix: Path, offset: int, content: bytes, sentence: str) -> None:
    patched(prefix.with_name("corpus.idx"), offset, content)
    with pytest.raises(DataError, match=sentence):
        MegatronIndexed(prefix)


def test_damaged_tokens_are_refused(prefix: Path) -> None:
    tokens = prefix.with_name("corpus.bin")
    size = tokens.stat().st_size
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(DataError, match=f"corpus.bin has {size - 2} bytes, its index says {size}"):
        MegatronIndexed(prefix)
    tokens.unlink()
    with pytest.raises(DataError, match=f"corpus.bin has 0 bytes, its index says {size}"):
        MegatronIndexed(prefix)
    with pytest.raises(DataError, match=r"reading .*none.idx failed .No such file or directory"):
        MegatronIndexed(prefix.with_name("none"))
