"""Held out by content: over growing corpora, copies, kinds of source, mixtures and streams, nothing is on both sides."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pytest

from bd3_megatron.data.cleaning import sample_documents
from bd3_megatron.data.dataset_source import HubDataset
from bd3_megatron.data.held_out import (
    check_fraction,
    check_nothing_leaks,
    check_read_alike,
    content_key,
    fraction_of,
    is_held_out,
)
from bd3_megatron.data.loader import TokenDataset, check_held_out
from bd3_megatron.data.packing import PackingRule
from bd3_megatron.data.prepare import PrepareRequest, prepare
from bd3_megatron.data.shards import ShardFolder
from bd3_megatron.data.source import Source
from bd3_megatron.data.stream_shard import StreamShard
from bd3_megatron.data.streaming import plan_stream
from bd3_megatron.data.text_files import TextFiles
from bd3_megatron.errors import ConfigError, DataError, TokenizerError
from tests.unit.data.corpora import WORDS, documents, write_split

FRACTION = 0.2
KINDS = ("table", "stream", "text", "text stream", "saved stream")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow copies go to a folder of the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def texts(chosen: random.Random, count: int) -> list[str]:
    """Short documents."""
    return [
        " ".join(chosen.choices(WORDS, k=chosen.randint(3, 12))) + f" {chosen.randrange(10**6)}." for _ in range(count)
    ]


def with_copies(chosen: random.Random, listed: Sequence[str]) -> list[str]:
    """The documents in another order, a third of them twice, some copies with other white space."""
    copies = [
        chosen.choice([text, f"  {text}", text.replace(" ", "  ")]) for text in chosen.sample(listed, len(listed) // 3)
    ]
    mixed = [*listed, *copies]
    chosen.shuffle(mixed)
    return mixed


def source_of(folder: Path, kind: str, listed: Sequence[str]) -> Source:
    """The documents in two files of a kind."""
    folder.mkdir(parents=True)
    halves = (listed[: len(listed) // 3], listed[len(listed) // 3 :])
    if kind == "saved stream":
        datasets.Dataset.from_dict({"text": list(listed)}).save_to_disk(str(folder), num_shards=2)
        return HubDataset(path=str(folder), streaming=True)
    for number, half in enumerate(halves):
        if kind.startswith("text"):
            (folder / f"{number}.txt").write_text("\n\n".join(half))
        else:
            (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in half))
    if kind == "text":
        return TextFiles(paths=(str(folder),))
    return HubDataset(path=str(folder), streaming=kind != "table")


def sides(folder: Path) -> tuple[set[str], set[str]]:
    """Words of the training and of the held-out documents of a folder made with the byte tokenizer."""
    found = []
    for split in ("train", "valid"):
        shards = ShardFolder(folder / split)
        pieces = [
            np.split(shards.tokens(n), shards.document_ends(n)[:-1].astype(int)) for n in range(shards.num_shards)
        ]
        found.append({" ".join(bytes(t.astype(np.uint8)).decode().split()) for some in pieces for t in some})
    return found[0], found[1]


def streamed(plan_folder: Path, source: HubDataset, fraction: float) -> set[str]:
    """Words of the documents that a stream trains on in its first pass."""
    rule = PackingRule(seq_len=8)
    plan = plan_stream(
        source, plan_folder / "tokenizer", rule, num_shards=1, shuffle_rows=1, held_out_fraction=fraction
    )
    shard, tokens, number = StreamShard(plan, 0), [], 0
    while shard.state_before(number).epoch == 0:
        tokens += shard.row(number).tokens_BL.tolist()
        number += 1
    found = bytes(t if t < 256 else 0 for t in tokens).decode(errors="replace").split("\0")
    return {" ".join(text.split()) for text in found[:-1]}


@pytest.mark.parametrize("seed", range(4))
def test_training_and_held_out_texts_are_disjoint_and_a_grown_corpus_keeps_what_is_held_out(
    tmp_path: Path, seed: int
) -> None:
    chosen = random.Random(seed)
    old, new, other = texts(chosen, 40), texts(chosen, 40), texts(chosen, 30)
    corpora = {"old": old, "grown": [*old, *new], "other": [*chosen.sample(old, 15), *other]}
    trained: dict[str, set[str]] = {}
    held: dict[str, set[str]] = {}
    for name, listed in corpora.items():
        kind = chosen.choice(KINDS)
        source = source_of(tmp_path / "text" / name, kind, with_copies(chosen, listed))
        prepare(PrepareRequest(out=tmp_path / name, sources={"train": source}, valid_fraction=FRACTION))
        trained[name], held[name] = sides(tmp_path / name)
        assert held[name] == {" ".join(t.split()) for t in listed if is_held_out(content_key(t), FRACTION)}
        assert trained[name] | held[name] == {" ".join(t.split()) for t in listed}
    # A mixture of them all trains on every training split.
    everything = set.union(*trained.values())
    assert not everything & set.union(*held.values())
    assert held["old"] <= held["grown"] and 0 < len(held["old"]) < len(held["grown"]) < len(corpora["grown"]) / 2
    splits = [TokenDataset.open(tmp_path / name / "train", seq_len=8).sources[0].shards for name in corpora]
    check_held_out(ShardFolder(tmp_path / "grown" / "valid"), splits)
    # A stream over the grown corpus beside the folder of the old one.
    kind = chosen.choice([kind for kind in KINDS if kind.endswith("stream")])
    stream = source_of(tmp_path / "text" / "streamed", kind, with_copies(chosen, corpora["grown"]))
    assert isinstance(stream, HubDataset)
    seen = streamed(tmp_path / "old", stream, splits[0].held_out_fraction)
    assert not seen & held["old"] and seen | held["grown"] == trained["grown"] | held["grown"]


def test_every_kind_of_source_holds_out_the_same_documents(tmp_path: Path) -> None:
    listed = texts(random.Random(5), 50)
    found = []
    for kind in KINDS:
        source = source_of(tmp_path / "sources" / kind, kind, listed)
        prepare(PrepareRequest(out=tmp_path / kind, sources={"train": source}, valid_fraction=FRACTION))
        found.append(sides(tmp_path / kind))
    assert all(one == found[0] for one in found)


def test_a_share_of_documents_is_held_out_and_more_of_the_same_with_a_greater_fraction() -> None:
    keys = [content_key(f"document number {i}") for i in range(20_000)]
    before: set[int] = set()
    for fraction in (0.0, 0.01, 0.05, 0.3, 0.5):
        held = {key for key in keys if is_held_out(key, fraction)}
        # 20,000 draws: within five standard deviations, which fails once in two million texts.
        assert abs(len(held) - 20_000 * fraction) <= 5 * (20_000 * fraction * (1 - fraction)) ** 0.5
        assert before <= held and all(fraction_of(key) < fraction for key in held)
        before = held
    assert content_key(" one\t two\r\n") == content_key("one two") != content_key("onetwo")
    with pytest.raises(ConfigError, match=r"valid_fraction=0.6 is outside \[0, 0.5\]"):
        check_fraction(0.6)


def test_the_choice_of_documents_never_changes_between_releases() -> None:
    assert content_key("The quick  brown\nfox") == 0x5CAC4F980FEDC3D3


def test_a_corpus_without_a_held_out_document_is_told_which_fraction_gives_one(tmp_path: Path) -> None:
    listed = [text for text in texts(random.Random(1), 60) if not is_held_out(content_key(text), 0.1)][:8]
    lowest = min(fraction_of(content_key(text)) for text in listed)
    source = source_of(tmp_path / "text", "text", listed)
    request = {"out": tmp_path / "out", "sources": {"train": source}}
    with pytest.raises(
        DataError, match=r"8 documents with valid_fraction=0.1 leave none for valid, .* use --valid-fraction"
    ) as told:
        prepare(PrepareRequest(**request, valid_fraction=0.1))  # type: ignore[arg-type]
    wanted = float(str(told.value).split("--valid-fraction ")[1].split(",")[0])
    assert lowest < wanted < lowest + 0.02
    made = prepare(PrepareRequest(**request, valid_fraction=wanted))  # type: ignore[arg-type]
    assert made.num_documents["valid"] >= 1


def test_folders_that_hold_out_less_are_not_trained_on_beside_another(tmp_path: Path) -> None:
    listed = [documents(5, seed=1)]
    folders = {
        name: ShardFolder(write_split(tmp_path / name, listed, held_out_fraction=fraction))
        for name, fraction in (("a", 0.05), ("b", 0.01), ("c", 0.1), ("own", 0.0))
    }
    check_held_out(folders["a"], [folders["a"], folders["c"]])
    check_held_out(folders["own"], list(folders.values()))  # a held-out text of its own says nothing about others
    with pytest.raises(
        ConfigError, match=r"b holds out 0.01 of its documents and .*a 0.05: documents that are evaluated"
    ):
        check_held_out(folders["a"], [folders["a"], folders["b"]])
    with pytest.raises(
        ConfigError, match=r"x holds out 0.0 of its documents and y 0.05: .* with --valid-fraction 0.05"
    ):
        check_nothing_leaks([("x", 0.0)], ("y", 0.05))
    foreign = ShardFolder(write_split(tmp_path / "f", listed, fingerprint="f" * 64))
    with pytest.raises(TokenizerError, match="f has the tokenizer ffffffffffffffff, .*own has"):
        check_held_out(foreign, [folders["own"]])


def test_one_text_cut_in_two_ways_is_not_mixed_with_itself(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    for number in range(12):
        (tmp_path / "notes" / f"{number}.txt").write_text("\n\n".join(texts(random.Random(number), 4)))
    folder = str(tmp_path / "notes")
    own = prepared(tmp_path / "own", TextFiles(paths=(folder,)))
    files = tuple(f"{folder}/{number}.txt" for number in range(10))
    whole = prepared(tmp_path / "whole", TextFiles(paths=files, documents_are="file"))
    cleaned = prepared(tmp_path / "cleaned", HubDataset(path=folder), detokenizer="ptb")
    copied = prepared(tmp_path / "copied", HubDataset(path=folder, streaming=True))
    # a file holds paragraphs that are held out by themselves
    held = ShardFolder(own.parent / "valid")
    for other, way in ((whole, "documents=file, detokenizer=none"), (cleaned, "documents=paragraph, detokenizer=ptb")):
        with pytest.raises(
            ConfigError, match=rf"reads .*notes.* with {way} and .*documents=paragraph, .*read both alike"
        ):
            check_held_out(held, [ShardFolder(own), ShardFolder(other)])
    check_held_out(held, [ShardFolder(own), ShardFolder(copied)])


def prepared(out: Path, source: Source, detokenizer: str = "none") -> Path:
    """The training split of half of a source's documents."""
    request = PrepareRequest(out=out, sources={"train": source}, valid_fraction=0.5, detokenizer=detokenizer)
    return prepare(request).folder / "train"


def test_texts_of_other_names_may_be_cut_in_other_ways() -> None:
    held = {"kind": "text", "documents": "file", "paths": ["books"], "detokenizer": "none"}
    joined = {"sources": [{"kind": "builtin", "name": "python-docs"}, {"path": "books/a.txt"}], "detokenizer": "none"}
    check_read_alike(("web", {"path": "web", "detokenizer": "ptb"}), ("own", held))
    check_read_alike(("web", {"path": "bookshop", "sources": 3}), ("own", held))
    with pytest.raises(
        ConfigError, match=r"^web reads books/a.txt with documents=paragraph, detokenizer=none and own with"
    ):
        check_read_alike(("web", joined), ("own", held))


def test_a_vocabulary_is_trained_on_an_even_share_without_what_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"document {i} {'x' * 50}\n\n" for i in range(400)))
    source = TextFiles(paths=(str(path),), part_bytes=1000)
    everything = list(sample_documents(source, 10**9, 0.2, "none"))
    assert not any(is_held_out(content_key(text), 0.2) for text in everything) and 280 < len(everything) < 360
    part = list(sample_documents(source, 5000, 0.0, "none"))
    assert 4000 < sum(map(len, part)) <= 5000
    assert part[0].startswith("document 0 ") and int(part[-1].split()[1]) > 350


def test_training_copies_of_a_given_valid_split_go_with_dedup(tmp_path: Path) -> None:
    sources = {
        "train": source_of(tmp_path / "t", "text", ["one two", "three", "held out", "three"]),
        "valid": source_of(tmp_path / "v", "text", ["held  out", "other"]),
    }
    prepare(PrepareRequest(out=tmp_path / "plain", sources=sources))
    assert sides(tmp_path / "plain")[0] & sides(tmp_path / "plain")[1] == {"held out"}
    made = prepare(PrepareRequest(out=tmp_path / "once", sources=sources, dedup=True))
    assert sides(tmp_path / "once") == ({"one two", "three"}, {"held out", "other"})
    assert made.left_out == {"repeated": 2}
