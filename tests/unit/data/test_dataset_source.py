"""Hugging Face datasets as sources: formats, columns, splits, filters, streams, refusals."""

from __future__ import annotations

import gzip
import importlib.util
import json
import pickle
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest

from bd3_megatron.data.dataset_source import HubDataset, RowFilter
from bd3_megatron.data.prepare import PrepareRequest, prepare
from bd3_megatron.errors import ConfigError, DataError
from tests.unit.data.corpora import content_of

ROWS = [{"text": f"row {i} \u4f60 {'x' * (i % 5)}", "lang": "en" if i % 3 else "de", "score": i} for i in range(25)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow copies go to a folder of the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def jsonl(path: Path, rows: list[dict] = ROWS) -> Path:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def texts_of(source: HubDataset) -> list[str]:
    copy = pickle.loads(pickle.dumps(source))
    return [text for part in source.parts() for text in copy.documents(part)]


def written(tmp_path: Path, kind: str) -> tuple[str, str]:
    """(path, split) of the rows in a format."""
    table = datasets.Dataset.from_list(ROWS)
    path = tmp_path / f"rows.{kind}"
    if kind in ("jsonl", "jsonl.gz"):
        jsonl(path)
    elif kind == "parquet":
        table.to_parquet(str(path))
    elif kind == "csv":
        table.to_csv(str(path))
    elif kind == "tsv":
        table.to_csv(str(path), sep="\t")
    elif kind == "txt":
        path.write_text("".join(row["text"] + "\n" for row in ROWS))
    elif kind == "saved":
        table.save_to_disk(str(path))
    elif kind == "saved_splits":
        datasets.DatasetDict({"train": table.select([0]), "test": table}).save_to_disk(str(path))
        return str(path), "test"
    elif kind == "folder":
        jsonl(path / "train-0.jsonl", ROWS[:10])
        jsonl(path / "train-1.jsonl", ROWS[10:])
    return str(path), "train"


FORMATS = ["jsonl", "jsonl.gz", "parquet", "csv", "tsv", "txt", "saved", "saved_splits", "folder"]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_its_rows_in_order(tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    path, split = written(tmp_path, kind)
    source = HubDataset(path=path, split=split, rows_per_part=10)
    expected = [row["text"].rstrip() if kind == "txt" else row["text"] for row in ROWS]
    assert [text.rstrip() if kind == "txt" else text for text in texts_of(source)] == expected
    assert [part.weight for part in source.parts()] == [10, 10, 5]


@pytest.mark.parametrize("kind", ["jsonl", "folder", "parquet"])
def test_streams_give_the_same_rows_in_parts_of_files(tmp_path: Path, kind: str) -> None:
    path, split = written(tmp_path, kind)
    source = HubDataset(path=path, split=split, streaming=True)
    assert texts_of(source) == [row["text"] for row in ROWS]
    assert len(source.parts()) == (2 if kind == "folder" else 1)


def test_splits_are_sliced_and_rows_filtered(tmp_path: Path) -> None:
    path = str(jsonl(tmp_path / "rows.jsonl"))
    assert texts_of(HubDataset(path=path, split="train[:-20]")) == [row["text"] for row in ROWS[:5]]
    saved, _ = written(tmp_path, "saved_splits")
    assert texts_of(HubDataset(path=saved, split="test[-3:]")) == [row["text"] for row in ROWS[-3:]]
    assert texts_of(HubDataset(path=saved, split="test[10%:20%]")) == [row["text"] for row in ROWS[2:5]]
    filters = (RowFilter(column="lang", equals="en"), RowFilter(column="score", at_least=4, at_most=10))
    assert texts_of(HubDataset(path=path, filters=filters)) == [ROWS[i]["text"] for i in (4, 5, 7, 8, 10)]
    for check, kept in (
        (RowFilter(column="lang", one_of=("de", "fr")), [0, 3, 6]),
        (RowFilter(column="text", matches=r"row [12] "), [1, 2]),
        (RowFilter(column="text", at_most=8), [0, 5]),
    ):
        assert [i for i, row in enumerate(ROWS[:7]) if check.keeps(row)] == kept
    assert not RowFilter(column="text", at_least=1).keeps({"text": None})


def test_a_dataset_prepares_to_the_same_bytes_with_any_number_of_workers(tmp_path: Path) -> None:
    path = str(jsonl(tmp_path / "rows.jsonl"))
    for workers in (1, 2):
        source = HubDataset(path=path, rows_per_part=6)
        prepare(PrepareRequest(out=tmp_path / str(workers), sources={"train": source}), num_workers=workers)
    assert content_of(tmp_path / "1") == content_of(tmp_path / "2")


def test_datasets_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    path = str(jsonl(tmp_path / "rows.jsonl"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.weird").touch()
    saved, _ = written(tmp_path, "saved_splits")
    none = str(jsonl(tmp_path / "numbers.jsonl", [{"text": 3}]))
    cases = [
        (HubDataset(path="./none.jsonl"), "dataset ./none.jsonl does not exist; give a file, a folder or a hub name"),
        (HubDataset(path=path, split="test"), r"rows.jsonl \(split test\) cannot be opened .* check path, name, split"),
        (HubDataset(path=path, column="body"), "has no column body; it has text, lang, score"),
        (HubDataset(path=path, filters=(RowFilter(column="x", equals=1),)), "has no column x; it has"),
        (HubDataset(path=saved, split="train[:0]"), "has no rows in split train.:0.; name another split"),
        (HubDataset(path=str(tmp_path / "rows.weird")), "rows.weird has no known suffix; use .jsonl"),
        (HubDataset(path=str(tmp_path / "empty")), "cannot be opened"),
        (HubDataset(path=saved, split="dev"), "has no split dev; it has train, test"),
        (HubDataset(path=none), "column text of .* holds int, not text; name another column"),
        (HubDataset(path="some-owner/no-such-set"), "cannot be opened"),
    ]
    for source, sentence in cases:
        with pytest.raises(DataError, match=sentence):
            texts_of(source)
    with pytest.raises(ConfigError, match="rows_per_part=0 is empty"):
        HubDataset(path=path, rows_per_part=0)
    with pytest.raises(ConfigError, match=r"filter pattern '\(' is no regular expression"):
        RowFilter(column="text", matches="(")


def test_zstd_is_read_where_its_package_is_and_asked_for_where_not(tmp_path: Path) -> None:
    content = jsonl(tmp_path / "rows.jsonl", ROWS[:2]).read_bytes()
    # A zstd frame of one uncompressed block, by RFC 8878: magic, single segment with one size byte, last raw block.
    frame = b"\x28\xb5\x2f\xfd\x20" + bytes([len(content)]) + (len(content) << 3 | 1).to_bytes(3, "little") + content
    (tmp_path / "rows.jsonl.zst").write_bytes(frame)
    source = HubDataset(path=str(tmp_path / "rows.jsonl.zst"))
    if importlib.util.find_spec("zstandard") is None:
        with pytest.raises(DataError, match="is compressed by zstd; pip install zstandard, or unpack it"):
            texts_of(source)
    else:
        assert texts_of(source) == [row["text"] for row in ROWS[:2]]


def test_a_changed_file_is_another_source(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl")
    before = HubDataset(path=str(path)).identity()
    assert HubDataset(path=str(path)).identity() == before and json.dumps(before)
    jsonl(path, ROWS[:20])
    assert HubDataset(path=str(path)).identity() != before
