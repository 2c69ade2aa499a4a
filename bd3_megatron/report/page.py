"""The page: one HTML file with everything in it, rendered from `page.html.jinja` over the sections of the runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bd3_megatron.report import sections
from bd3_megatron.report.chart import stroke
from bd3_megatron.report.findings import findings
from bd3_megatron.report.results import ResultSection
from bd3_megatron.report.run_data import ReportedRun

TEMPLATE = "page.html.jinja"


def render_page(
    runs: Sequence[ReportedRun], *, now: float, title: str | None = None, results: Sequence[ResultSection] = ()
) -> str:
    """The whole file.

    Args:
        runs: one or more.
        now: seconds since the epoch, for what is said about running jobs.
        title: of the page; None: the runs' names.
        results: tables and charts of other tools, shown first.
    """
    # results of other tools answer the question that the reader came with, so they stand first
    made = [
        *sections.results(results),
        sections.summary_table(runs),
        sections.findings_list({run.name: findings(run, now=now) for run in runs}),
        sections.course_charts(runs),
        sections.held_out_by_source(runs),
        sections.noise(runs),
        sections.experts(runs),
        sections.time_split(runs),
        sections.curriculum(runs),
        sections.samples(runs),
        sections.environment(runs),
        sections.configuration(runs),
    ]
    # names, samples and settings are other people's text: every value is escaped, and a value that is not there fails
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(TEMPLATE).render(
        heading=title or ", ".join(run.name for run in runs),
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now)),
        key=[(run.name, stroke(number)) for number, run in enumerate(runs)],
        sections=[section for section in made if section is not None],
    )
    # names of folders need not be UTF-8, and JSON may hold half a character
    return page.encode("utf-8", "replace").decode("utf-8")
