"""How fast a run is: the three figures, the peaks they are measured against, and what a CPU's peak is.

Primary metric: *data* tokens a second and device (L of a sample counts L, whatever rows were run). Beside it always
three ratios to the device's peak, because each alone can be made to look good. With T the seconds of a step, G its
sequences, n devices and p the peak of one device in FLOP/s:

    MFU       convention FLOPs x G / (T n p)   all rows (2 L), allowed pairs, logits of the noisy half; backward = 2 forward.
                                               Comparable with Megatron's; equals its count for the AR baseline
    MFU-min   MIN FLOPs x G / (T n p)          only what the loss can see, at the schedule's expected masked fraction:
                                               credits no row that could have been skipped
    HFU       executed FLOPs x G / (T n p)     what ran: attention 3.5 forwards, tiles, recomputation, padded vocabulary

MFU - MFU-min is work credited though nobody needs it; HFU - MFU-min is work done though nobody needs it. A stack that
skips dead work can show MFU above HFU. The FLOP formulas stand in model/cost_flops.
Refuses to guess: a device that is not in the table by its exact name has no peak, hence no ratio, and a sentence says
how to give one. On CPU the peak is measured (`measure_cpu_peak_tflops`) and is called measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from bd3_megatron.config.schema import Config
from bd3_megatron.model.cost import Execution, Pairs, step_flops

TERA = 1e12
CPU_MATRIX = 768
"""Edge of the matrices of the CPU's peak: large enough for full speed, small enough to stay in cache."""


@dataclass(frozen=True)
class Peak:
    """Dense peaks of one device in TFLOP/s (no structured sparsity), fp32 accumulation, and where they are written."""

    bf16: float
    tf32: float
    fp32: float
    source: str

    def of(self, precision: str) -> float:
        """Peak at "bf16", "tf32" or "fp32"."""
        return {"bf16": self.bf16, "tf32": self.tf32, "fp32": self.fp32}[precision]


_A100 = Peak(312.0, 156.0, 19.5, "NVIDIA A100 Tensor Core GPU datasheet, June 2021")
_H100 = "NVIDIA H100 Tensor Core GPU datasheet (its tensor figures are with sparsity, halved here)"
_H200 = "NVIDIA H200 Tensor Core GPU datasheet (its tensor figures are with sparsity, halved here)"
_BLACKWELL = "NVIDIA Blackwell datasheet (its tensor figures are with sparsity, halved here)"
_GA102 = "NVIDIA Ampere GA102 GPU architecture whitepaper v2.1, dense, FP32 accumulate"

PEAKS: Mapping[str, Peak] = MappingProxyType(
    {
        "NVIDIA A100-SXM4-40GB": _A100,
        "NVIDIA A100-SXM4-80GB": _A100,
        "NVIDIA A100-PCIE-40GB": _A100,
        "NVIDIA A100 80GB PCIe": _A100,
        "NVIDIA H100 80GB HBM3": Peak(989.4, 494.7, 66.9, f"{_H100}, SXM"),
        "NVIDIA H100 PCIe": Peak(756.0, 378.0, 51.2, f"{_H100}, PCIe"),
        "NVIDIA H100 NVL": Peak(835.5, 417.5, 60.0, f"{_H100}, NVL, one card"),
        "NVIDIA H200": Peak(989.4, 494.7, 66.9, f"{_H200}, SXM"),
        "NVIDIA H200 NVL": Peak(835.5, 417.5, 60.0, f"{_H200}, NVL"),
        "NVIDIA B200": Peak(2250.0, 1125.0, 75.0, f"{_BLACKWELL}, HGX B200, one of eight"),
        "NVIDIA GB200": Peak(2500.0, 1250.0, 80.0, f"{_BLACKWELL}, GB200 superchip, one of two"),
        "NVIDIA L40S": Peak(362.05, 183.0, 91.6, "NVIDIA L40S datasheet, without sparsity"),
        "NVIDIA GeForce RTX 3090": Peak(71.0, 35.6, 35.6, _GA102),
        "NVIDIA GeForce RTX 4090": Peak(
            165.2, 82.6, 82.6, "NVIDIA Ada GPU architecture whitepaper v2, FP32 accumulate"
        ),
        "NVIDIA GeForce RTX 5090": Peak(
            209.5, 104.8, 104.8, "NVIDIA RTX Blackwell GPU architecture whitepaper, FP32 accumulate"
        ),
        "NVIDIA RTX A5000": Peak(111.1, 55.6, 27.8, "NVIDIA RTX A5000 datasheet (222.2 with sparsity, halved here)"),
        "NVIDIA RTX A6000": Peak(154.8, 77.4, 38.7, "NVIDIA RTX A6000 datasheet (309.7 with sparsity, halved here)"),
        "AMD Instinct MI300X": Peak(1307.4, 653.7, 163.4, "AMD Instinct MI300X accelerator data sheet"),
    }
)


@dataclass(frozen=True)
class PeakTflops:
    """Peak of one device, or the sentence that says why there is none."""

    tflops: float | None
    source: str
    """Where the number comes from, or, without a number, why there is none and how to give it."""


def peak_of(device_name: str, precision: str, *, given_tflops: float | None = None) -> PeakTflops:
    """Peak of a device by its exact name.

    Args:
        device_name: as the driver reports it.
        precision: bf16, tf32 or fp32.
        given_tflops: throughput.peak_tflops of the configuration; wins over the table.
    """
    if given_tflops is not None:
        return PeakTflops(given_tflops, "throughput.peak_tflops")
    peak = PEAKS.get(device_name)
    if peak is None:
        return PeakTflops(
            None,
            f"the peak of device '{device_name}' is not known, so no MFU is given; "
            f"set throughput.peak_tflops to its dense {precision} peak in TFLOP/s.",
        )
    return PeakTflops(peak.of(precision), peak.source)


def measure_cpu_peak_tflops(
    seconds: float, barrier: Callable[[], None], *, clock: Callable[[], float] = time.perf_counter
) -> float:
    """This rank's share of the machine's matrix-product rate, measured while all ranks do the same.

    The mean over the whole time, not the best round: a lucky round is one in which another rank waited. Ranks should
    average their results; threads are those the training uses.

    Args:
        seconds: how long to multiply.
        barrier: makes all ranks begin together.
        clock: seconds.

    Returns:
        fp32 TFLOP/s of a square product of `CPU_MATRIX`.
    """
    import torch  # the figures are torch-free: reports and planners read them where torch is not wanted

    left, right = (torch.full((CPU_MATRIX, CPU_MATRIX), 0.5) for _ in range(2))
    out = left @ right
    barrier()
    start, rounds = clock(), 0
    while clock() - start < seconds:
        torch.mm(left, right, out=out)
        rounds += 1
    elapsed = clock() - start
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
        block_size, interval: in use, when a curriculum or a search has moved them.
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
        pairs=pairs,
        execution=execution,
    )
    tokens = n * config.data.seq_len / step_seconds
    per_device = 1 / (step_seconds * devices * TERA)
    peak = peak_tflops.tflops
    return Figures(
        data_tokens_per_second=tokens,
        data_tokens_per_second_per_device=tokens / devices,
        model_tflops_per_second=flops.convention * per_device,
        mfu=None if peak is None else flops.convention * per_device / peak,
        mfu_min=None if peak is None else flops.minimum * per_device / peak,
        hfu=None if peak is None else flops.executed * per_device / peak,
        mfu_reason=peak_tflops.source if peak is None else None,
    )
