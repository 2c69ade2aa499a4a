"""One checkpoint, one number: in the loop, `bd3 evaluate RUN`, `bd3 evaluate FOLDER`, the model that lm-evaluation-harness
asks, and a reference of thirty lines."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bd3_megatron.cli import main
from bd3_megatron.convert.from_checkpoint import convert_checkpoint
from bd3_megatron.data.dataset_source import HubDataset
from bd3_megatron.data.prepare import PrepareRequest, prepare
from bd3_megatron.data.source import Source
from bd3_megatron.data.sources import text_source
from bd3_megatron.evaluate.harness import HarnessModel
from bd3_megatron.evaluate.offline import load_model
from bd3_megatron.hf.plain_bd3 import PlainBD3
from tests.ranks.train_runs import record, train, train_config, write_data
from tests.tolerances import EVALUATION
from tests.unit.data.chats import write_rows

BOS, EOS, PAD, MASK = 256, 257, 258, 259
TEXTS = ("abcdefg", "hijklmnopqrst", "uvw", "xyzxyzx", "a", "bcdefghijklmno", "pqr", "stuvwxy", "zz")


@dataclass(frozen=True)
class Case:
    packing: str
    block: int
    special: bool = False
    """Rows between BOS and EOS."""
    given: bool = False
    """The first token of a row is never masked."""
    objective: str = "block"
    length: int = 8
    answers: bool = False
    """The first third of a text is a prompt, and only the rest is predicted."""


CASES = (
    Case("wrap", 4),
    Case("wrap", 1, special=True),
    Case("wrap", 4, special=True, given=True, length=4),
    Case("isolated", 4),
    Case("pad", 4, given=True),
    Case("wrap", 1, special=True, objective="ar"),
    Case("isolated", 1, objective="ar"),
    Case("isolated", 4, answers=True),
    Case("pad", 1, objective="ar", answers=True),
)


def rows_of(case: Case) -> list[list[tuple[int, int, str]]]:
    """(token, document, kind) of every position of every row, from the texts alone."""
    stream: list[tuple[int, int, str]] = []
    for number, text in enumerate(TEXTS):
        given = len(text) // 3 if case.answers else 0
        stream += [(t, number, "text" if i >= given else "prompt") for i, t in enumerate([*text.encode(), EOS])]
        while case.packing != "wrap" and len(stream) % case.block:
            stream.append((EOS, number, "fill"))
        while case.packing == "pad" and len(stream) % case.length:
            stream.append((PAD, -1, "pad"))
    while case.packing == "isolated" and len(stream) % case.length:
        stream.append((PAD, -1, "pad"))
    size = case.length - 2 * case.special
    rows = [stream[start : start + size] for start in range(0, len(stream) - size + 1, size)]
    return [[(BOS, 0, "text"), *row, (EOS, 0, "text")] if case.special else row for row in rows]


@torch.no_grad()
def reference(model: PlainBD3, case: Case) -> float:
    """Nats per counted token: next tokens, or every mask pattern of every block at its probability over noise levels."""
    node, weight = np.polynomial.legendre.leggauss(12)
    t, weight = 0.001 + 0.999 * (node + 1) / 2, weight * 0.999 / 2 / 0.999
    total, count = 0.0, 0
    for row in rows_of(case):
        ids, documents = torch.tensor([[r[0] for r in row]]), torch.tensor([[r[1] for r in row]])
        document = documents if case.packing == "isolated" else None
        kinds = [r[2] for r in row]
        if case.objective == "ar":
            targets = [i for i in range(1, case.length) if kinds[i] not in ("pad", "prompt")]
            targets = [i for i in targets if document is None or row[i][1] == row[i - 1][1]]
            log_p = model(ids, None, document)[0].log_softmax(dim=-1)
            total -= sum(log_p[i - 1, ids[0, i]].item() for i in targets)
            count += len(targets)
            continue
        free = torch.tensor(
            [kind not in ("pad", "prompt") and not (case.given and i == 0) for i, kind in enumerate(kinds)]
        )
        count += sum(kind == "text" and bool(free[i]) for i, kind in enumerate(kinds))
        for bits in itertools.product((False, True), repeat=case.block):
            m = sum(bits)
            is_masked = torch.tensor(bits * (case.length // case.block)) & free
            logits = model(ids.masked_fill(is_masked, MASK), ids, document)[0]
            logits[:, MASK] = -torch.inf
            nll = -logits.log_softmax(dim=-1).gather(1, ids[0][:, None])[:, 0]
            mean = float((weight * t ** (m - 1) * (1 - t) ** (case.block - m)).sum()) if m else 0.0
            total += mean * nll[is_masked].sum().item()
    return total / count


def prepared(folder: Path, case: Case) -> Path:
    """The texts as training and as held-out documents, under the byte tokenizer."""
    for number, text in enumerate(TEXTS):
        (folder / "texts").mkdir(parents=True, exist_ok=True)
        (folder / "texts" / f"{number}.txt").write_text(text, encoding="utf-8")
    source: Source = text_source([str(folder / "texts")])
    if case.answers:
        rows = [{"q": text[: len(text) // 3], "a": text[len(text) // 3 :]} for text in TEXTS]
        path = write_rows(folder / "pairs.jsonl", rows)
        source = HubDataset(path=str(path), prompt_column="q", answer_column="a")
    rules = {"train": {"wrap_special": True}, "valid": {"wrap_special": True}} if case.special else {}
    request = PrepareRequest(
        out=folder / "data",
        sources={"train": source, "valid": source},
        tokenizer="bytes",
        valid_fraction=0.0,
        packing=rules,
    )
    return prepare(request).folder


def asked(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["evaluate", *map(str, arguments), "--json", "--device", "cpu", "--batch-size", "64"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def by_the_harness(folder: Path, case: Case) -> float:
    """Nats per counted token, each row (isolated: each document of a row) being one text without a context."""
    model = HarnessModel(str(folder), device="cpu", dtype="float64", exact=case.objective == "block")
    first, texts, count = int(case.given or case.objective == "ar"), [], 0
    for row in rows_of(case):
        parts = itertools.groupby(
            (place for place in row if place[2] != "pad"), key=lambda place: case.packing == "isolated" and place[1]
        )
        for places in (list(group) for _, group in parts):
            # a text whose only token is given has nothing to score
            if len(places) > first:
                texts.append((("", ""), [], [token for token, _, _ in places]))
                count += sum(kind == "text" for _, _, kind in places[first:])
    return -sum(value for value, _ in model._loglikelihood_tokens(texts)) / count


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_caller_gives_the_same_number(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run, folder = prepared(tmp_path, case), tmp_path / "run", tmp_path / "hf"
    config = train_config(
        data,
        run,
        data={"seq_len": case.length, "packing": case.packing},
        diffusion={"objective": case.objective, "block_size": case.block, "never_mask_first": case.given},
        train={"steps": 1, "global_batch_size": 2},
        evaluate={"draws": 2, "at_start_and_end": True},
    )
    train(config)
    in_loop = record(run, prefix="eval/")[-1]
    convert_checkpoint(run, folder)
    of_run, of_folder = asked(capsys, run, "--data", data), asked(capsys, folder, "--data", data)
    assert of_run["overridden"] == of_folder["overridden"] == []
    assert of_run["num_tokens"] == of_folder["num_tokens"] == in_loop["eval/num_tokens"]
    for found in (of_run, of_folder):
        assert found["nll_nats_per_token"] == pytest.approx(in_loop["eval/nll_nats_per_token"], abs=EVALUATION)
    model, _ = load_model(folder, device=torch.device("cpu"), dtype=torch.float64)
    expected = pytest.approx(reference(model, case), abs=EVALUATION)
    exact = [asked(capsys, place, "--data", data, "--exact") for place in (run, folder)]
    assert [found["nll_nats_per_token"] for found in exact] == [expected, expected]
    # to the harness a text has no prompt but what its task says
    assert case.answers or by_the_harness(folder, case) == expected
    if case.block == 1:
        assert in_loop["eval/nll_nats_per_token"] == expected


def test_each_part_of_a_mixture_has_its_number_in_the_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [write_data(tmp_path / "web"), write_data(tmp_path / "books", longest_document=20)]
    mixture = {"path": None, "mixture": {str(folder): 1.0 for folder in parts}}
    evaluated = {"every_steps": 1, "num_sequences": 6}
    train(train_config(parts[0], tmp_path / "run", data=mixture, train={"steps": 1}, evaluate=evaluated))
    (line,) = record(tmp_path / "run", prefix="eval/")
    for folder in parts:
        asked_for = asked(capsys, tmp_path / "run", "--data", folder, "--num-sequences", 6, "--draws", 1)
        found = line[f"eval/source/{folder.name}/nll_nats_per_token"]
        assert found == pytest.approx(asked_for["nll_nats_per_token"], abs=EVALUATION)
        assert line[f"eval/source/{folder.name}/num_tokens"] == asked_for["num_tokens"]
    # the run's own number is of the first part, as without sources
    assert line["eval/nll_nats_per_token"] == line["eval/source/web/nll_nats_per_token"]
    assert line["eval/source/web/nll_nats_per_token"] != line["eval/source/books/nll_nats_per_token"]
