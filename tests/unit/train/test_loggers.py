"""The record holds each step once, however often a run is resumed; a mirror that fails never costs the run."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bd3_megatron.checkpoint.describe import source_commit
from bd3_megatron.config.load import to_tree
from bd3_megatron.train.loggers import Console, Loggers, Record, cut_record, open_mirrors
from tests.unit.cost.cases import case


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def steps(path: Path) -> list[int]:
    return [line["step"] for line in lines(path)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.jsonl"


@pytest.fixture
def console(capsys: pytest.CaptureFixture[str]) -> Iterator[Console]:
    made = Console(total_steps=4, first_step=0)
    yield made
    made.close()


def test_a_resumed_record_holds_each_step_once(path: Path) -> None:
    for resumed_step, last in ((0, 7), (4, 9), (9, 9), (6, 12)):
        record = Record(path, resumed_step=resumed_step)
        for step in range(resumed_step + 1, last + 1):
            record.write({"step": step, "loss": step / 2})
        record.close()
        assert steps(path) == list(range(1, last + 1))


def test_a_torn_or_broken_line_is_cut_away(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b'{"step": 1}\nno json\n[1, 2]\n\xff\xfe\n{"step": 2}\n{"step": 3, "loss": 1.')
    cut_record(path, 3)
    assert lines(path) == [{"step": 1}, {"step": 2}]
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_what_the_resumed_step_said_stays(path: Path) -> None:
    record = Record(path, resumed_step=0)
    for line in ({"step": 2, "loss": 1.0}, {"step": 2, "eval/perplexity": 3.0}, {"step": 3, "loss": 1.0}):
        record.write(line)
    record.close()
    cut_record(path, 2)
    assert lines(path) == [{"step": 2, "loss": 1.0}, {"step": 2, "eval/perplexity": 3.0}]


def test_a_run_that_starts_anew_evaluates_once(path: Path) -> None:
    for _ in range(2):
        record = Record(path, resumed_step=0)
        record.write({"step": 0, "event": "start"})
        record.write({"step": 0, "eval/perplexity": 300.0})
        record.close()
    assert [sorted(line) for line in lines(path)] == [["event", "step"], ["event", "step"], ["eval/perplexity", "step"]]


def test_a_killed_run_loses_nothing_it_has_said(path: Path) -> None:
    record = Record(path, resumed_step=0)
    record.write({"step": 1})
    assert steps(path) == [1], "the line must be on disk before the next one"
    record.close()


def test_what_is_no_number_is_null(path: Path) -> None:
    record = Record(path, resumed_step=0)
    record.write({"step": 1, "norm": float("inf"), "loss": float("nan"), "note": "text", "grid": {"tp": 1}})
    record.close()
    assert lines(path) == [{"step": 1, "norm": None, "loss": None, "note": "text", "grid": {"tp": 1}}]


class Keeps:
    """A mirror that works."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def write(self, record: Any) -> None:
        self.seen.append(record["step"])

    def cut(self, step: int) -> None:
        self.seen.append(f"cut to {step}")

    def close(self) -> None:
        self.seen.append("closed")


class Fails(Keeps):
    """A mirror that is out of order from its second record on."""

    def write(self, record: Any) -> None:
        super().write(record)
        if len(self.seen) > 1:
            raise ConnectionError("no route")

    def close(self) -> None:
        raise ConnectionError("still none")


def test_a_mirror_that_fails_is_named_and_left_out(path: Path, console: Console, capsys: Any) -> None:
    good, bad = Keeps(), Fails()
    loggers = Loggers(Record(path, resumed_step=0), console, {"bad": bad, "good": good})
    for step in range(1, 5):
        loggers.write({"step": step})
    loggers.close()
    assert steps(path) == [1, 2, 3, 4] and good.seen == [1, 2, 3, 4, "closed"] and bad.seen == [1, 2]
    said = capsys.readouterr().err
    assert said.count("bad failed and is left out from here on: ConnectionError: no route") == 1
    assert "did not close" not in said, "what was left out is not closed either"


def test_a_mirror_that_does_not_close_is_named(path: Path, console: Console, capsys: Any) -> None:
    loggers = Loggers(Record(path, resumed_step=0), console, {"bad": Fails()})
    loggers.write({"step": 1})
    loggers.close()
    assert "bad did not close: ConnectionError: still none" in capsys.readouterr().err


def test_the_console_says_perplexities_and_sentences(console: Console, capsys: Any) -> None:
    console.write({"step": 2, "loss/train_nats_per_token": 1.25, "throughput/mfu": None})
    console.write({"step": 2, "eval/perplexity": 31.4, "throughput/mfu": 0.5, "throughput/data_tokens_per_second": 4e3})
    console.advance()
    console.say("a sentence")
    said = capsys.readouterr().err
    assert "step 2: held-out perplexity 31.4" in said and "a sentence" in said


class FakeWandb(types.ModuleType):
    """Stands for the tracker's module at the border of the process."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.asked: dict[str, Any] = {}
        self.logged: list[Any] = []

    def init(self, **asked: Any) -> FakeWandb:
        self.asked = asked
        return self

    def log(self, numbers: dict[str, Any], step: int) -> None:
        self.logged.append((step, numbers))

    def finish(self) -> None:
        self.logged.append("finished")


def test_the_tracker_is_told_numbers_under_one_run_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = case(run={"dir": str(tmp_path / "seven")}, log={"wandb": "offline", "wandb_project": "project"})
    mirror = open_mirrors(config, "0a1b", attempt="attempt from step 3", resumed_step=3, say=unexpected)["wandb"]
    mirror.write({"step": 4, "loss": 2.0, "event": "start", "grid": {}, "mfu": None})
    mirror.close()
    assert fake.logged == [(4, {"loss": 2.0}), "finished"]
    assert (fake.asked["id"], fake.asked["resume"], fake.asked["mode"]) == ("0a1b", "allow", "offline")
    assert (fake.asked["project"], fake.asked["name"], fake.asked["tags"]) == (
        "project",
        "seven",
        ["attempt from step 3"],
    )
    assert fake.asked["config"] == {**to_tree(config), "git_commit": source_commit()}


def unexpected(sentence: str) -> None:
    raise AssertionError(sentence)


def test_a_mirror_that_cannot_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    said: list[str] = []
    tell: Callable[[str], None] = said.append
    config = case(log={"wandb": "online", "tensorboard": True})
    assert open_mirrors(config, "id", attempt="a", resumed_step=0, say=tell) == {}
    assert [s.split(" could not start and is left out: ")[0] for s in said] == ["wandb", "tensorboard"]


def test_no_mirror_is_opened_unasked() -> None:
    assert open_mirrors(case(), "id", attempt="a", resumed_step=0, say=unexpected) == {}


def boarded(folder: Path) -> dict[str, list[int]]:
    """Steps of every curve, as TensorBoard itself reads them."""
    found = EventAccumulator(str(folder))
    found.Reload()
    return {name: [event.step for event in found.Scalars(name)] for name in found.Tags()["scalars"]}


def board(path: Path, console: Console, *, resumed_step: int) -> Loggers:
    """An attempt that writes TensorBoard's files."""
    config = case(run={"dir": str(path.parent)}, log={"tensorboard": True})
    mirrors = open_mirrors(config, "id", attempt="a", resumed_step=resumed_step, say=unexpected)
    return Loggers(Record(path, resumed_step=resumed_step), console, mirrors)


def test_tensorboard_shows_no_step_twice_after_a_crash_or_a_rollback(path: Path, console: Console) -> None:
    first = board(path, console, resumed_step=0)
    # the whole of a new run counts, its evaluated step 0 included
    first.write({"step": 0, "eval": 2.0})
    for step in range(1, 6):
        first.write({"step": step, "loss": 1.0})
    first.write({"step": 3, "eval": 1.0})
    first.close()
    # the newest checkpoint was of step 3: steps 4 and 5 come again
    second = board(path, console, resumed_step=3)
    for step in range(4, 8):
        second.write({"step": step, "loss": 2.0})
    second.cut(6)
    for step in range(7, 9):
        second.write({"step": step, "loss": 3.0})
    second.close()
    assert boarded(path.parent / "tensorboard") == {"loss": [1, 2, 3, 4, 5, 6, 7, 8], "eval": [0, 3]}
    assert sorted(steps(path)) == [0, 1, 2, 3, 3, 4, 5, 6, 7, 8]
