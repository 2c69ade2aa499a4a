"""Dense peak rates of known devices by their exact name, each with its source; an unknown device has none.

Refuses to guess: a device that is not in the table has no peak, hence no MFU, and a sentence says how to give one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

TERA = 1e12


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

# The keys are the exact names that drivers report: a name that is nearly right may be a card with half the units. Makers
# like to print figures with 2:4 sparsity, which training cannot use: those are halved here. A card for desktops runs
# bf16 products with fp32 accumulation at half the rate that is advertised.
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
