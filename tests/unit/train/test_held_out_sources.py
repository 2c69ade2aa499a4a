"""Each part of a mixture is evaluated by itself, or a sentence says why not; a stream leaves out what its folder holds out."""

from __future__ import annotations

from pathlib import Path

import pytest

from bd3_megatron.data.convention import EvaluationConvention
from bd3_megatron.data.held_out import content_key, is_held_out
from bd3_megatron.data.prepare import PrepareRequest, prepare
from bd3_megatron.data.shards import ShardFolder
from bd3_megatron.data.sources import text_source
from bd3_megatron.data.stream_shard import StreamShard
from bd3_megatron.errors import ConfigError
from bd3_megatron.train.dataset import StreamRows, answers_remark, open_data
from bd3_megatron.train.held_out_sources import HeldOutSources, held_out_sources, source_names
from tests.unit.cost.cases import case
from tests.unit.data.corpora import answers, documents, english, write_split

LENGTH = 8


def part(folder: Path, *, fraction: float, longest: int = 60) -> Path:
    """A prepared folder that holds out a share of its documents."""
    for seed, split in enumerate(("train", "valid")):
        write_split(folder / split, [documents(9, seed, longest)], held_out_fraction=fraction)
    return folder


def opened(*folders: Path, known: Path | None = None) -> HeldOutSources:
    """The parts of a mixture of them."""
    convention = EvaluationConvention()
    rows = None if known is None else (known, convention.open_rows(known / "valid", seq_len=LENGTH))
    trained = [ShardFolder(folder / "train") for folder in folders]
    return held_out_sources([str(f) for f in folders], convention, trained, seq_len=LENGTH, known=rows)


def test_every_part_has_rows_of_its_own_and_the_runs_own_split_is_opened_once(tmp_path: Path) -> None:
    web, books = part(tmp_path / "web", fraction=0.1), part(tmp_path / "books", fraction=0.1)
    found = opened(web, books, known=web)
    assert list(found.rows) == ["web", "books"] and found.left_out == ()
    assert found.rows["books"].sources[0].shards.where == str(books / "valid")
    known = EvaluationConvention().open_rows(web / "valid", seq_len=LENGTH)
    again = held_out_sources([str(web), str(books)], EvaluationConvention(), [], seq_len=LENGTH, known=(web, known))
    assert again.rows["web"] is known
    assert opened(web) == HeldOutSources()


def test_a_part_that_others_may_train_on_is_left_out_aloud(tmp_path: Path) -> None:
    web, books = part(tmp_path / "web", fraction=0.1), part(tmp_path / "books", fraction=0.3)
    bare = tmp_path / "bare"
    write_split(bare / "train", [documents(9, 3)], held_out_fraction=0.1)
    found = opened(web, books, bare)
    assert list(found.rows) == ["web"]
    assert found.left_out[0].startswith(
        f"books is not evaluated by itself: {web / 'train'} holds out 0.1 of its documents"
    )
    assert found.left_out[1] == "bare is not evaluated by itself: it has no split valid"


def test_parts_are_named_by_the_shortest_ends_that_differ() -> None:
    assert source_names(["data/web", "data/books"]) == ["web", "books"]
    assert source_names(["a/web", "b/web", "b/books"]) == ["a/web", "b/web", "b/books"]
    assert source_names(["/x/a/web", "/web"]) == ["a/web", "web"]
    assert source_names(["web", "./web"]) == ["web", "./web"]


def test_a_stream_beside_a_folder_of_answers_is_refused(tmp_path: Path) -> None:
    listed = documents(9, 3)
    for split in ("train", "valid"):
        write_split(tmp_path / "asked" / split, [listed], supervised=[answers(listed, 1)])
    stream = {"dataset": str(tmp_path), "shuffle_rows": 1, "shards": 1}
    data = {"path": str(tmp_path / "asked"), "seq_len": LENGTH, "packing": "isolated"}
    with pytest.raises(
        ConfigError, match=r"data\.stream reads plain text, and '.*asked' holds prompts with their answers"
    ):
        open_data(case(data={**data, "stream": stream}, model={"vocab_size": None}, kind="s4"))
    counts = open_data(case(data=data, model={"vocab_size": None}, kind="s4")).identity.rows
    known = sum(map(sum, answers(listed, 1)))
    assert counts["train"][0]["supervised"] == counts["valid"]["supervised"] == known
    assert answers_remark(counts["train"]) == (
        "1 of 1 training sources hold prompts with their answers: only the answers, "
        f"{100 * known / counts['train'][0]['tokens']:.0f}% of their tokens, are predicted"
    )
    mixed = answers_remark([*counts["train"], {"rows": 1, "documents": 1, "tokens": 5}])
    assert mixed is not None and mixed.endswith("are predicted; of the others every token is")
    assert answers_remark([{"rows": 1, "documents": 1, "tokens": 5}]) is None


def test_the_stream_of_the_readme_trains_on_nothing_that_its_folder_holds_out(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    texts = [f"{english(5, seed=n)}{n}." for n in range(40)]
    (corpus / "a.txt").write_text("\n\n".join(texts), encoding="utf-8")
    source = text_source([str(corpus)])
    prepare(PrepareRequest(out=tmp_path / "own", sources={"train": source}, tokenizer="bytes", valid_fraction=0.3))
    stream = {"dataset": str(corpus), "shuffle_rows": 1, "shards": 1}
    config = case(
        data={"path": str(tmp_path / "own"), "stream": stream, "seq_len": LENGTH}, model={"vocab_size": None}, kind="s4"
    )
    rows = open_data(config).train
    assert isinstance(rows, StreamRows)
    shard, tokens, number = StreamShard(rows.stream, 0), [], 0
    while shard.state_before(number).epoch == 0:
        tokens += shard.row(number).tokens_BL.tolist()
        number += 1
    seen = {" ".join(text.split()) for text in bytes(t if t < 256 else 0 for t in tokens).decode().split("\0")}
    held = {words for text in texts if is_held_out(content_key(words := " ".join(text.split())), 0.3)}
    # both sides are there, and the last document of the pass may be cut off
    assert len(held) > 4 and not seen & held
    assert len({" ".join(text.split()) for text in texts} - held - seen) <= 1


@pytest.mark.parametrize(("documents_are", "detokenizer"), [("file", "none"), ("paragraph", "ptb")])
def test_a_stream_that_cuts_its_folders_text_in_another_way_is_refused(
    tmp_path: Path, documents_are: str, detokenizer: str
) -> None:
    for number in range(8):
        (tmp_path / "corpus").mkdir(exist_ok=True)
        (tmp_path / "corpus" / f"{number}.txt").write_text(english(9, seed=number), encoding="utf-8")
    source = text_source([str(tmp_path / "corpus")], documents_are=documents_are)
    prepare(PrepareRequest(out=tmp_path / "own", sources={"train": source}, tokenizer="bytes", valid_fraction=0.5))
    stream = {"dataset": str(tmp_path / "corpus"), "detokenizer": detokenizer}
    data = {"path": str(tmp_path / "own"), "stream": stream, "seq_len": LENGTH}
    with pytest.raises(ConfigError, match=rf"data.stream reads .* detokenizer={detokenizer} and .*own.train with"):
        open_data(case(data=data, model={"vocab_size": None}, kind="s4"))
