"""Measures what tools/estimate_variance.py reports; see there for what is measured and how."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bd3_megatron.checkpoint.describe import config_of
from bd3_megatron.checkpoint.read import open_checkpoint
from bd3_megatron.config.load import with_later
from bd3_megatron.config.objective import objective_of
from bd3_megatron.convert.from_checkpoint import describe_model, find_checkpoint
from bd3_megatron.convert.name_table import NameTable
from bd3_megatron.convert.plain_source import CheckpointSource
from bd3_megatron.data.loader import TokenDataset
from bd3_megatron.data.vocabulary import data_folder
from bd3_megatron.diffusion.corrupt import corrupt
from bd3_megatron.diffusion.interval_search import FULL, FULL_MASKING, Moments, candidates, least_varying, passes, score
from bd3_megatron.diffusion.noise_level import Interval, noise_levels
from bd3_megatron.diffusion.noise_schedule import noise_schedule
from bd3_megatron.diffusion.token_nll import block_losses, masked_token_nll
from bd3_megatron.errors import DataError, LaunchError, UsageError
from bd3_megatron.files import write_text
from bd3_megatron.hf.plain_bd3 import PlainBD3, plain_model
from bd3_megatron.report.chart import Chart, Series, line_chart, stroke
from bd3_megatron.train.dataset import open_data
from tools.bench import harness

# The search must not choose by the very noise that it is then scored on.
SCORE_SEED, SEARCH_SEED = 1, 2
LINEAR = "loglinear"
OTHER_SCHEDULES = ("cosine", "square", "sqrt", "log")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One trained model and what it is measured on."""

    model: PlainBD3
    rows: TokenDataset
    """Held out, in their own order."""
    mask_id: int
    block_size: int
    length: int
    step: int
    batch_rows: int
    never_mask_first: bool

    def losses(
        self, numbers: range, drawn_from: Interval, schedule: str, *, seed: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(block losses, noise levels, whether a block has tokens) of some held-out rows, [B, K]; strata are a batch's."""
        clean = self.rows.batch_for(torch.arange(numbers.start, numbers.stop))
        t_BK = noise_levels(
            seed,
            clean.index_B,
            num_blocks=self.length // self.block_size,
            interval=drawn_from,
            group_size=self.batch_rows,
        )
        noisy = corrupt(
            clean.tokens_BL,
            t_BK,
            index_B=clean.index_B,
            seed=seed,
            mask_id=self.mask_id,
            schedule=noise_schedule(schedule),
            never_mask_first=self.never_mask_first,
            is_padding_BL=clean.is_padding_BL,
        )
        logits_BLV = self.model(noisy.noisy_BL, noisy.clean_BL, clean.document_id_BL)
        nll_BL = masked_token_nll(logits_BLV, noisy.clean_BL, mask_id=self.mask_id)
        return block_losses(nll_BL, noisy), t_BK, noisy.countable_BL.unflatten(1, (-1, self.block_size)).any(dim=2)


@dataclass(frozen=True)
class NoiseVariance:
    """What was measured of one way to draw noise."""

    schedule: str
    interval: Interval
    loss: float
    """Mean of block losses, nats per token; a bound on the model's NLL only over the full interval."""
    loss_variance: float
    gradient_variance: float

    @property
    def name(self) -> str:
        """For the table: the schedule, and the interval where it is clipped."""
        is_linear, is_whole = self.schedule == LINEAR, self.interval == FULL
        shown = f"[{self.interval.beta:g}, {self.interval.omega:g}]"
        if is_linear:
            return "linear" if is_whole else f"clipped {shown}"
        return self.schedule if is_whole else f"{self.schedule} {shown}"


def _train(options: argparse.Namespace) -> list[Path]:
    """One short run for each block size, in folders of their own, on one copy of the data."""
    folders: list[Path] = []
    for size in options.block_size:
        folder = options.out / f"S{size}"
        overrides = [f"run.dir={folder}", f"diffusion.block_size={size}", f"train.steps={options.steps}"]
        # One copy of the data: the second run reads what the first prepared.
        if folders and (folders[0] / "data").is_dir():
            overrides.append(f"data.path={folders[0] / 'data'}")
        typed = with_later(overrides, options.set)
        command = [sys.executable, "-m", "bd3_megatron.cli", "train", options.train, *typed]
        code = subprocess.run(command).returncode
        if code:
            raise LaunchError(f"training at block_size={size} ended with exit code {code}; see its own words above.")
        folders.append(folder)
    return folders


def open_subject(folder: Path, batch_rows: int) -> Subject:
    """The newest checkpoint of a run with its held-out rows.

    Raises:
        CheckpointError: there is none.
        DataError: an autoregressive run, or no held-out rows.
    """
    reader = open_checkpoint(find_checkpoint(folder))
    config, manifest = config_of(reader.manifest, reader.folder), reader.manifest
    if not objective_of(config).has_noise or manifest.mask_id is None:
        raise DataError(f"'{folder}' is an autoregressive run, which draws no noise; give a block-diffusion run.")
    data = open_data(config)
    if data.valid is None:
        raise DataError(f"'{data_folder(config)}' holds no held-out rows; prepare it with a valid split.")
    described, _ = describe_model(config, manifest, data_folder(config))
    which = "ema" if "ema" in reader.kinds() else "model"
    source = CheckpointSource(reader, NameTable(config.model, manifest.vocab_size), which)
    return Subject(
        model=plain_model(described, {name: source.tensor(name).clone() for name in source.names()}),
        rows=data.valid,
        mask_id=manifest.mask_id,
        block_size=described.block_size,
        length=config.data.seq_len,
        step=manifest.step,
        batch_rows=min(batch_rows, data.valid.num_rows),
        never_mask_first=config.diffusion.never_mask_first,
    )


def variances_of(subject: Subject, *, batches: int, gradient_batches: int) -> list[NoiseVariance]:
    """Every candidate interval under the linear schedule, then the other schedules over the full interval."""
    # Every candidate is scored from draws of its own, with the same rows and the same uniform numbers.
    ways = [(LINEAR, interval) for interval in candidates(subject.block_size)]
    if subject.block_size > 1:
        ways += [(schedule, FULL) for schedule in OTHER_SCHEDULES]
    return [variance_of_one(subject, schedule, i, batches, gradient_batches) for schedule, i in ways]


def variance_of_one(
    subject: Subject, schedule: str, interval: Interval, batches: int, gradient_batches: int
) -> NoiseVariance:
    """One way to draw noise, on `batches` batches for losses and `gradient_batches` for gradients."""
    losses = []
    with torch.no_grad():
        for numbers in _batches(subject, batches):
            loss_BK, _, is_counted_BK = subject.losses(numbers, interval, schedule, seed=SCORE_SEED)
            # Blocks that are all padding have no loss.
            losses.append(loss_BK[is_counted_BK].double())
    together = torch.cat(losses)
    gradient = _gradient_variance(subject, schedule, interval, gradient_batches)
    return NoiseVariance(schedule, interval, together.mean().item(), together.var().item(), gradient)


def _gradient_variance(subject: Subject, schedule: str, interval: Interval, batches: int) -> float:
    """Trace of the covariance of one batch's gradient; nan for fewer than two batches."""
    parameters = list(subject.model.parameters())
    total = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    squares = 0.0
    for numbers in _batches(subject, batches):
        loss_BK, _, is_counted_BK = subject.losses(numbers, interval, schedule, seed=SCORE_SEED)
        # The mean over the batch's blocks, as a training step takes it.
        grads = torch.autograd.grad(loss_BK[is_counted_BK].mean(), parameters)
        for whole, grad in zip(total, grads, strict=True):
            whole += grad
            squares += grad.double().square().sum().item()
    if batches < 2:
        return float("nan")
    mean_square = sum((whole / batches).square().sum().item() for whole in total)
    # The unbiased trace of the covariance: no gradient is kept, only sums.
    return (squares - batches * mean_square) / (batches - 1)


def searched_interval(subject: Subject, *, batches: int) -> Interval:
    """What the interval search chooses, from passes of its own on rows behind the measured ones."""
    intervals = candidates(subject.block_size)
    moments = Moments.none(len(intervals))
    with torch.no_grad():
        for drawn_from in passes(intervals):
            # Rows behind the measured ones, which the scores above have not used.
            for numbers in _batches(subject, batches, first=batches):
                loss_BK, t_BK, is_counted_BK = subject.losses(numbers, drawn_from, LINEAR, seed=SEARCH_SEED)
                found = score(loss_BK, t_BK, intervals=intervals, drawn_from=drawn_from, is_counted_BK=is_counted_BK)
                moments = moments.merge(found)
    return intervals[least_varying(intervals, moments)]


def _batches(subject: Subject, batches: int, *, first: int = 0) -> Iterator[range]:
    """Numbers of rows; beyond the held-out ones they come again, with other noise."""
    for number in range(first, first + batches):
        yield range(number * subject.batch_rows, (number + 1) * subject.batch_rows)


def variance_markdown(
    subject: Subject, findings: Sequence[NoiseVariance], chosen: Interval, options: argparse.Namespace
) -> str:
    """A table of what people compare, and a line on what the search found."""
    linear = findings[0]
    clipped = [f for f in findings if f.schedule == LINEAR]
    best = min(clipped, key=lambda f: f.loss_variance)
    picked = next(f for f in clipped if f.interval == chosen)
    shown = {FULL, FULL_MASKING, Interval(0.45, 0.95), Interval(0.3, 0.8), best.interval, chosen}
    rows = [
        [f.name, f"{f.loss:.3f}", *_against(f.loss_variance, linear.loss_variance)]
        + [*_against(f.gradient_variance, linear.gradient_variance)]
        for f in findings
        if f.schedule != LINEAR or f.interval in shown
    ]
    header = ["noise", "loss", "variance of a block's loss", "linear / it", "variance of a gradient", "linear / it"]
    # How much the search gives away, by choosing on other rows and with a single set of passes.
    excess = 100 * (picked.loss_variance / best.loss_variance - 1)
    blocks = options.batches * subject.batch_rows * (subject.length // subject.block_size)
    return "\n\n".join(
        [
            f"S = {subject.block_size}, L = {subject.length}, after {subject.step} steps; {blocks} blocks, "
            f"{options.gradient_batches} gradients of {subject.batch_rows} rows; {len(clipped)} candidate intervals",
            harness.table(header, rows),
            f"The search chose {picked.name}, whose variance is {excess:.1f} % above that of the best candidate, {best.name}.",
        ]
    )


def _against(variance: float, linear: float) -> tuple[str, str]:
    return f"{variance:.4g}", f"{linear / variance:.2f}x" if variance else "-"


def variance_charts(subject: Subject, findings: Sequence[NoiseVariance]) -> dict[str, Chart]:
    """{file name: chart} of both variances by interval, a line for each width of the candidates."""
    charts = {}
    for what, unit in (("loss", "nats²"), ("gradient", "nats²")):
        by_width: dict[str, list[tuple[float, float]]] = {}
        for finding in findings:
            interval, value = finding.interval, getattr(finding, f"{what}_variance")
            # Not equal to itself: a NaN of too few gradient batches.
            if finding.schedule == LINEAR and value == value:
                beta = 0.0 if interval.beta == FULL.beta else interval.beta
                by_width.setdefault(f"width {interval.omega - beta:.1f}", []).append((beta, value))
        title = f"Variance of a {'block' if what == 'loss' else 'batch'}'s {what}, S = {subject.block_size}"
        series = [Series(name, sorted(points), stroke(i)) for i, (name, points) in enumerate(sorted(by_width.items()))]
        charts[f"variance_of_{what}_s{subject.block_size}"] = line_chart(
            title, "start of the noise interval", f"variance, {unit}", series, from_zero=True, legend=True
        )
    return charts


def estimate_variances(options: argparse.Namespace, given: Sequence[str]) -> None:
    """Measure, print, plot.

    Args:
        options: of tools/estimate_variance.py.
        given: its command line, for the note.

    Raises:
        BD3Error: no run, a run that cannot be measured, training that failed.
    """
    if min(options.batches, options.batch_rows, options.threads, options.steps) < 1 or options.gradient_batches < 0:
        raise UsageError(
            "--batches, --batch-rows, --steps and --threads must be at least 1, --gradient-batches at least 0."
        )
    torch.set_num_threads(options.threads)
    options.results = options.results or harness.RESULTS
    folders = _train(options) if options.train is not None else options.runs
    if not folders:
        raise DataError("no run was named; give a run's folder, or --train CONFIG to make one.")
    bodies: list[str] = []
    charts: dict[str, Chart] = {}
    for folder in folders:
        subject = open_subject(folder, options.batch_rows)
        found = variances_of(subject, batches=options.batches, gradient_batches=options.gradient_batches)
        chosen = searched_interval(subject, batches=options.batches)
        bodies.append(variance_markdown(subject, found, chosen, options))
        charts |= variance_charts(subject, found)
    title = "variance of losses and gradients by noise interval and block size"
    command = f"python -m tools.estimate_variance {' '.join(harness.shown_arguments(given))}".rstrip()
    harness.write_note(command, harness.Note(title, "\n\n".join(bodies)), options)
    for name, chart in charts.items() if options.plots or not options.no_note else ():
        write_text((options.plots or options.results) / f"{name}.svg", chart.file())
