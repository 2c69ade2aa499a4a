"""The report: what it reads, what it says in plain words, and that one file holds everything."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bd3_megatron.errors import DataError
from bd3_megatron.process.status import State, begin_attempt, record_error, write_status
from bd3_megatron.report.findings import findings, loss_spikes
from bd3_megatron.report.run_data import ReportedRun, needs_tokens, read_runs
from tests.unit.report.written_runs import start_record, step_record, write_run
from tools import report_throughput
from tools.report import main

NOW = 1e9


def course(steps: int = 60, **more: Any) -> list[dict[str, Any]]:
    """A quiet run: loss falls, steps are even, evaluation every 20."""
    records: list[dict[str, Any]] = [start_record(1000.0, 1, tp=1, pp=1, vpp=1, cp=1, dp=1) | {"step": 0}]
    for step in range(1, steps + 1):
        records.append(
            step_record(
                step,
                1000.0 + step,
                1.0,
                tokens_per_second=256.0,
                **{
                    "loss/train_nats_per_token": 5.0 / (1 + 0.01 * step) + 0.01 * math.sin(step),
                    "loss/nll_nats_at_t_0.0": 3.0,
                    "loss/nll_nats_at_t_0.1": 3.5,
                    "optim/grad_norm": 1.0,
                    "optim/lr": 1e-3,
                    "optim/skipped_steps": 0,
                    "noise/masked_fraction": 0.5,
                    "noise/block_size": 4,
                    "noise/interval_beta": 0.001,
                    "noise/interval_omega": 1.0,
                },
            )
            | more
        )
        if step % 20 == 0:
            records.append(evaluation(step, 5.0 - 0.02 * step))
    return records


def evaluation(step: int, nll: float) -> dict[str, Any]:
    return {
        "step": step,
        "eval/nll_nats_per_token": nll,
        "eval/stderr_noise_nats_per_token": 0.01,
        "eval/stderr_text_nats_per_token": 0.05,
        "eval/perplexity": math.exp(nll),
    }


def one_run(folder: Path, records: list[dict[str, Any]], **options: Any) -> ReportedRun:
    return read_runs([write_run(folder, records, **options)])[0]


def said(folder: Path, records: list[dict[str, Any]], *, now: float | None = None, **options: Any) -> str:
    run = one_run(folder, records, **options)
    return " ".join(findings(run, now=run.written_at + 1 if now is None else run.written_at + now))


def finish(folder: Path, status: State = "finished", reason: str = "finished") -> None:
    begin_attempt(folder)
    write_status(folder, status, reason=reason, step=60)


def test_a_quiet_finished_run_has_nothing_to_say(tmp_path: Path) -> None:
    run = one_run(tmp_path / "a", course())
    finish(tmp_path / "a")
    assert findings(read_runs([tmp_path / "a"])[0], now=NOW) == []
    assert run.num_steps == 60 and run.tokens(60) == 60 * 256 and run.tokens(30) == 30 * 256


def test_a_running_job_is_readable_and_its_torn_line_is_named(tmp_path: Path) -> None:
    words = said(tmp_path / "a", course(), tail='{"step": 61, "loss/tra', train={"steps": 500})
    assert "the last line of metrics.jsonl is incomplete" in words and "it was left out" in words
    assert "the run goes on: step 60 of 500" in words


def test_a_silent_job_is_named(tmp_path: Path) -> None:
    assert "stands at step 60 of 500 and has written nothing for 3 hours" in said(
        tmp_path / "a", course(), now=3 * 3600, train={"steps": 500}
    )


@pytest.mark.parametrize(
    ("status", "reason", "sentence"),
    [
        ("stopped", "deadline", "stopped at step 60 (deadline); the same command goes on"),
        ("failed", "data/x is gone; name it.", "failed at step 60 (exit code 0): data/x is gone; name it."),
        ("hung", "rank 3 waits", "hung and was ended at step 60 (exit code 0): rank 3 waits"),
    ],
)
def test_a_job_that_ended_says_how_and_why(
    tmp_path: Path, status: State, reason: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "a", course())
    finish(tmp_path / "a", status, reason)
    assert sentence in " ".join(findings(read_runs([tmp_path / "a"])[0], now=NOW))
    report_throughput.main([str(tmp_path / "a")])
    assert sentence in capsys.readouterr().out


def test_a_run_that_was_killed_died_at_the_last_step_it_recorded(tmp_path: Path) -> None:
    write_run(tmp_path / "a", course())
    begin_attempt(tmp_path / "a")
    words = findings(read_runs([tmp_path / "a"])[0], now=NOW)
    # its status is that of its start, and nobody wrote an exit code
    assert "the run died at step 60 or later: the run was ended from outside; its logs may say by what" in words


def test_a_run_that_failed_before_its_first_step_says_so(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [start_record(1.0, 1) | {"step": 0}])
    begin_attempt(tmp_path / "a")
    record_error(tmp_path / "a", DataError("no text in x; name another."))
    words = findings(read_runs([tmp_path / "a"])[0], now=NOW)
    assert "the run failed at step 0 (exit code 2, DataError): no text in x; name another." in words


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_numbers_that_are_none_are_counted_and_left_out(tmp_path: Path, bad: float | None) -> None:
    records = course()
    for step in (30, 31):
        record = next(r for r in records if r.get("step") == step and "optim/lr" in r)
        record["loss/train_nats_per_token"] = bad
    words = said(tmp_path / "a", records)
    assert "the loss was not a number at 2 logged steps, first at step 30." in words
    run = read_runs([tmp_path / "a"])[0]
    assert len(run.values("loss/train_nats_per_token")) == 58
    assert main([str(tmp_path / "a"), "-o", str(tmp_path / "r.html")]) == 0
    assert "nan" not in re.findall(r'points="([^"]*)"', (tmp_path / "r.html").read_text())[0]


def test_the_page_never_replaces_a_file_of_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a", course())
    record = tmp_path / "a" / "metrics.jsonl"
    before = record.read_bytes()
    assert main([str(tmp_path / "a"), "-o", str(record)]) == 2
    assert "metrics.jsonl is there and no page of a report; name a new file" in capsys.readouterr().err
    assert record.read_bytes() == before
    # a page replaces the page of yesterday
    assert [main([str(tmp_path / "a"), "-o", str(tmp_path / "r.html")]) for _ in range(2)] == [0, 0]


def test_loss_spikes_are_named_once_each(tmp_path: Path) -> None:
    records = course()
    for record in records:
        if "optim/lr" in record and record["step"] in (25, 26, 48):
            record["loss/train_nats_per_token"] = 9.0 + (record["step"] == 48)
    run = one_run(tmp_path / "a", records)
    assert [step for step, _, _ in loss_spikes(run)] == [25, 48]
    assert re.search(
        r"rose suddenly 2 times; most at step 48, to 10\.00 from about 3\.\d\d", " ".join(findings(run, now=0))
    )


def test_skipped_updates_spike_guard_and_restarts_are_named(tmp_path: Path) -> None:
    records = course()
    for record in records:
        if "optim/lr" in record:
            record["optim/skipped_steps"] = 2 if record["step"] >= 40 else 0
    records.insert(30, records[29] | {"event": "loss_spike"})
    records += [{"event": "rollback", "step": 20}, start_record(2000.0, 1) | {"step": 60}]
    words = said(tmp_path / "a", records)
    assert "2 updates skipped" in words and "the first by step 40" in words
    assert "the spike guard left out 1 step, first step" in words
    assert "went back to a checkpoint 1 time because of loss spikes" in words and "the run was started 2 times" in words


def test_slow_steps_low_utilisation_and_waiting_are_named(tmp_path: Path) -> None:
    records = course()
    for record in records:
        if "optim/lr" in record:
            record |= {"throughput/mfu": 0.05, "time/data_wait_seconds": 0.4}
            record["time/step_seconds"] = 5.0 if record["step"] in (10, 20, 44) else 1.0
    words = said(tmp_path / "a", records)
    assert "3 of 60 logged steps took more than twice the usual 1 s" in words and "the slowest 5 s at step" in words
    assert "used little: 5.0% MFU" in words
    assert re.search(r"\d\d% of a step goes into waiting for data; more loader processes", words)


def test_more_than_the_peak_is_a_warning_and_never_a_result(tmp_path: Path) -> None:
    records = course()
    for record in records:
        if "optim/lr" in record:
            record |= {"throughput/mfu": 2.07, "throughput/mfu_min": 0.61}
    assert "MFU not shown: 207% of the peak cannot be, so the peak is too low" in said(tmp_path / "a", records)
    assert main([str(tmp_path / "a"), "-o", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text()
    assert "<td>61.0%</td>" in text and "207.0%" not in text
    # the chart of MFU stands there without a point
    assert re.search(r'aria-label="MFU"><text[^>]*>MFU</text><text[^>]*>no data yet</text></svg>', text)


def test_a_held_out_loss_that_rises_is_named(tmp_path: Path) -> None:
    records = [*course(), evaluation(80, 4.6)]
    assert "above its best, which was at step 60: over-fitting or divergence" in said(tmp_path / "a", records)
    without = [r for r in course() if "eval/perplexity" not in r]
    assert "no held-out evaluation is recorded" in said(tmp_path / "b", without)


def test_a_run_without_steps_is_a_page_all_the_same(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [start_record(1.0, 1) | {"step": 0}])
    assert main([str(tmp_path / "a"), "-o", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text()
    assert "no step is recorded yet" in text and "no data yet" in text


class _Pieces(HTMLParser):
    """Open tags, addresses, and whether tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "link", "line", "rect", "circle"):
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "rect", "circle"):
            assert self.stack.pop() == tag


def test_several_runs_make_one_file_that_needs_nothing_else(tmp_path: Path) -> None:
    write_run(tmp_path / "x" / "run", course(), data={"seq_len": 64})
    write_run(tmp_path / "y" / "run", course(100), diffusion={"block_size": 8})
    (tmp_path / "x" / "run" / "samples.txt").write_text("once <script>upon</script> a time & more")
    out = tmp_path / "report.html"
    results = tmp_path / "results.json"
    chart = {"title": "frontier", "x": "entropy", "y": "ppl", "scatter": True}
    chart |= {"series": [{"name": "S = 4", "points": [[3.0, 40.0], [4.0, 80.0]], "labels": ["T=0.5", "T=1"]}]}
    table = {"title": "Test perplexity", "text": ["A > B"], "columns": ["model", "ppl"], "rows": [["AR", "3"]]}
    results.write_text(json.dumps([table | {"charts": [chart]}]))
    runs = [str(tmp_path / name / "run") for name in "xy"]
    assert main([*runs, "-o", str(out), "--results", str(results), "--title", "Two runs"]) == 0
    text = out.read_text(encoding="utf-8")
    page = _Pieces()
    page.feed(text)
    assert not page.stack and "script" not in page.tags and page.addresses == ["data:,"]
    assert "url(" not in text and "@import" not in text and "http" not in text
    assert "&lt;script&gt;upon" in text and "x/run" in text and "y/run" in text
    for heading in ("Two runs", "Test perplexity", "Runs", "In plain words", "Course", "Noise", "Time", "Samples"):
        assert f">{heading}<" in text
    assert "Where they differ" in text and "diffusion.block_size" in text and "T=0.5" in text
    assert out.stat().st_size < 300_000 and not list(tmp_path.glob(".report*"))


def test_phases_and_intervals_are_listed_where_they_change(tmp_path: Path) -> None:
    records = course()
    for record in records:
        if "optim/lr" in record and record["step"] > 30:
            record |= {"noise/block_size": 16, "noise/interval_beta": 0.3, "noise/interval_omega": 0.8}
    records.append(
        {"step": 30, "search/variance_nats2": 2.0, "search/interval_beta": 0.3, "search/interval_omega": 0.8}
    )
    write_run(tmp_path / "a", records)
    assert main([str(tmp_path / "a"), "-o", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text()
    assert "Phases and interval choices" in text and "<td>31</td><td>16</td><td>0.3</td><td>0.8</td>" in text
    assert "noise interval: lower and upper end" in text and "chosen interval" in text


def test_the_loads_of_experts_are_shown_by_layer_and_noise_level(tmp_path: Path) -> None:
    loads = {f"experts/{kind}_layer_0{n}": 0.25 * n for kind in ("load_entropy", "largest_load_share") for n in (1, 2)}
    loads |= {"experts/masked_load_entropy_layer_01": 0.125, "experts/masked_load_entropy_layer_02": 0.375}
    write_run(tmp_path / "a", course(40, **loads, **{"experts/masked_load_entropy_at_t_0.3": 0.75}))
    assert main([str(tmp_path / "a"), "-o", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text()
    assert "<td>1</td><td>0.250</td><td>0.250</td><td>0.125</td>" in text
    assert "<td>2</td><td>0.500</td><td>0.500</td><td>0.375</td>" in text
    assert "load entropy by layer" in text and "load entropy of masked rows by noise level" in text
    write_run(tmp_path / "b", course(40))
    assert main([str(tmp_path / "b"), "-o", str(tmp_path / "r.html")]) == 0
    assert "Experts" not in (tmp_path / "r.html").read_text()


def test_the_held_out_loss_of_each_source_is_shown_with_its_newest_value(tmp_path: Path) -> None:
    records = course(40)
    for record in records:
        if "eval/perplexity" in record:
            loss = 4.0 - 0.01 * record["step"]
            record |= {"eval/source/books/nll_nats_per_token": loss, "eval/source/a/web/nll_nats_per_token": 2 * loss}
            record |= {"eval/source/books/stderr_text_nats_per_token": 0.25, "eval/source/books/perplexity": 37.5}
    write_run(tmp_path / "a", records)
    assert main([str(tmp_path / "a"), "-o", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text()
    assert "<td>books</td><td>40</td><td>3.6000</td><td>0.2500</td><td>37.50</td>" in text
    assert "<td>a/web</td><td>40</td><td>7.2000</td><td>-</td><td>-</td>" in text and "held-out loss by source" in text
    write_run(tmp_path / "b", course(40))
    assert main([str(tmp_path / "b"), "-o", str(tmp_path / "r.html")]) == 0
    assert "by source" not in (tmp_path / "r.html").read_text()


def test_a_repeated_step_counts_as_it_was_done_last(tmp_path: Path) -> None:
    records = course(10)
    again = next(r for r in records if r.get("step") == 5) | {"loss/train_nats_per_token": 1.25}
    run = one_run(tmp_path / "a", [*records, start_record(2000.0, 1) | {"step": 4}, again])
    assert run.values("loss/train_nats_per_token")[5] == 1.25


def test_x_is_tokens_where_steps_are_not_comparable(tmp_path: Path) -> None:
    small = one_run(tmp_path / "a", course())
    doubled = [r | {"tokens": 2 * r["tokens"]} if "tokens" in r else r for r in course()]
    large = one_run(tmp_path / "b", doubled)
    assert not needs_tokens([small, small]) and needs_tokens([small, large])
    assert large.series("optim/lr", by_tokens=True)[0][0] == 512.0


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (lambda folder: None, "holds no config.yaml; give the run.dir of a run that has started"),
        (lambda folder: write_run(folder / "run", course(3), tail="broken\n{}\n"), "line 5 of"),
        (
            lambda folder: write_run(folder / "run", [{"step": "x"}, *course(3)]),
            "has step='x', which no trainer writes",
        ),
        (lambda folder: write_run(folder / "run", [{"step": 1, "grid": {"tp": 0}}]), "has grid={'tp': 0}, which no"),
        (lambda folder: write_run(folder / "run", [{"step": 1, "world_size": True}]), "has world_size=True, which no"),
    ],
)
def test_what_is_no_run_is_refused_in_one_sentence(
    tmp_path: Path, prepare: Any, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(tmp_path)
    assert main([str(tmp_path / "run"), "-o", str(tmp_path / "r.html")]) == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "r.html").exists()


def test_bad_results_and_places_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a", course(3))
    series = {"name": "n", "points": [[1, 2]], "errors": [1, 2]}
    for bad, words in (
        ({"a": 1}, "is damaged (no JSON list); give a results.json"),
        ([{"text": ["a"]}], "[0].title is not set"),
        ([{"title": "t", "rows": [["1"]]}], "a row of 1 cells under 0 columns"),
        ([{"title": "t", "charts": [{"title": "c", "x": "x", "y": "y", "series": [series]}]}], "2 errors for 1 points"),
        ([{"title": "t", "columns": 3}], "[0].columns=3 is not a list"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps(bad))
        assert main([str(run), "--results", str(tmp_path / "bad.json"), "-o", str(tmp_path / "r.html")]) == 2
        assert words in capsys.readouterr().err
    assert main([str(run), "--results", str(tmp_path / "none.json"), "-o", str(tmp_path / "r.html")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    for place, words in (
        ("/dev/null", "is a device or a pipe and would be replaced; name a file"),
        (str(run), "cannot be written (Is a directory)"),
        (str(run / "config.yaml" / "r.html"), "cannot be written (Not a directory)"),
    ):
        assert main([str(run), "-o", place]) == 2
        assert words in capsys.readouterr().err
    assert Path("/dev/null").is_char_device() and (run / "metrics.jsonl").is_file()
