"""Manifests and indices from outside, broken at random: every one is read rightly or refused in one sentence."""

from __future__ import annotations

import copy
import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bd3_megatron.data.loader import TokenDataset
from bd3_megatron.data.special_ids import SpecialTexts
from bd3_megatron.data.tokenizer_bytes import byte_tokenizer_json
from bd3_megatron.data.tokenizer_fast import FastTokenizer
from bd3_megatron.data.tokenizer_open import load_tokenizer
from bd3_megatron.errors import BD3Error
from tests.unit.data.corpora import BYTES, documents, write_split

GOLDEN = Path(__file__).parent / "golden"
LONGEST_MESSAGE = 600
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, 0.5, float("nan"), float("inf"), "", "x", "../../etc", "a" * 5000,
    "0" * 64, [], [[]], [1], {}, {"a": 1}, {"name": "part-00000"},
)  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared split, its tokenizer, and an indexed dataset with one."""
    root = tmp_path_factory.mktemp("sound")
    write_split(root / "train", [documents(9, seed=1), documents(5, seed=2)], held_out_fraction=0.1)
    BYTES.save(root / "tokenizer")
    texts = SpecialTexts(bos="<bos>", eos="<eos>", pad="<pad>", mask="<mask>")
    FastTokenizer(byte_tokenizer_json(), texts, where="fast").save(root / "fast")
    for suffix in (".bin", ".idx"):
        shutil.copy(GOLDEN / f"megatron_int32{suffix}", root / f"corpus{suffix}")
    return root


def read_all(root: Path, name: str) -> None:
    """Open and read what a training run would: a tokenizer folder, a split or an indexed dataset."""
    if (root / name).is_dir() and name != "train":
        load_tokenizer(root / name)
        return
    for packing in ("wrap", "isolated"):
        dataset = TokenDataset.open(root / name, seq_len=4, packing=packing, block_size=2)
        assert dataset.num_rows < 10_000
        batch = dataset.batch_for(torch.arange(dataset.num_rows))
        assert int(batch.tokens_BL.min()) >= 0 and int(batch.tokens_BL.max()) < dataset.vocab_size


def mutated_json(content: Any, chosen: random.Random) -> Any:
    """A copy with one field, anywhere, replaced or left out."""
    changed = copy.deepcopy(content)
    node, key = chosen.choice(list(fields_of(changed)))
    if chosen.random() < 0.2:
        del node[key]
    else:
        node[key] = copy.deepcopy(chosen.choice(VALUES))
    return changed


def fields_of(node: Any) -> Iterator[tuple[Any, Any]]:
    """(object or list, key) of every field inside."""
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        yield node, key
        if isinstance(value, dict | list):
            yield from fields_of(value)


def mutated_bytes(content: bytes, chosen: random.Random) -> bytes:
    """A copy with a number in it replaced, cut short or longer; the head of an index is hit as often as the rest."""
    changed = bytearray(content)
    kind = chosen.random()
    if kind < 0.15:
        return bytes(changed[: chosen.randrange(len(changed))])
    if kind < 0.25:
        return bytes(changed) + chosen.randbytes(chosen.randint(1, 20))
    width, code = chosen.choice([(1, "<B"), (4, "<i"), (8, "<q")])
    end = min(34, len(changed)) if chosen.random() < 0.5 else len(changed)
    at = chosen.randrange(max(end - width, 1))
    high = 1 << (8 * width - 1)
    value = chosen.choice([0, 1, 2, high - 1, chosen.randrange(high)])
    changed[at : at + width] = struct.pack(code, value)
    return bytes(changed)


def json_change(path: Path, chosen: random.Random) -> None:
    path.write_text(json.dumps(mutated_json(json.loads(path.read_text()), chosen)))


def bytes_change(path: Path, chosen: random.Random) -> None:
    path.write_bytes(mutated_bytes(path.read_bytes(), chosen))


@pytest.mark.parametrize(
    ("name", "change", "num_cases"),
    [
        ("train/header.json", json_change, 100),
        ("tokenizer/bd3_tokenizer.json", json_change, 15),
        ("fast/bd3_tokenizer.json", json_change, 15),
        ("fast/tokenizer_config.json", json_change, 20),
        ("fast/tokenizer.json", bytes_change, 10),
        ("train/header.json", bytes_change, 20),
        ("train/part-00000.idx", bytes_change, 30),
        ("train/part-00001.bin", bytes_change, 10),
        ("corpus.idx", bytes_change, 60),
        ("corpus.bin", bytes_change, 20),
    ],
)
def test_a_broken_manifest_is_read_rightly_or_refused_in_a_sentence(
    sound: Path, tmp_path: Path, name: str, change: Callable[[Path, random.Random], None], num_cases: int
) -> None:
    refused = 0
    for seed in range(num_cases):
        folder = tmp_path / str(seed)
        shutil.copytree(sound, folder)
        change(folder / name, random.Random(f"{name} {seed}"))
        try:
            read_all(folder, Path(name).parts[0].removesuffix(".idx").removesuffix(".bin"))
        except BD3Error as error:
            message = str(error)
            assert len(message) <= LONGEST_MESSAGE and "\n" not in message and message.endswith("."), message
            refused += 1
        shutil.rmtree(folder)
    assert refused >= num_cases // 8


def test_what_is_sound_is_read(sound: Path) -> None:
    for name in ("train", "corpus", "tokenizer", "fast"):
        read_all(sound, name)
