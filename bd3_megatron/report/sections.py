"""The sections of the page: from runs to texts, tables and charts, None where the runs have nothing to show.

This file knows the keys of metrics.jsonl and the order of things; `page.html.jinja` knows the markup.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bd3_megatron.config.load import flatten
from bd3_megatron.evaluate.tables import NORMAL_95, SOURCE_PREFIX
from bd3_megatron.report.chart import (
    Chart,
    Point,
    Series,
    Stroke,
    histogram,
    line_chart,
    short,
    smoothed,
    stacked_bars,
    stroke,
)
from bd3_megatron.report.results import ResultChart, ResultSection
from bd3_megatron.report.run_data import ReportedRun, needs_tokens
from bd3_megatron.report.run_record import LOSS_KEY, UTILISATION_KEYS, MetricsRecord, finite
from bd3_megatron.report.run_summary import RunSummary, compare_runs

MANY_POINTS = 60
"""Beyond this many points a curve is drawn faint, with its average on top."""
LAST_SHARE = 0.2
"""Share of a run whose records are averaged where a chart shows a state, not a course."""
_SOURCE_LOSS = re.compile(rf"{SOURCE_PREFIX}(.+)/nll_nats_per_token$")
_BINNED = re.compile(r"loss/nll_nats_at_t_(\d\.\d+)$")
_LOADED = re.compile(r"experts/load_entropy_layer_(\d+)$")
_LOADED_AT = re.compile(r"experts/masked_load_entropy_at_t_(\d\.\d+)$")
_LOAD_KINDS = (
    ("load_entropy", "load entropy"),
    ("largest_load_share", "largest share of an expert"),
    ("masked_load_entropy", "load entropy, masked rows"),
)
"""Parts of the keys of a layer's load, and what the page calls them."""


@dataclass(frozen=True)
class PageTable:
    """Rows of texts under headings; scrolls inside its own box on narrow screens."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    strokes: Sequence[Stroke] = ()
    """One a row, drawn before its first cell."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One heading with what stands under it, in the order of the fields."""

    title: str
    text: Sequence[str] = ()
    tables: Sequence[PageTable] = ()
    items: Sequence[tuple[str, str]] = ()
    """(run, sentence) pairs."""
    charts: Sequence[Chart] = ()
    quotations: Sequence[tuple[str, str]] = ()
    """(run, text as it came) pairs."""
    settings: Sequence[tuple[str, str]] = ()
    """(key, value) pairs in columns."""
    settings_caption: str = ""
    notes: Sequence[str] = ()


def summary_table(runs: Sequence[ReportedRun]) -> Section:
    """One row a run: what it is, how far it is, how good and how fast."""
    compared = compare_runs([run.run for run in runs])
    heads = (
        "run", "model", "grid", "step", "tokens", "held-out perplexity", "95 % interval", "train loss", "data tokens/s",
        "MFU", "MFU-min", "HFU", "step s", "goodput",
    )  # fmt: skip
    rows = [_summary_cells(run, row) for run, row in zip(runs, compared.rows, strict=True)]
    table = PageTable(heads, rows, strokes=[stroke(number) for number in range(len(runs))])
    # what concerns one run stands among the findings
    return Section(title="Runs", tables=[table], notes=compared.group_notes)


def _summary_cells(run: ReportedRun, row: RunSummary) -> list[str]:
    # the newest evaluation: perplexity falls over the run, and the best one would flatter a run that diverges
    nll = run.values("eval/nll_nats_per_token")
    step = max(nll, default=None)
    perplexity = interval = "-"
    if step is not None:
        perplexity = _number(run.values("eval/perplexity").get(step), ".2f")
        error = run.values("eval/stderr_text_nats_per_token").get(step)
        # beyond 50 nats the exponential says nothing, and soon overflows
        if error is not None and nll[step] < 50:
            ends = [math.exp(nll[step] + sign * NORMAL_95 * error) for sign in (-1, 1)]
            interval = f"{ends[0]:.2f} to {ends[1]:.2f}"
    # one step's loss is of one batch, and jumps by more than runs differ
    losses = smoothed(run.series(LOSS_KEY, by_tokens=False))
    tokens = run.tokens(run.num_steps)
    return [
        run.name, row.model, row.grid, f"{run.num_steps:,}", short(tokens) if tokens else "-", perplexity, interval,
        _number(losses[-1][1] if losses else None, ".3f"), _number(row.data_tokens_per_second, ",.0f"),
        _number(row.mfu, ".1%"), _number(row.mfu_min, ".1%"), _number(row.hfu, ".1%"), _number(row.step_seconds, ".3g"),
        _number(row.goodput, ".0%"),
    ]  # fmt: skip


def findings_list(said: Mapping[str, Sequence[str]]) -> Section:
    """What to know, in plain words."""
    items = [(name, sentence) for name, sentences in said.items() for sentence in sentences]
    return Section(title="In plain words", items=items, text=() if items else ["Nothing unusual was seen."])


def course_charts(runs: Sequence[ReportedRun]) -> Section:
    """Loss, held-out perplexity, rate, norms and speed over the course of the runs."""
    by_tokens = needs_tokens(runs)
    x = "clean tokens" if by_tokens else "step"
    charts = [
        line_chart("training loss", x, "nats per token", _courses(runs, LOSS_KEY, by_tokens), log_y=True),
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
            # quantities with a meaningful zero show it; norms are read by their ratio
            charts.append(line_chart(title, x, unit, series, log_y=log_y, from_zero=not log_y))
    return Section(title="Course", charts=charts)


def noise(runs: Sequence[ReportedRun]) -> Section | None:
    """What the objective looks like inside: by noise level and position, masked share, interval."""
    by_tokens = needs_tokens(runs)
    x = "clean tokens" if by_tokens else "step"
    charts = []
    if any(_BINNED.match(key) for run in runs for key in run.keys):
        series = [Series(run.name, _at_levels(run, _BINNED), stroke(i)) for i, run in enumerate(runs)]
        title = "NLL by noise level t, last fifth of the run"
        charts.append(line_chart(title, "noise level t", "nats per masked token", series))
    if any("noise/masked_fraction" in run.keys for run in runs):
        series = _courses(runs, "noise/masked_fraction", by_tokens)
        charts.append(line_chart("masked share of tokens", x, "share", series, from_zero=True))
    charts += _interval_charts(runs, x, by_tokens)
    return Section(title="Noise", charts=charts) if charts else None


def experts(runs: Sequence[ReportedRun]) -> Section | None:
    """How evenly the rows of each layer, and masked rows of each noise level, choose their experts."""
    rows: list[list[str]] = []
    by_layer: list[Series] = []
    by_level: list[Series] = []
    for number, run in enumerate(runs):
        layers = sorted({match[1] for key in run.keys if (match := _LOADED.match(key))})
        found = {
            layer: [_last_mean(run, f"experts/{kind}_layer_{layer}") for kind, _ in _LOAD_KINDS] for layer in layers
        }
        rows += [[run.name, str(int(layer)), *(_number(v, ".3f") for v in values)] for layer, values in found.items()]
        # masked rows share one embedding: where they choose alike, their curve lies below the other
        for index, name, own in ((0, "all rows", stroke(number)), (2, "masked", Stroke(stroke(number).colour, "4 2"))):
            points = [(float(layer), value) for layer, values in found.items() if (value := values[index]) is not None]
            by_layer += [Series(f"{run.name} {name}", points, own)] if points else []
        levels = _at_levels(run, _LOADED_AT)
        by_level += [Series(run.name, levels, stroke(number))] if levels else []
    if not rows:
        return None
    table = PageTable(("run", "layer", *(head for _, head in _LOAD_KINDS)), rows, caption="Last fifth of the run")
    charts = [
        line_chart("load entropy by layer, 1 where all experts are chosen alike", "layer", "share", by_layer),
        line_chart("load entropy of masked rows by noise level t", "noise level t", "share", by_level),
    ]
    return Section(title="Experts", tables=[table], charts=charts)


def _interval_charts(runs: Sequence[ReportedRun], x: str, by_tokens: bool) -> list[Chart]:
    """The interval over the run where a curriculum or a search moves it, and the variance that the search found."""
    key = "search/variance_nats2"
    # an interval that never moves is a number of the configuration, not a chart
    if not any(run.values(key) or len(set(run.values("noise/interval_beta").values())) > 1 for run in runs):
        return []
    ends = [
        Series(f"{run.name} {end}", run.series(f"noise/interval_{end}", by_tokens=by_tokens), own)
        for i, run in enumerate(runs)
        for end, own in (("beta", stroke(i)), ("omega", Stroke(stroke(i).colour, "4 2")))
    ]
    variance = "variance of one block's loss, chosen interval"
    return [
        line_chart("noise interval: lower and upper end", x, "t", ends, from_zero=True),
        line_chart(variance, x, "nats squared", _courses(runs, key, by_tokens), log_y=True),
    ]


def time_split(runs: Sequence[ReportedRun]) -> Section | None:
    """Where a step's time goes, and how even steps are."""
    splits = {}
    for run in runs:
        seconds = run.run.time_split()
        # shares, so that runs on different machines can be compared
        total = sum(seconds.values())
        if total:
            splits[run.name] = {kind: value / total for kind, value in seconds.items()}
    steps = {run.name: (stroke(i), list(run.values("time/step_seconds").values())) for i, run in enumerate(runs)}
    charts = [stacked_bars("where the time of a step goes", splits)] if splits else []
    if any(values for _, values in steps.values()):
        charts.append(histogram("step time", "seconds (slowest 1 % in the last bin)", steps))
    return Section(title="Time", charts=charts) if charts else None


def curriculum(runs: Sequence[ReportedRun]) -> Section | None:
    """Block sizes and intervals in force, one row for every change."""
    rows = []
    for run in runs:
        sizes, betas, omegas = (run.values(f"noise/{key}") for key in ("block_size", "interval_beta", "interval_omega"))
        before: tuple[float, ...] | None = None
        for step, size in sizes.items():
            # block size and interval are recorded with every step; only their changes are worth a row
            state = (size, betas.get(step, 0.0), omegas.get(step, 0.0))
            if state != before:
                rows.append([run.name, f"{step:,}", f"{size:g}", f"{state[1]:g}", f"{state[2]:g}"])
            before = state
    # one row a run says no more than the configuration below
    if len(rows) <= len(runs):
        return None
    heads = ("run", "from step", "block size", "beta", "omega")
    return Section(title="Phases and interval choices", tables=[PageTable(heads, rows)])


def held_out_by_source(runs: Sequence[ReportedRun]) -> Section | None:
    """The held-out loss of each part of a mixture: its newest value, and its course."""
    by_tokens = needs_tokens(runs)
    rows: list[list[str]] = []
    series: list[Series] = []
    for run in runs:
        for name in sorted(match[1] for key in run.keys if (match := _SOURCE_LOSS.match(key))):
            prefix = f"{SOURCE_PREFIX}{name}/"
            nll = run.values(f"{prefix}nll_nats_per_token")
            step = max(nll, default=None)
            if step is None:
                continue
            error = run.values(f"{prefix}stderr_text_nats_per_token").get(step)
            perplexity = run.values(f"{prefix}perplexity").get(step)
            cells = (_number(nll[step], ".4f"), _number(error, ".4f"), _number(perplexity, ".2f"))
            rows.append([run.name, name, f"{step:,}", *cells])
            points = run.series(f"{prefix}nll_nats_per_token", by_tokens=by_tokens)
            series.append(Series(f"{run.name} {name}", points, stroke(len(series))))
    if not rows:
        return None
    heads = ("run", "source", "step", "nats per token", "standard error, text", "perplexity")
    x = "clean tokens" if by_tokens else "step"
    chart = line_chart("held-out loss by source", x, "nats per token", series)
    return Section(title="Held-out loss by source", tables=[PageTable(heads, rows)], charts=[chart])


def samples(runs: Sequence[ReportedRun]) -> Section | None:
    """Text of the runs, as it came."""
    texts = [(run.name, run.samples) for run in runs if run.samples]
    return Section(title="Samples", quotations=texts) if texts else None


def configuration(runs: Sequence[ReportedRun]) -> Section:
    """Settings that differ first, then all others."""
    flats = [flatten(run.run.config) for run in runs]
    keys = list(flats[0])
    # compared as text: a list and a tuple of the same values are the same setting
    own = {key for key in keys if len({str(flat.get(key)) for flat in flats}) > 1}
    shared = [(key, str(flats[0][key])) for key in keys if key not in own]
    if len(runs) == 1:
        return Section(title="Configuration", settings=shared)
    differing = [[key, *(str(flat.get(key)) for flat in flats)] for key in keys if key in own]
    table = PageTable(["setting", *(run.name for run in runs)], differing, caption="Where they differ")
    return Section(
        title="Configuration",
        text=() if differing else ["The configurations do not differ."],
        tables=[table] if differing else (),
        settings=shared,
        settings_caption="What they share",
    )


def environment(runs: Sequence[ReportedRun]) -> Section:
    """Hardware, grid, code and software of each run."""
    rows = []
    for run in runs:
        # the last attempt's hardware: that is what the speed of the table was measured on
        start: MetricsRecord = run.events("start")[-1] if run.events("start") else {}
        peak = finite(start, "throughput/peak_tflops")
        software = run.manifest.get("software")
        facts: dict[str, Any] = {
            "devices": run.run.devices,
            "grid": " ".join(f"{axis}={size}" for axis, size in start.get("grid", {}).items()),
            "ZeRO stage": start.get("zero_stage"),
            "peak of a device": None if peak is None else f"{peak:.4g} TFLOP/s ({start.get('throughput/peak_source')})",
            "git commit of the newest checkpoint": run.commit,
            **(software if isinstance(software, dict) else {}),
        }
        rows += [[run.name, name, "-" if value in (None, "") else str(value)] for name, value in facts.items()]
    return Section(title="Hardware and software", tables=[PageTable(("run", "what", "value"), rows)])


def results(found: Sequence[ResultSection]) -> list[Section]:
    """Tables and charts that another tool computed."""
    return [
        Section(
            title=one.title,
            text=one.text,
            tables=[PageTable(one.columns, one.rows)] if one.rows else (),
            charts=[_result_chart(chart) for chart in one.charts],
        )
        for one in found
    ]


def _result_chart(chart: ResultChart) -> Chart:
    series = [
        Series(one.name, one.points, stroke(number), errors=one.errors, is_scatter=chart.scatter, labels=one.labels)
        for number, one in enumerate(chart.series)
    ]
    return line_chart(chart.title, chart.x, chart.y, series, log_y=chart.log_y, legend=True)


def _courses(runs: Sequence[ReportedRun], key: str, by_tokens: bool) -> list[Series]:
    # a share of the peak above 1 says that the peak is wrong (a finding), not how fast the run is
    most = 1.0 if key in UTILISATION_KEYS else math.inf
    series = []
    for number, run in enumerate(runs):
        points = [point for point in run.series(key, by_tokens=by_tokens) if point[1] <= most]
        many = len(points) > MANY_POINTS
        series.append(Series(run.name, points, stroke(number), is_faint=many))
        if many:
            series.append(Series(run.name, smoothed(points), stroke(number)))
    return series


def _held_out(runs: Sequence[ReportedRun], by_tokens: bool) -> list[Series]:
    series = []
    for number, run in enumerate(runs):
        errors = run.values("eval/stderr_text_nats_per_token")
        # an untrained model's perplexity would squeeze everything else to the bottom, even on a logarithmic axis
        found = {step: p for step, p in run.values("eval/perplexity").items() if p < 1e12}
        points: list[Point] = [(run.tokens(step) if by_tokens else float(step), p) for step, p in found.items()]
        # the error is of the mean NLL; perplexity is its exponential, so its error is that times perplexity
        bars = [NORMAL_95 * errors.get(step, 0.0) * p for step, p in found.items()]
        series.append(Series(run.name, points, stroke(number), errors=bars))
    return series


def _at_levels(run: ReportedRun, keys: re.Pattern[str]) -> list[Point]:
    found = [(float(match[1]), _last_mean(run, key)) for key in run.keys if (match := keys.match(key))]
    return sorted((level, value) for level, value in found if value is not None)


def _last_mean(run: ReportedRun, key: str) -> float | None:
    # early steps would show where the run came from, not where it stands
    kept = [value for step, value in run.values(key).items() if step >= (1 - LAST_SHARE) * run.num_steps]
    return sum(kept) / len(kept) if kept else None


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
