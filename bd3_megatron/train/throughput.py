"""How fast a run is: data tokens a second, and three ratios to the device's peak.

Contract: T the seconds of a step, G its sequences, n devices, p the peak of one device in FLOP/s, ratio = FLOPs x G / (T n p).
A ratio alone can be made to look good, so all three are given: MFU of convention FLOPs, MFU-min of what the loss can see,
HFU of what was executed. The FLOP formulas stand in cost/flops.
Refuses to guess: a device that is not in the table by its exact name has no peak, hence no ratio, and a sentence says how
to give one. On CPU the peak is measured (`measure_cpu_peak_tflops`) and is called measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from bd3_megatron.config.schema import Config
from bd3_megatron.cost.flops import Execution
from bd3_megatron.cost.pairs import Pairs
from bd3_megatron.cost.step import step_flops
from bd3_megatron.diffusion.axes import ObjectiveAxes
from bd3_megatron.planner.peaks import TERA, PeakTflops

CPU_MATRIX = 768
"""Edge of the matrices of the CPU's peak: large enough for full speed, small enough to stay in cache."""


def measure_cpu_peak_tflops(
    seconds: float,
    barrier: Callable[[], None],
    *,
    clock: Callable[[], float] = time.perf_counter,
    precision: str = "fp32",
) -> float:
    """This rank's share of the machine's matrix-product rate, measured while all ranks do the same.

    Ranks should average their results; threads are those the training uses.

    Args:
        seconds: how long to multiply.
        barrier: makes all ranks begin together.
        clock: seconds.
        precision: fp32 or bf16, as training multiplies; the rates of a CPU differ by a factor of two and more.

    Returns:
        TFLOP/s of a square product of `CPU_MATRIX`.
    """
    import torch  # the figures are torch-free: reports and planners read them where torch is not wanted

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.full((CPU_MATRIX, CPU_MATRIX), 0.5, dtype=dtype) for _ in range(2))
    out = left @ right
    barrier()
    start, rounds = clock(), 0
    # The whole time and not the best round: a lucky round is one in which another rank waited.
    while clock() - start < seconds:
        torch.mm(left, right, out=out)
        rounds += 1
    elapsed = clock() - start
    # A square product of edge m costs 2 m^3 FLOPs.
    return max(rounds, 1) * 2 * CPU_MATRIX**3 / elapsed / TERA


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The figures of one step or of the mean of several; ratios are None where the peak is not known."""

    data_tokens_per_second: float
    """Clean tokens, over all devices."""
    data_tokens_per_second_per_device: float
    model_tflops_per_second: float
    """Convention FLOPs, per device."""
    mfu: float | None
    mfu_min: float | None
    hfu: float | None
    mfu_reason: str | None = None
    """Why the ratios are None."""

    def metrics(self) -> dict[str, float | str | None]:
        """The record's keys and values; the reason only where there is one."""
        record: dict[str, float | str | None] = {
            "throughput/data_tokens_per_second": self.data_tokens_per_second,
            "throughput/data_tokens_per_second_per_device": self.data_tokens_per_second_per_device,
            "throughput/model_tflops_per_second": self.model_tflops_per_second,
            "throughput/mfu": self.mfu,
            "throughput/mfu_min": self.mfu_min,
            "throughput/hfu": self.hfu,
        }
        return record if self.mfu_reason is None else record | {"throughput/mfu_reason": self.mfu_reason}


def figures(
    config: Config,
    step_seconds: float,
    masked_fraction: float,
    devices: int,
    peak_tflops: PeakTflops,
    *,
    sequences: int | None = None,
    block_size: int | None = None,
    interval: tuple[float, float] | None = None,
    axes: ObjectiveAxes | None = None,
    pairs: Pairs | None = None,
    execution: Execution | None = None,
) -> Figures:
    """The figures of a step.

    Args:
        config: the resolved configuration, model.vocab_size set.
        step_seconds: duration T of the step (mean over steps), > 0.
        masked_fraction: measured share of masked noisy positions.
        devices: ranks that took part.
        peak_tflops: of one device.
        sequences: G of the step; None: train.global_batch_size.
        block_size, interval, axes: in use, when a curriculum or a search has moved them.
        pairs: mean allowed pairs a sequence, with isolated documents.
        execution: what ran; None: what the engine does for this configuration.
    """
    n = config.train.global_batch_size if sequences is None else sequences
    flops = step_flops(
        config,
        masked_fraction,
        sequences=n,
        block_size=block_size,
        interval=interval,
        axes=axes,
        pairs=pairs,
        execution=execution,
    )
    # Data tokens: L of a sample counts L, whatever rows were run for it.
    tokens = n * config.data.seq_len / step_seconds
    per_device = 1 / (step_seconds * devices * TERA)
    peak = peak_tflops.tflops
    return Figures(
        data_tokens_per_second=tokens,
        data_tokens_per_second_per_device=tokens / devices,
        model_tflops_per_second=flops.convention * per_device,
        # All rows (2 L), allowed pairs, logits of the noisy half, backward = 2 forward: comparable with Megatron's
        # count, and equal to it for the autoregressive baseline.
        mfu=None if peak is None else flops.convention * per_device / peak,
        # Only what the loss can see, at the schedule's expected masked fraction: no row is credited that could have
        # been skipped. MFU - MFU-min is credit for work that nobody needs.
        mfu_min=None if peak is None else flops.minimum * per_device / peak,
        # What ran: attention 3.5 forwards, tiles, recomputation, padded vocabulary. A stack that skips dead work can
        # show MFU above HFU.
        hfu=None if peak is None else flops.executed * per_device / peak,
        mfu_reason=peak_tflops.source if peak is None else None,
    )
