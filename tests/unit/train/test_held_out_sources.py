"""Each part of a mixture is evaluated by itself, or a sentence says why not."""

from __future__ import annotations

from pathlib import Path

from bd3_megatron.data.convention import EvaluationConvention
from bd3_megatron.data.shards import ShardFolder
from bd3_megatron.train.held_out_sources import HeldOutSources, held_out_sources, source_names
from tests.unit.data.corpora import documents, write_split

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
