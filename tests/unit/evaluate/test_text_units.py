"""Bits per byte and perplexity per word: rows that cut letters and documents lose neither bytes nor words."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from bd3_megatron.cli import main
from bd3_megatron.convert.to_hf import write_folder
from bd3_megatron.data.convention import EvaluationConvention
from bd3_megatron.data.prepare import PrepareRequest, prepare
from bd3_megatron.data.sources import text_source
from bd3_megatron.data.tokenizer_open import open_tokenizer
from bd3_megatron.evaluate.text_units import TextUnits, text_tokenizer, text_units
from tests.unit.data.corpora import write_split
from tests.unit.evaluate.tiny import LENGTH, tiny_model

TEXTS = ("naïve café words", "a b", "ünderlined 漢字 text here", "zz")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("units")
    (folder / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        (folder / "texts" / f"{number}.txt").write_text(text, encoding="utf-8")
    source = text_source([str(folder / "texts")])
    request = PrepareRequest(
        out=folder / "data", sources={"train": source, "valid": source}, tokenizer="bytes", valid_fraction=0.0
    )
    return prepare(request).folder


@pytest.mark.parametrize("packing", ["isolated", "pad"])
def test_text_that_rows_cut_is_counted_whole(data: Path, packing: str) -> None:
    dataset = EvaluationConvention(packing=packing, aligned_block=4).open_rows(data / "valid", seq_len=LENGTH)
    tokenizer = text_tokenizer(dataset, data / "valid")
    assert tokenizer is not None
    found = text_units(dataset, torch.arange(dataset.num_rows), tokenizer)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    # every document has an end token
    assert found == TextUnits(num_bytes + len(TEXTS), num_bytes, sum(len(text.split()) for text in TEXTS))


def test_of_prompts_nothing_is_counted(tmp_path: Path) -> None:
    """Every second piece is an answer; two answers of one document are two texts."""
    pieces = [("Frage é: ", "größer als 3"), ("x ", "y", "ja", "z"), ("", "漢字 text")]
    listed = [list("".join(some).encode()) for some in pieces]
    known = [[n % 2 == 1 for n, text in enumerate(some) for _ in text.encode()] for some in pieces]
    write_split(tmp_path / "valid", [listed], supervised=[known])
    tokenizer = open_tokenizer("bytes")
    answers = [text for some in pieces for text in some[1::2]]
    num_bytes = sum(len(answer.encode()) for answer in answers)
    for packing in ("isolated", "pad"):
        dataset = EvaluationConvention(packing=packing, aligned_block=4).open_rows(tmp_path / "valid", seq_len=LENGTH)
        found = text_units(dataset, torch.arange(dataset.num_rows), tokenizer)
        # every document has an end token
        expected = TextUnits(num_bytes + len(pieces), num_bytes, sum(len(answer.split()) for answer in answers))
        assert found == expected, packing


def test_rows_between_special_tokens_count_them_as_tokens_and_not_as_text(data: Path) -> None:
    dataset = EvaluationConvention(wrap_special=True).open_rows(data / "valid", seq_len=LENGTH)
    tokenizer = text_tokenizer(dataset, data)
    assert tokenizer is not None
    found = text_units(dataset, torch.arange(dataset.num_rows), tokenizer)
    stream = [byte for text in TEXTS for byte in (*text.encode(), None)]
    shown = stream[: dataset.num_rows * (LENGTH - 2)]
    assert found.num_tokens == dataset.num_rows * LENGTH
    # the stream may end inside a letter, which then shows as U+FFFD: three bytes for one or two
    assert abs(found.num_bytes - sum(byte is not None for byte in shown)) <= 2


def test_rows_that_do_not_follow_each_other_are_not_joined(data: Path) -> None:
    dataset = EvaluationConvention(append_eos=False).open_rows(data / "valid", seq_len=4)
    tokenizer = text_tokenizer(dataset, data)
    assert tokenizer is not None
    apart = text_units(dataset, torch.tensor([0, 2]), tokenizer)
    # "na" + the two bytes of a letter, and " caf" behind it
    assert (apart.num_tokens, apart.num_words) == (8, 2)


def test_measures_are_per_byte_and_per_word() -> None:
    found = TextUnits(num_tokens=10, num_bytes=20, num_words=5).measures(2.0)
    assert found["bits_per_byte"] == pytest.approx(1 / math.log(2)) and found["word_perplexity"] == pytest.approx(
        math.e**4
    )
    assert TextUnits(10, 0, 0).measures(2.0) == {
        "bits_per_byte": None,
        "word_perplexity": None,
        "num_bytes": 0,
        "num_words": 0,
    }
    assert TextUnits(1000, 9, 1).measures(2.0)["word_perplexity"] == math.inf


def test_the_command_prints_them(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model(4, vocab=260)
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    write_folder(state, model.model.shape, tmp_path / "hf", tokenizer_dir=data / "tokenizer")  # type: ignore[arg-type]
    asked = ["evaluate", str(tmp_path / "hf"), "--data", str(data), "--packing", "pad", "--device", "cpu"]
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    nats = found["nll_nats_per_token"] * (num_bytes + len(TEXTS))
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes) and found["num_bytes"] == num_bytes
    assert main(asked) == 0
    said = capsys.readouterr()
    assert f"{found['bits_per_byte']:.4f} bits per byte, " in said.out and " perplexity per word (" in said.out
    (data / "tokenizer").rename(data / "moved")
    assert main(asked) == 0
    said = capsys.readouterr()
    assert "per byte" not in said.out and "bits per byte and perplexity per word are left out" in said.err
