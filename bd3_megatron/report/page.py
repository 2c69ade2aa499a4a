"""The page around the sections: one HTML file without scripts, fonts or anything from elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from bd3_megatron.report import sections
from bd3_megatron.report.chart import colour
from bd3_megatron.report.findings import all_findings
from bd3_megatron.report.run_data import RunData

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 0 14px 40px; max-width: 1500px; font: 15px/1.5 system-ui, sans-serif; color: #1b1f24;
       background: #fff; overflow-wrap: anywhere; }
header { padding: 18px 0 8px; border-bottom: 2px solid #1b1f24; }
h1 { font-size: 1.5em; margin: 0; }
h2 { font-size: 1.15em; margin: 1.8em 0 .5em; border-bottom: 1px solid #d4d9de; padding-bottom: .2em; }
h3 { font-size: 1em; margin: 1em 0 .3em; }
.made, .note { color: #57606a; font-size: .9em; margin: .3em 0; }
.key { margin: .5em 0; }
.key span.run { display: inline-block; margin-right: 1.2em; max-width: 100%; }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border-radius: 2px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); gap: 10px 18px; }
figure { margin: 0; min-width: 0; break-inside: avoid; }
svg { display: block; width: 100%; height: auto; font: 11.5px system-ui, sans-serif; }
svg text { fill: #1b1f24; }
svg .title { font-size: 13px; font-weight: 600; }
svg .grid { stroke: #e6e9ec; }
svg .axis { stroke: #57606a; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .88em; }
th, td { text-align: left; padding: .25em .8em .25em 0; border-bottom: 1px solid #e6e9ec; vertical-align: top; }
td { white-space: nowrap; font-variant-numeric: tabular-nums; }
th { white-space: nowrap; }
.columns { columns: 340px; column-gap: 28px; font-size: .88em; }
.setting { break-inside: avoid; display: flex; justify-content: space-between; gap: 1em; border-bottom: 1px solid #e6e9ec;
           padding: .15em 0; }
.setting b { font-weight: 600; overflow-wrap: anywhere; text-align: right; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f7f9; padding: .8em; font-size: .85em; }
ul { padding-left: 1.2em; margin: .3em 0; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  .charts { grid-template-columns: 1fr 1fr; }
  .scroll { overflow: visible; } td { white-space: normal; }
  h2 { break-after: avoid; }
}
"""


def render_page(
    runs: Sequence[RunData], *, now: float, title: str | None = None, results: Sequence[Mapping[str, Any]] = ()
) -> str:
    """The whole file.

    Args:
        runs: one or more.
        now: seconds since the epoch, for what is said about running jobs.
        title: of the page; None: the runs' names.
        results: tables and charts of other tools, see `sections.results`.
    """
    heading = title or ", ".join(run.name for run in runs)
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    key = "".join(
        f'<span class=run><span class=swatch style="background:{colour(i)}"></span>{escape(run.name)}</span>'
        for i, run in enumerate(runs)
    )
    body = [
        f"<header><h1>{escape(heading)}</h1><p class=made>bd3_megatron report, made {made}</p>",
        f"<div class=key>{key}</div></header>",
        sections.results(results),
        sections.summary_table(runs),
        sections.findings_list(all_findings(runs, now=now)),
        sections.curves(runs),
        sections.noise(runs),
        sections.time_split(runs),
        sections.phases(runs),
        sections.samples(runs),
        sections.environment(runs),
        sections.configuration(runs),
    ]
    head = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # a data icon: browsers ask for /favicon.ico otherwise, and complain when there is none
        '<link rel="icon" href="data:,">'
        f"<title>{escape(heading)}</title><style>{STYLE}</style></head>"
    )
    return f"{head}\n<body>\n" + "\n".join(part for part in body if part) + "\n</body></html>\n"
