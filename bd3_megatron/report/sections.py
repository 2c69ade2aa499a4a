"""The sections of the page: from runs to pieces of HTML. Each returns "" where the runs have nothing to show.

Decides what stands together and in which order; knows keys of metrics.jsonl, and nothing of files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from bd3_megatron.config.load import flatten
from bd3_megatron.evaluate.tables import NORMAL_95
from bd3_megatron.report.chart import Series, colour, histogram, line_chart, short, smoothed, stacked_bars
from bd3_megatron.report.run_data import LOSS, Point, RunData, needs_tokens
from bd3_megatron.report.run_summary import Summary, summarize

MANY_POINTS = 60
"""Beyond this many points a curve is drawn faint, with its average on top."""
LAST_SHARE = 0.2
"""Share of a run whose records are averaged where a chart shows a state, not a course."""
_BINNED = re.compile(r"loss/nll_nats_(at|by)_([a-z_]+?)_(\d+(?:\.\d+)?)$")
_SOURCE = re.compile(r"loss/nll_nats_(?:of|from)_source_(.+)$")
_GROUP_NORM = re.compile(r"optim/grad_norm_(?:of_)?(.+)$")


def summary_table(runs: Sequence[RunData]) -> str:
    """One row a run: what it is, how far it is, how good and how fast."""
    report = summarize([run.run for run in runs])
    heads = (
        "run", "model", "grid", "step", "tokens", "held-out perplexity", "95 % interval", "train loss", "data tokens/s",
        "MFU", "MFU-min", "HFU", "step s", "goodput",
    )  # fmt: skip
    rows = [_summary_cells(run, row, number) for number, (run, row) in enumerate(zip(runs, report.rows, strict=True))]
    notes = "".join(f"<p class=note>{escape(note)}</p>" for note in report.notes if "different models" in note)
    return _section("Runs", table(heads, rows, is_html=True) + notes)


def _summary_cells(run: RunData, row: Summary, number: int) -> list[str]:
    nll = run.values("eval/nll_nats_per_token")
    step = max(nll, default=None)
    perplexity = interval = "-"
    if step is not None:
        perplexity = _number(run.values("eval/perplexity").get(step), ".2f")
        error = run.values("eval/stderr_text_nats_per_token").get(step)
        if error is not None and nll[step] < 50:
            ends = [math.exp(nll[step] + sign * NORMAL_95 * error) for sign in (-1, 1)]
            interval = f"{ends[0]:.2f} to {ends[1]:.2f}"
    losses = smoothed(run.series(LOSS, by_tokens=False))
    tokens = run.tokens(run.num_steps)
    swatch = f'<span class=swatch style="background:{colour(number)}"></span>'
    cells = [
        row.model, row.grid, f"{run.num_steps:,}", short(tokens) if tokens else "-", perplexity, interval,
        _number(losses[-1][1] if losses else None, ".3f"), _number(row.data_tokens_per_second, ",.0f"),
        _number(row.mfu, ".1%"), _number(row.mfu_min, ".1%"), _number(row.hfu, ".1%"), _number(row.step_seconds, ".3g"),
        _number(row.goodput, ".0%"),
    ]  # fmt: skip
    return [f"{swatch}{escape(run.name)}", *map(escape, cells)]


def findings_list(said: Mapping[str, Sequence[str]]) -> str:
    """What to know, in plain words."""
    items = [f"<li><b>{escape(name)}</b>: {escape(sentence)}</li>" for name, all_ in said.items() for sentence in all_]
    return _section("In plain words", f"<ul>{''.join(items)}</ul>" if items else "<p>Nothing unusual was seen.</p>")


def curves(runs: Sequence[RunData]) -> str:
    """Loss, held-out perplexity, rate, norms and speed over the course of the runs."""
    by_tokens = needs_tokens(runs)
    x = "clean tokens" if by_tokens else "step"
    charts = [
        line_chart("training loss", x, "nats per token", _courses(runs, LOSS, by_tokens), log_y=True),
        line_chart("held-out perplexity, 95 % over text", x, "perplexity", _held_out(runs, by_tokens), log_y=True),
    ]
    for key, title, unit, log_y in (
        ("optim/grad_norm", "gradient norm before clipping", "norm", True),
        ("optim/lr", "learning rate", "rate", False),
        ("throughput/data_tokens_per_second", "throughput, all devices", "data tokens/s", False),
        ("throughput/mfu", "MFU", "share of peak", False),
        ("memory/peak_bytes", "peak memory of a device", "bytes", False),
    ):
        if any(key in run.keys for run in runs):
            series = _courses(runs, key, by_tokens)
            charts.append(line_chart(title, x, unit, series, log_y=log_y, from_zero=not log_y))
    groups = sorted({m[1] for run in runs for key in run.keys if (m := _GROUP_NORM.match(key))})
    for number, run in enumerate(runs) if groups else ():
        named = [
            Series(g, run.series(f"optim/grad_norm_{g}", by_tokens=by_tokens), colour(i)) for i, g in enumerate(groups)
        ]
        charts.append(line_chart(f"gradient norm by group: {runs[number].name}", x, "norm", named, log_y=True))
    return _section("Course", _grid(charts))


def noise(runs: Sequence[RunData]) -> str:
    """What the objective looks like inside: by noise level and position, masked share, interval."""
    by_tokens = needs_tokens(runs)
    x = "clean tokens" if by_tokens else "step"
    charts = []
    families = sorted({m[2] for run in runs for key in run.keys if (m := _BINNED.match(key))})
    for family in families:
        series = [Series(run.name, _binned(run, family), colour(i)) for i, run in enumerate(runs)]
        name = "noise level t" if family == "t" else family.replace("_", " ")
        charts.append(line_chart(f"NLL by {name}, last fifth of the run", name, "nats per masked token", series))
    sources = sorted({m[1] for run in runs for key in run.keys if (m := _SOURCE.match(key))})
    if sources:
        rows = [
            [run.name, *(_number(_last_mean(run, f"loss/nll_nats_of_source_{s}"), ".3f") for s in sources)]
            for run in runs
        ]
        charts.append("<h3>NLL by data source</h3>" + table(["run", *sources], rows))
    if any("noise/masked_fraction" in run.keys for run in runs):
        series = _courses(runs, "noise/masked_fraction", by_tokens)
        charts.append(line_chart("masked share of tokens", x, "share", series, from_zero=True))
    ends = [
        Series(f"{run.name} {end}", run.series(f"noise/interval_{end}", by_tokens=by_tokens), colour(i))
        for i, run in enumerate(runs)
        for end in ("beta", "omega")
    ]
    if any(
        run.values("search/variance_nats2") or len(set(run.values("noise/interval_beta").values())) > 1 for run in runs
    ):
        charts.append(line_chart("noise interval: lower and upper end", x, "t", ends, from_zero=True))
        series = [s for key in ("search/variance_nats2",) for s in _courses(runs, key, by_tokens)]
        charts.append(
            line_chart("variance of one block's loss, chosen interval", x, "nats squared", series, log_y=True)
        )
    return _section("Noise", _grid(charts)) if charts else ""


def time_split(runs: Sequence[RunData]) -> str:
    """Where a step's time goes, and how even steps are."""
    splits = {}
    for run in runs:
        seconds = run.run.time_split()
        total = sum(seconds.values())
        if total:
            splits[run.name] = {kind: value / total for kind, value in seconds.items()}
    steps = {run.name: (colour(i), list(run.values("time/step_seconds").values())) for i, run in enumerate(runs)}
    charts = [stacked_bars("where the time of a step goes", splits)] if splits else []
    if any(values for _, values in steps.values()):
        charts.append(histogram("step time", "seconds (slowest 1 % in the last bin)", steps))
    return _section("Time", _grid(charts)) if charts else ""


def phases(runs: Sequence[RunData]) -> str:
    """Block sizes and intervals in force, one row for every change."""
    rows = []
    for run in runs:
        sizes, betas, omegas = (run.values(f"noise/{key}") for key in ("block_size", "interval_beta", "interval_omega"))
        before: tuple[float, ...] | None = None
        for step, size in sizes.items():
            state = (size, betas.get(step, 0.0), omegas.get(step, 0.0))
            if state != before:
                rows.append([run.name, f"{step:,}", f"{size:g}", f"{state[1]:g}", f"{state[2]:g}"])
            before = state
    if len(rows) <= len(runs):
        return ""
    return _section("Phases and interval choices", table(("run", "from step", "block size", "beta", "omega"), rows))


def samples(runs: Sequence[RunData]) -> str:
    """Text of the runs, as it came."""
    texts = [f"<h3>{escape(run.name)}</h3><pre>{escape(run.samples)}</pre>" for run in runs if run.samples]
    return _section("Samples", "".join(texts)) if texts else ""


def configuration(runs: Sequence[RunData]) -> str:
    """Settings that differ first, then all others."""
    flats = [flatten(run.run.config) for run in runs]
    keys = list(flats[0])
    own = {key for key in keys if len({str(flat.get(key)) for flat in flats}) > 1}
    differing = [[key, *(str(flat.get(key)) for flat in flats)] for key in keys if key in own]
    shared = "".join(
        f"<div class=setting><span>{escape(key)}</span> <b>{escape(str(flats[0][key]))}</b></div>"
        for key in keys
        if key not in own
    )
    body = ""
    if len(runs) > 1:
        names = ["setting", *(run.name for run in runs)]
        body = "<h3>Where they differ</h3>" + (table(names, differing) if differing else "<p>Nowhere.</p>")
        body += "<h3>What they share</h3>"
    return _section("Configuration", body + f"<div class=columns>{shared}</div>")


def environment(runs: Sequence[RunData]) -> str:
    """Hardware, grid, code and software of each run."""
    rows = []
    for run in runs:
        start = run.events("start")[-1] if run.events("start") else {}
        peak = start.get("throughput/peak_tflops")
        facts: dict[str, Any] = {
            "devices": run.run.devices,
            "grid": " ".join(f"{axis}={size}" for axis, size in start.get("grid", {}).items()),
            "ZeRO stage": start.get("zero_stage"),
            "peak of a device": None if peak is None else f"{peak:.4g} TFLOP/s ({start.get('throughput/peak_source')})",
            "git commit of the newest checkpoint": run.commit,
            **run.manifest.get("software", {}),
        }
        rows += [[run.name, name, "-" if value in (None, "") else str(value)] for name, value in facts.items()]
    return _section("Hardware and software", table(("run", "what", "value"), rows))


def results(found: Sequence[Mapping[str, Any]]) -> str:
    """Tables and charts that another tool computed: {"title", "text", "columns", "rows", "charts"} each."""
    parts = []
    for one in found:
        body = "".join(f"<p>{escape(line)}</p>" for line in one.get("text", []))
        if one.get("rows"):
            body += table(one["columns"], [[str(cell) for cell in row] for row in one["rows"]])
        drawn = [_given_chart(chart) for chart in one.get("charts", [])]
        parts.append(_section(str(one.get("title", "Results")), body + (_grid(drawn) if drawn else "")))
    return "".join(parts)


def _given_chart(chart: Mapping[str, Any]) -> str:
    series = [
        Series(
            one["name"],
            [(float(x), float(y)) for x, y in one["points"]],
            colour(number),
            errors=one.get("errors", ()),
            is_scatter=bool(chart.get("scatter")),
            labels=one.get("labels", ()),
        )
        for number, one in enumerate(chart["series"])
    ]
    key = "".join(f'<span class=swatch style="background:{s.colour}"></span>{escape(s.name)} &nbsp; ' for s in series)
    drawn = line_chart(chart["title"], chart["x"], chart["y"], series, log_y=bool(chart.get("log_y")))
    return f"{drawn}<p class=key>{key}</p>"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, is_html: bool = False) -> str:
    """An HTML table that scrolls inside its own box on narrow screens.

    Args:
        heads: texts.
        rows: cells; texts unless `is_html`.
        is_html: cells are escaped already.
    """
    keep = (lambda cell: cell) if is_html else escape
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{keep(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _courses(runs: Sequence[RunData], key: str, by_tokens: bool) -> list[Series]:
    series = []
    for number, run in enumerate(runs):
        points = run.series(key, by_tokens=by_tokens)
        many = len(points) > MANY_POINTS
        series.append(Series(run.name, points, colour(number), is_faint=many))
        if many:
            series.append(Series(run.name, smoothed(points), colour(number)))
    return series


def _held_out(runs: Sequence[RunData], by_tokens: bool) -> list[Series]:
    series = []
    for number, run in enumerate(runs):
        errors = run.values("eval/stderr_text_nats_per_token")
        found = {step: p for step, p in run.values("eval/perplexity").items() if p < 1e12}
        points: list[Point] = [(run.tokens(step) if by_tokens else float(step), p) for step, p in found.items()]
        bars = [NORMAL_95 * errors.get(step, 0.0) * p for step, p in found.items()]
        series.append(Series(run.name, points, colour(number), errors=bars))
    return series


def _binned(run: RunData, family: str) -> list[Point]:
    points = []
    for key in run.keys:
        match = _BINNED.match(key)
        value = _last_mean(run, key) if match and match[2] == family else None
        if match and value is not None:
            points.append((float(match[3]), value))
    return sorted(points)


def _last_mean(run: RunData, key: str) -> float | None:
    kept = [value for step, value in run.values(key).items() if step >= (1 - LAST_SHARE) * run.num_steps]
    return sum(kept) / len(kept) if kept else None


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _grid(charts: Sequence[str]) -> str:
    return "<div class=charts>" + "".join(f"<figure>{chart}</figure>" for chart in charts) + "</div>"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"
