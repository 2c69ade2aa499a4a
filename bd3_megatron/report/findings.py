"""What a person should know about a run: each finding is one sentence with its numbers.

This file holds the thresholds. A finding is a hint, not a verdict: it says what was seen and where, and what it usually
means only where there is one usual meaning. The time of reading is an argument.
"""

from __future__ import annotations

import math
from statistics import median

from bd3_megatron.errors import counted
from bd3_megatron.report.run_data import ReportedRun
from bd3_megatron.report.run_record import LOSS_KEY, end_of
from bd3_megatron.report.run_summary import beyond_peak

SPIKE_WINDOW = 20
"""Logged steps a loss is compared with."""
SPIKE_DEVIATIONS = 6.0
"""A spike stands this many median absolute deviations above the median of its window,"""
SPIKE_SHARE = 0.1
"""and at least this share above it."""
SLOW_STEP_FACTOR = 2.0
"""A step is slow when it takes this multiple of the median."""
LOW_MFU = 0.2
SPLIT_LIMITS = {"data_wait": 0.1, "communication": 0.3, "bubble": 0.25, "other": 0.2}
"""Share of a step beyond which a kind of time is worth a sentence."""
SPLIT_WORDS = {
    "data_wait": "waiting for data; more loader processes (data.num_workers) usually help",
    "communication": "communication; a grid with less tensor parallelism or larger micro-batches usually helps",
    "bubble": "pipeline bubbles; more micro-batches a step or interleaved stages (parallel.vpp) usually help",
    "other": "work that no span names",
}
WORSE_ERRORS = 3.0
"""Standard errors by which a held-out likelihood must be worse than the best one."""
SILENT_STEPS = 20.0
"""A run is silent when it has written nothing for this many of its steps,"""
SILENT_SECONDS = 120.0
"""and at least this long."""


def findings(run: ReportedRun, *, now: float) -> list[str]:
    """Sentences about one run, the gravest first.

    Args:
        run: as read.
        now: seconds since the epoch.
    """
    return [
        *_not_finite(run),
        *_skipped(run),
        *_spikes(run),
        *_held_out(run),
        *_slow_steps(run),
        *_utilisation(run),
        *_course(run, now),
    ]


def _not_finite(run: ReportedRun) -> list[str]:
    said = []
    for key, what in (
        (LOSS_KEY, "the loss"),
        ("optim/grad_norm", "the gradient norm"),
        ("eval/perplexity", "the held-out perplexity"),
    ):
        steps = run.not_finite(key)
        if steps:
            said.append(f"{what} was not a number at {counted(len(steps), 'logged step')}, first at step {steps[0]}.")
    return said


def _skipped(run: ReportedRun) -> list[str]:
    said = []
    skipped = run.values("optim/skipped_steps")
    # the counter only grows within a run, so its largest value is the number of updates that were skipped
    if skipped and (count := int(max(skipped.values()))):
        first = next(step for step, value in skipped.items() if value)
        said.append(
            f"{counted(count, 'update')} skipped (gradients that were not finite, or the spike guard), the first by step {first}."
        )
    vetoed, returned = run.events("loss_spike"), run.events("rollback")
    if vetoed:
        said.append(f"the spike guard left out {counted(len(vetoed), 'step')}, first step {vetoed[0].get('step')}.")
    if returned:
        said.append(f"the run went back to a checkpoint {counted(len(returned), 'time')} because of loss spikes.")
    return said


def loss_spikes(run: ReportedRun) -> list[tuple[int, float, float]]:
    """(step, loss, usual loss before it) of every spike; neighbouring steps of one spike count once."""
    losses = list(run.values(LOSS_KEY).items())
    found: list[tuple[int, float, float]] = []
    last = -SPIKE_WINDOW
    for position in range(5, len(losses)):
        window = [value for _, value in losses[max(0, position - SPIKE_WINDOW) : position]]
        # medians: the spikes before this one must not hide it
        usual = median(window)
        spread = median(abs(value - usual) for value in window)
        step, value = losses[position]
        if value > usual + max(SPIKE_DEVIATIONS * spread, SPIKE_SHARE * abs(usual)):
            # a spike takes a few logged steps to come down
            if position - last > 3:
                found.append((step, value, usual))
            last = position
    return found


def _spikes(run: ReportedRun) -> list[str]:
    spikes = loss_spikes(run)
    if not spikes:
        return []
    step, value, usual = max(spikes, key=lambda spike: spike[1] - spike[2])
    return [
        f"the loss rose suddenly {counted(len(spikes), 'time')}; most at step {step}, to {value:.2f} from about "
        f"{usual:.2f} nats per token."
    ]


def _held_out(run: ReportedRun) -> list[str]:
    found = list(run.values("eval/nll_nats_per_token").items())
    if not found:
        return ["no held-out evaluation is recorded; the training loss alone does not show over-fitting."]
    best_step, best = min(found, key=lambda one: one[1])
    last_step, last = found[-1]
    errors = run.values("eval/stderr_noise_nats_per_token")
    # the same text and noise are scored each time, so the text's own spread is common to both
    error = math.hypot(errors.get(best_step, 0.0), errors.get(last_step, 0.0))
    if last - best > max(WORSE_ERRORS * error, 0.005):
        return [
            f"the held-out loss is {last - best:.3f} nats per token above its best, which was at step {best_step}: "
            "over-fitting or divergence."
        ]
    return []


def _slow_steps(run: ReportedRun) -> list[str]:
    seconds = run.values("time/step_seconds")
    # a median of fewer says nothing about what is usual
    if len(seconds) < 8:
        return []
    usual = median(seconds.values())
    # the first logged step of an attempt holds start-up
    begun = {r.get("step", 0) for r in run.events("start")}
    first = {min((s for s in seconds if s > b), default=-1) for b in begun}
    slow = {step: value for step, value in seconds.items() if value > SLOW_STEP_FACTOR * usual and step not in first}
    # one slow step in a hundred is a checkpoint or a neighbour, not a finding
    if len(slow) < max(2, len(seconds) // 100):
        return []
    worst = max(slow, key=lambda step: slow[step])
    return [
        f"{len(slow)} of {len(seconds)} logged steps took more than twice the usual {usual:.3g} s (stragglers, or another "
        f"job on the machine); the slowest {slow[worst]:.3g} s at step {worst}."
    ]


def _utilisation(run: ReportedRun) -> list[str]:
    said = []
    mfu = run.run.utilisation("throughput/mfu")
    if mfu is not None and mfu < LOW_MFU:
        said.append(f"the device is used little: {mfu:.1%} MFU.")
    if (wrong_peak := beyond_peak(run.run)) is not None:
        said.append(wrong_peak)
    split = run.run.time_split()
    total = sum(split.values())
    for kind, limit in SPLIT_LIMITS.items():
        # communication is recorded by axis (communication_dp, ...), and what matters here is their sum
        share = sum(value for name, value in split.items() if name.startswith(kind)) / total if total else 0.0
        if share > limit:
            said.append(f"{share:.0%} of a step goes into {SPLIT_WORDS[kind]}.")
    reason = run.run.latest("throughput/mfu_reason")
    return said if reason is None else [*said, str(reason)]


def _course(run: ReportedRun, now: float) -> list[str]:
    said = []
    if run.run.torn:
        said.append(
            "the last line of metrics.jsonl is incomplete (the job is writing it, or died there); it was left out."
        )
    if run.run.restarts:
        said.append(f"the run was started {run.run.restarts + 1} times.")
    if not run.run.steps:
        ended = end_of(run.run)
        none_yet = "no step is recorded yet, so there are no curves; ask again after log.every_steps steps."
        return [*said, none_yet if ended is None else ended]
    total, status = run.run.config.train.steps, run.run.status
    if status is not None and status.status == "finished":
        return said
    if (ended := end_of(run.run)) is not None:
        return [*said, ended]
    of_total = f" of {total}" if total else ""
    # without a status file the age of the last line tells; how often lines come depends on steps and logging interval
    usual = run.run.typical("time/step_seconds") or 0.0
    silent = now - run.written_at
    every = max(1, run.run.config.log.every_steps)
    if silent > max(SILENT_SECONDS, SILENT_STEPS * usual * every):
        stands = f"the run stands at step {run.num_steps}{of_total} and has written nothing for {_duration(silent)}"
        return [*said, f"{stands}: it may hang, or be gone."]
    return [*said, f"the run goes on: step {run.num_steps}{of_total} when this page was made."]


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
