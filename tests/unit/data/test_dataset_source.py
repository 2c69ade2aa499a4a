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

from bd3_megatron.config.data import RowFilter
from bd3_megatron.data.dataset_source import HubDataset
from bd3_megatron.data.prepare import PrepareRequest, prepare
from bd3_megatron.data.row_filter import keeps
from bd3_megatron.data.source import BadDocument
from bd3_megatron.errors import DataError
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
    found = [document for part in source.parts() for document in copy.documents(part)]
    return [document for document in found if isinstance(document, str)]


def bad_of(source: HubDataset) -> list[BadDocument]:
    return [found for part in source.parts() for found in source.documents(part) if isinstance(found, BadDocument)]


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
        path.write_text("".join(row["text"] + "\n\n" for row in ROWS))
    elif kind == "txt.gz":
        path.write_bytes(gzip.compress("".join(row["text"] + "\n\n" for row in ROWS).encode()))
    elif kind == "saved":
        table.save_to_disk(str(path))
    elif kind == "saved_splits":
        datasets.DatasetDict({"train": table.select([0]), "test": table}).save_to_disk(str(path))
        return str(path), "test"
    elif kind == "folder":
        jsonl(path / "train-0.jsonl", ROWS[:10])
        jsonl(path / "train-1.jsonl", ROWS[10:])
    return str(path), "train"


FORMATS = ["jsonl", "jsonl.gz", "parquet", "csv", "tsv", "txt", "txt.gz", "saved", "saved_splits", "folder"]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_its_rows_in_order(tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    path, split = written(tmp_path, kind)
    source = HubDataset(path=path, split=split, rows_per_part=10)
    assert [text.split() for text in texts_of(source)] == [row["text"].split() for row in ROWS]
    if not kind.startswith("txt"):
        assert [part.weight for part in source.parts()] == [10, 10, 5]


# The library leaves the file of a csv stream open.
@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind not in ("csv", "tsv")])
def test_streams_give_the_same_rows_in_parts_of_files(tmp_path: Path, kind: str) -> None:
    path, split = written(tmp_path, kind)
    source = HubDataset(path=path, split=split, streaming=True)
    assert texts_of(source) == texts_of(HubDataset(path=path, split=split))
    assert len(source.parts()) == (2 if kind == "folder" else 1)
    assert [source.document(row, str) for row in source.open()] == texts_of(source)  # as training reads it


@pytest.mark.parametrize("streaming", [False, True])
def test_a_pattern_chooses_text_files_of_a_folder_of_any_kind(tmp_path: Path, streaming: bool) -> None:
    for name in ("a1.txt", "a2.txt", "b1.txt", "deep/a3.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name} one\nline\n\n{name} two\n")

    def chosen(pattern: str) -> list[str]:
        found = texts_of(HubDataset(path=str(tmp_path), data_files=pattern, streaming=streaming))
        return [" ".join(text.split()) for text in found]

    assert chosen("a*.txt") == ["a1.txt one line", "a1.txt two", "a2.txt one line", "a2.txt two"]
    assert [text for text in chosen("**/a*.txt") if "two" in text] == ["a1.txt two", "a2.txt two", "deep/a3.txt two"]
    # text is read by paragraphs also beside files of another kind
    jsonl(tmp_path / "rows.jsonl", [{"text": "a row"}])
    assert chosen("b*.txt") == ["b1.txt one line", "b1.txt two"]
    assert chosen("*.jsonl") == ["a row"]


@pytest.mark.parametrize("streaming", [False, True])
def test_nested_columns_have_dots_in_their_names(tmp_path: Path, streaming: bool) -> None:
    rows = [{"meta": {"body": f"b{i}", "more": {"n": i}}} for i in range(6)]
    path = str(jsonl(tmp_path / "rows.jsonl", rows))
    keep = (RowFilter(column="meta.more.n", at_least=3),)
    assert texts_of(HubDataset(path=path, column="meta.body", filters=keep, streaming=streaming)) == ["b3", "b4", "b5"]
    flat = str(jsonl(tmp_path / "flat.jsonl", [{"meta": {"body": "nested"}, "meta.body": "flat"}]))
    assert texts_of(HubDataset(path=flat, column="meta.body", streaming=streaming)) == ["flat"]
    for column in ("meta", "meta.body.n"):
        source = HubDataset(path=path, column=column, streaming=streaming)
        if column == "meta":
            assert all(isinstance(found, BadDocument) for part in source.parts() for found in source.documents(part))
            continue
        with pytest.raises(
            DataError, match="has no column meta.body.n; it has meta, meta.body, meta.more, meta.more.n"
        ):
            source.parts()


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_without_text_are_named_by_file_and_row(tmp_path: Path, streaming: bool) -> None:
    rows = [{"text": "a"}, {"text": None}]
    jsonl(tmp_path / "d" / "a.jsonl", [{"text": "b"}] * 3)
    jsonl(tmp_path / "d" / "b.jsonl", rows)
    for path, where in (
        (jsonl(tmp_path / "rows.jsonl", rows), f"row 1 of {tmp_path / 'rows.jsonl'}"),
        (
            tmp_path / "d",
            f"row 1 of {tmp_path / 'd' / 'b.jsonl'}" if streaming else f"row 4 of {tmp_path / 'd'} (split train)",
        ),
    ):
        source = HubDataset(path=str(path), streaming=streaming)
        bad = bad_of(source)
        assert [(one.where, one.reason) for one in bad] == [(where, "holds nothing (null) in column text")]


def test_values_without_an_order_are_not_compared(tmp_path: Path) -> None:
    path = str(jsonl(tmp_path / "rows.jsonl", [{"text": "a", "meta": {"n": 1}}]))
    (bad,) = bad_of(HubDataset(path=path, filters=(RowFilter(column="meta", at_least=1),)))
    assert (bad.where, bad.reason) == (
        f"row 0 of {path}",
        "cannot be filtered: column meta holds dict, which has no order; use equals, one_of or matches there",
    )


# What a line holds, and what is wrong with it; the library refuses the whole file for most of them.
BAD_LINES = [
    (b'{"text": 5}', "holds no text but int in column text"),
    (b'{"text": ["a"]}', "holds no text but list in column text"),
    (b'{"text": {"a": 1}}', "holds no text but dict in column text"),
    (b'{"text": "torn', "is no JSON object"),
    (b"[1]", "is no JSON object"),
    (b'{"text": "\xff\xfe"}', "is no JSON object"),
    (b'{"text": "\\ud800"}', "holds half a surrogate pair"),
    (b'{"other": 1}', "holds nothing (null) in column text"),
]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_line_that_is_wrong_is_one_bad_row_and_costs_no_other(tmp_path: Path, streaming: bool) -> None:
    path = tmp_path / "rows.jsonl"
    # Types of `m` differ from row to row, which nobody needs to mend: no one reads that column.
    good = [b'\xef\xbb\xbf{"text": "2020-01-01", "m": 1}', b"", b'{"text": "b", "m": "x"}', b'{"m": {}, "text": "c"}']
    path.write_bytes(b"\n".join([*good, *(line for line, _ in BAD_LINES), b'{"text": "last"}']))
    source = HubDataset(path=str(path), streaming=streaming)
    assert texts_of(source) == ["2020-01-01", "b", "c", "last"]
    assert [one.reason for one in bad_of(source)] == [reason for _, reason in BAD_LINES]
    assert bad_of(source)[0].where == f"row 4 of {path}"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_csv_row_that_is_wrong_is_one_bad_row_and_costs_no_other(tmp_path: Path, streaming: bool) -> None:
    path = tmp_path / "rows.csv"
    # Cells have no types: a text of digits is a text, and a filter compares what reads as a number.
    path.write_bytes(b'text,n\n123,7\n"two\nlines, one row",8\na,1,2\n\xff,9\nb\n"c" d,9\nNA,10\nleft out,3\n,9\n')
    source = HubDataset(path=str(path), streaming=streaming, filters=(RowFilter(column="n", at_least=7),))
    assert texts_of(source) == ["123", "two\nlines, one row", "NA"]
    assert [(one.where, one.reason) for one in bad_of(source)] == [
        (f"row 2 of {path}", "has 3 fields and the header names 2 columns"),
        (f"row 3 of {path}", "is not UTF-8"),
        (f"row 4 of {path}", "has 1 field and the header names 2 columns"),
        (f"row 5 of {path}", "is no CSV (',' expected after '\"')"),
        (f"row 8 of {path}", "holds nothing (null) in column text"),
    ]
    path.write_text('text\na\n"b\nc\n')
    with pytest.raises(DataError, match=r"row 1 of .*rows.csv .*a quotation mark that nothing closes; mend the file"):
        texts_of(HubDataset(path=str(path), streaming=streaming))


def test_bad_rows_are_counted_by_a_preparation_and_the_first_is_named_without_leave(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}"} for i in range(20)] + [{"text": 5}, {"text": "b", "m": 1}, {"text": ["c"]}]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    request = PrepareRequest(out=tmp_path / "out", sources={"train": HubDataset(path=str(path))}, valid_fraction=0.0)
    with pytest.raises(DataError, match=r"row 20 of .*rows.jsonl holds no text but int .* --skip-bad N"):
        prepare(request)
    assert prepare(request, skip_bad=2).left_out == {"bad": 2}


def test_a_json_array_is_read_by_the_library(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS[:3], indent=1))
    assert texts_of(HubDataset(path=str(path))) == [row["text"] for row in ROWS[:3]]


def test_a_file_that_breaks_off_is_an_error_of_the_data(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d" / "rows.jsonl.gz", ROWS)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match=r"row 0 of .*d cannot be read \(.*end-of-stream.*\); mend or remove the file"):
        texts_of(HubDataset(path=str(path.parent), streaming=True))


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
        assert [i for i, row in enumerate(ROWS[:7]) if keeps(check, row)] == kept
    assert not keeps(RowFilter(column="text", at_least=1), {"text": None})


def test_a_dataset_prepares_to_the_same_bytes_with_any_number_of_workers(tmp_path: Path) -> None:
    path = str(jsonl(tmp_path / "rows.jsonl"))
    for workers in (1, 2):
        source = HubDataset(path=path, rows_per_part=6)
        request = PrepareRequest(out=tmp_path / str(workers), sources={"train": source}, valid_fraction=0.2)
        prepare(request, num_workers=workers)
    assert content_of(tmp_path / "1") == content_of(tmp_path / "2")


def test_datasets_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    path = str(jsonl(tmp_path / "rows.jsonl"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.weird").touch()
    saved, _ = written(tmp_path, "saved_splits")
    (tmp_path / "a.txt").write_text("text")
    cases = [
        (HubDataset(path="./none.jsonl"), "dataset ./none.jsonl does not exist; give a file, a folder or a hub name"),
        (HubDataset(path=path, split="test"), r"rows.jsonl \(split test\) cannot be opened .* check path, name, split"),
        (HubDataset(path=path, column="body"), "has no column body; it has text, lang, score"),
        (HubDataset(path=path, filters=(RowFilter(column="x", equals=1),)), "has no column x; it has"),
        (HubDataset(path=saved, split="train[:0]"), "has no rows in split train.:0.; name another split"),
        (HubDataset(path=str(tmp_path / "rows.weird")), "rows.weird has no known suffix; use .jsonl"),
        (HubDataset(path=str(tmp_path / "empty")), "cannot be opened"),
        (HubDataset(path=saved, split="dev"), "has no split dev; it has train, test"),
        (HubDataset(path=str(tmp_path / "a.txt"), split="train[:1]"), r"have no split train\[:1\]; use train"),
        (HubDataset(path="some-owner/no-such-set"), "cannot be opened"),
    ]
    for source, sentence in cases:
        with pytest.raises(DataError, match=sentence):
            texts_of(source)


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
