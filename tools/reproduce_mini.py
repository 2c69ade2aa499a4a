"""The paper in miniature: AR, S = 1, 4, 8, 16 and MDLM on one small corpus, at equal tokens and parameters.

    python tools/reproduce_mini.py --quick            # one seed, no frontier: about ten minutes on two cores
    python tools/reproduce_mini.py                    # three seeds and the generative frontier: hours
    python tools/reproduce_mini.py --text book.txt

Trains by the two-phase recipe, scores the same held-out text with standard errors, prints which orderings of the paper it
reproduces and which not, with the numbers, and writes OUT/results.md, results.json and report.html. Run again, it goes on
where it stopped. The text is cut into bytes, so perplexity is per byte. What is trained stands in tools/mini/variants.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

# run as a script from any folder, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bd3_megatron.command import CommandParser, run_tool
from bd3_megatron.config.objective import objective_of
from bd3_megatron.errors import RangeError, counted
from bd3_megatron.files import write_text
from bd3_megatron.report.results import ResultChart, ResultSection, ResultSeries, write_results
from tools.mini.variants import QUICK, TRUNK, VARIANTS, WHOLE, MiniSize, base_tree

BUILTIN = "builtin:python-docs"
TEMPERATURES = (0.6, 0.8, 1.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    return run_tool(build_parser(), work, arguments, interrupted="stopped; run the same command again to go on")


def work(options: argparse.Namespace) -> int:
    """Run the miniature."""
    reproduce(options, size_of(options), Path(options.out))
    return 0


def build_parser() -> CommandParser:
    """The arguments of this tool."""
    found = CommandParser(prog="reproduce_mini", description="The paper in miniature.")
    found.add_argument("--quick", action="store_true", help="one seed, few steps, no frontier")
    found.add_argument("--out", default="runs/mini", help="folder of runs and results (default: runs/mini)")
    found.add_argument(
        "--text", nargs="+", default=[BUILTIN], metavar="FILE", help="corpus (default: the quickstart's)"
    )
    found.add_argument("--steps", type=int, help="updates of every model")
    found.add_argument("--seeds", type=int, nargs="+", help="seeds")
    found.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="models (the trunk is always trained)")
    found.add_argument("--num-sequences", type=int, help="held-out sequences scored")
    found.add_argument("--jobs", type=int, default=2, help="runs at once, a core each (default: 2)")
    return found


def size_of(options: argparse.Namespace) -> MiniSize:
    """How much to do.

    Raises:
        RangeError: numbers that leave nothing to do.
    """
    size = QUICK if options.quick else WHOLE
    steps = options.steps or size.steps
    if steps < 10 or options.jobs < 1 or (options.num_sequences is not None and options.num_sequences < 2):
        raise RangeError("the miniature needs --steps 10 or more, --jobs 1 or more and --num-sequences 2 or more.")
    chosen = size.variants if options.variants is None else tuple(dict.fromkeys([*options.variants, TRUNK]))
    return dataclasses.replace(
        size,
        steps=steps,
        # The phases keep their shares of the budget.
        branch_step=steps * size.branch_step // size.steps,
        seeds=tuple(options.seeds) if options.seeds else size.seeds,
        # In the order of the table, whatever order was typed.
        variants=tuple(name for name in VARIANTS if name in chosen),
        num_sequences=options.num_sequences or size.num_sequences,
    )


def reproduce(options: argparse.Namespace, size: MiniSize, out: Path) -> None:
    """Prepare, train, measure, write.

    Raises:
        BD3Error: text that cannot be read, a run that failed.
    """
    # Late: torch and the rest are not needed to print --help.
    import yaml

    from bd3_megatron.data.prepare import PrepareRequest, prepare
    from bd3_megatron.data.sources import text_source
    from tools.mini.runs import Runner, mini_runs

    source = text_source(options.text)
    # Bytes: every model sees the same alphabet and no tokenizer has to be trained or explained.
    prepare(PrepareRequest(out=out / "data", sources={"train": source}, tokenizer="bytes", valid_fraction=0.05))
    config = out / "config.yaml"
    write_text(config, yaml.safe_dump(base_tree(size, data=str(out / "data")), sort_keys=False))
    jobs = mini_runs(size, out)
    # Finished runs are skipped, so that the command can be repeated after an interruption.
    Runner(size, config, options.jobs, progress).run(jobs)
    sections = measured(size, jobs, out, options.jobs)
    markdown = sections_as_markdown(sections)
    write_results(out / "results.json", sections)
    write_text(out / "results.md", markdown)
    print(markdown)
    write_report(size, out)


def measured(size: MiniSize, jobs: Sequence[Any], out: Path, at_once: int) -> list[ResultSection]:
    """The sections of the result: perplexity, verdicts, variance, and in the whole form the frontier."""
    from bd3_megatron.data.loader import TokenDataset
    from tools.mini.measure import INTERVALS, measure_all
    from tools.mini.variants import MINI_SEQ_LEN
    from tools.mini.verdicts import verdicts

    held_out = out / "data" / "valid"
    # In the split's own order: the same sequences for every model.
    dataset = TokenDataset.open(held_out, seq_len=MINI_SEQ_LEN, shuffle=False)
    found, scores, by_interval = {}, {}, []
    # One model of each block size that draws noise levels: AR draws none, and S = 1 masks everything.
    with_variances = ("s4", "s8", "s16", TRUNK)
    for job, one in zip(
        jobs, measure_all(jobs, held_out, size, at_once=at_once, with_variances=with_variances), strict=True
    ):
        key = (job.variant.name, job.seed)
        found[key], scores[key] = one.estimate, one.scores
        progress(f"{job.variant.label}, seed {job.seed}: {one.estimate.sentence()}")
        if one.interval_variances:
            by_interval.append((job.variant.label, *(f"{value:.3f}" for value in one.interval_variances)))
    said = verdicts(scores, size.seeds)
    counts = {word: sum(one.word.startswith(word) for one in said) for word in ("reproduced", "not", "undecided")}
    sections = [
        ResultSection(
            title="The paper in miniature: held-out perplexity",
            text=(_what(size, dataset),),
            columns=("model", "perplexity", "nats per token", "noise error", "text error", "interval at the end"),
            rows=tuple(_row(name, found, jobs, size) for name in size.variants),
        ),
        ResultSection(
            title="Orderings of the paper",
            text=(
                f"{counts['reproduced']} reproduced, {counts['not']} not reproduced, {counts['undecided']} undecided.",
                "Differences are in nats per token, paired over sequences, mean over seeds; +- is one standard error.",
            ),
            columns=("paper", "difference", "in perplexity", "here"),
            rows=tuple(one.cells() for one in said),
        ),
        ResultSection(
            title="Variance of one block's loss by noise interval (nats squared)",
            text=("ModelMeasurement on each trained model; the paper's table 2 trains a model for each interval.",),
            columns=("model", *(f"U[{0 if low < 0.01 else low:g}, {high:g}]" for low, high in INTERVALS)),
            rows=tuple(by_interval),
        ),
    ]
    return [*sections, _frontier(size, jobs, out)] if size.with_frontier and "ar" in size.variants else sections


def _what(size: MiniSize, dataset: Any) -> str:
    from tools.mini.variants import MINI_SEQ_LEN

    tokens = size.steps * size.global_batch_size * MINI_SEQ_LEN
    return (
        f"{tokens / 1e6:.2f}M bytes of training a model ({size.steps} updates; blocks from update {size.branch_step} on), "
        f"{counted(len(size.seeds), 'seed')}, {min(size.num_sequences, dataset.num_rows)} held-out "
        f"sequences of {MINI_SEQ_LEN} bytes, the first byte given. Perplexity is per byte, an upper bound for S > 1."
    )


def _row(name: str, found: dict[Any, Any], jobs: Sequence[Any], size: MiniSize) -> tuple[str, ...]:
    each = [found[name, seed] for seed in size.seeds]
    nll = mean(one.nll_nats_per_token for one in each)
    # Noise is independent between seeds, so its errors add in squares.
    noise = math.sqrt(sum(one.stderr_noise**2 for one in each)) / len(each)
    # The text is the same for every seed: averaging over seeds does not make this error smaller.
    text = mean(one.stderr_text or 0.0 for one in each)
    folder = next(job.folder for job in jobs if job.variant.name == name)
    return (
        VARIANTS[name].label,
        f"{math.exp(nll):.3f}",
        f"{nll:.4f}",
        f"{noise:.4f}",
        f"{text:.4f}",
        _last_interval(folder),
    )


def _last_interval(folder: Path) -> str:
    from bd3_megatron.report.run_record import read_run

    run = read_run(folder)
    low, high = run.latest("noise/interval_beta"), run.latest("noise/interval_omega")
    return "-" if low is None or not objective_of(run.config).has_noise else f"[{low:g}, {high:g}]"


def _frontier(size: MiniSize, jobs: Sequence[Any], out: Path) -> ResultSection:
    """Scored by the AR model of the last seed; texts of the first seed's models."""
    from bd3_megatron.convert.from_checkpoint import convert_checkpoint
    from tools.mini.measure import frontiers

    # Of another seed where there are several: a scorer should not be the model that wrote the text.
    scorer = next(job for job in jobs if job.variant.name == "ar" and job.seed == size.seeds[-1])
    convert_checkpoint(scorer.folder, out / "scorer")
    sampled = [j for j in jobs if j.seed == size.seeds[0] and j.variant.name in ("ar", "s4", "s8", "s16", TRUNK)]
    points = frontiers(sampled, out / "scorer", out / "data" / "tokenizer", num_samples=32, temperatures=TEMPERATURES)
    series = tuple(
        ResultSeries(
            name=label,
            # Perplexity alone can be made small by repeating one word; entropy shows it.
            points=tuple((p["entropy_nats"], p["perplexity"]) for p in found),
            labels=tuple(f"T={p['temperature']:g}" for p in found),
        )
        for label, found in points.items()
    )
    rows = tuple(
        (
            label,
            f"{p['temperature']:g}",
            f"{p['perplexity']:.2f}",
            f"{p['perplexity_stderr'] or 0:.2f}",
            f"{p['entropy_nats']:.3f}",
            f"{p['forwards_per_token']:.2f}",
            f"{p['distinct_2'] or 0:.3f}",
        )
        for label, found in points.items()
        for p in found
    )
    chart = ResultChart(
        title="scored perplexity against entropy",
        x="entropy (nats)",
        y="perplexity per byte",
        series=series,
        scatter=True,
        log_y=True,
    )
    return ResultSection(
        title="Generative frontier",
        text=("Scored by the AR model of another seed; either axis alone can be gamed. First-hitting decoding.",),
        columns=("model", "temperature", "perplexity", "error", "entropy", "forwards a token", "distinct-2"),
        rows=rows,
        charts=(chart,),
    )


def sections_as_markdown(sections: Sequence[ResultSection]) -> str:
    """The sections for reading and for the record."""
    lines: list[str] = []
    for one in sections:
        lines += [f"## {one.title}", "", *one.text, "", f"| {' | '.join(one.columns)} |"]
        lines += [f"|{'---|' * len(one.columns)}", *(f"| {' | '.join(row)} |" for row in one.rows), ""]
    return "\n".join(lines)


def write_report(size: MiniSize, out: Path) -> None:
    """OUT/report.html over the first seed's runs."""
    from tools.report import main as report

    runs = [str(out / f"seed{size.seeds[0]}" / name) for name in size.variants]
    report(
        [
            *runs,
            "-o",
            str(out / "report.html"),
            "--results",
            str(out / "results.json"),
            "--title",
            "The paper in miniature",
        ]
    )


def progress(sentence: str) -> None:
    """A line of progress."""
    print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
