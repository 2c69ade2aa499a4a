"""The figures recomputed by hand, peaks by exact name, and the CPU's measured one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bd3_megatron.cost.pairs import attended_pairs
from bd3_megatron.planner.peaks import PEAKS, PeakTflops, peak_of
from bd3_megatron.train.throughput import CPU_MATRIX, figures, measure_cpu_peak_tflops
from tests.unit.cost.cases import case


def test_figures_of_a_run_are_the_hand_computed_ones() -> None:
    """debug-sized: 3 layers, D 32, 4 heads of 8 (2 key/value), F 48, V 60, L 32, S 4, 8 sequences, 2 devices, 0.5 s."""
    got = figures(case(), 0.5, 0.4, 2, PeakTflops(1e-3, "by hand"))
    q, kv, o, mlp, pair, logit = 2048, 2048, 2048, 9216, 128, 3840
    lin = q + kv + o + mlp
    convention = 3 * (3 * 64 * lin + 3 * 32 * 36 * pair + 32 * logit)
    mu = (1e-3 + 1.0) / 2
    masked = mu * 32
    minimum = 3 * (2 * 60 * lin + 60 * kv + masked * (lin - kv))
    minimum += 3 * ((2 * (32 * 36 - 128) + mu * 32 * 18) * pair + masked * logit)
    # the engine: last clean block dropped; in the last layer k, v of all rows, attention of the noisy stream, the rest of
    # masked rows (0.4); flash backward; logits of masked rows on 64 ids
    executed = 3 * (2 * 60 * lin + 60 * kv + 0.4 * 32 * (lin - kv)) + 3 * 0.4 * 32 * 2 * 32 * 64
    executed += 3.5 * (2 * (32 * 36 - 128) + 32 * 18) * pair
    assert got.data_tokens_per_second == 8 * 32 / 0.5
    assert got.data_tokens_per_second_per_device == 8 * 32 / 0.5 / 2
    assert got.model_tflops_per_second == pytest.approx(8 * convention / 0.5 / 2 / 1e12, rel=1e-12)
    assert got.mfu == pytest.approx(8 * convention / 0.5 / 2 / 1e9, rel=1e-12)
    assert got.mfu_min == pytest.approx(8 * minimum / 0.5 / 2 / 1e9, rel=1e-12)
    assert got.hfu == pytest.approx(8 * executed / 0.5 / 2 / 1e9, rel=1e-12)


def test_a_smaller_step_counts_its_own_sequences() -> None:
    peak = PeakTflops(1.0, "by hand")
    whole, half = figures(case(), 1.0, 0.5, 1, peak), figures(case(), 1.0, 0.5, 1, peak, sequences=4)
    assert half.data_tokens_per_second == whole.data_tokens_per_second / 2


def test_documents_lower_the_credited_work() -> None:
    peak = PeakTflops(1.0, "by hand")
    packed = figures(case(), 1.0, 0.5, 1, peak, pairs=attended_pairs(32, 4, [16, 16]))
    plain = figures(case(), 1.0, 0.5, 1, peak)
    assert packed.mfu is not None and plain.mfu is not None
    assert packed.mfu < plain.mfu
    assert packed.data_tokens_per_second == plain.data_tokens_per_second


def test_metrics_carry_the_three_figures_together() -> None:
    record = figures(case(), 1.0, 0.5, 1, PeakTflops(1.0, "by hand")).metrics()
    assert {"throughput/mfu", "throughput/mfu_min", "throughput/hfu"} <= set(record)
    assert "throughput/data_tokens_per_second_per_device" in record
    assert "throughput/mfu_reason" not in record


def test_an_unknown_device_has_no_ratio_and_a_sentence() -> None:
    record = figures(case(), 1.0, 0.5, 1, peak_of("NVIDIA H300", "bf16")).metrics()
    assert record["throughput/mfu"] is record["throughput/mfu_min"] is record["throughput/hfu"] is None
    assert record["throughput/mfu_reason"] == (
        "the peak of device 'NVIDIA H300' is not known, so no MFU is given; "
        "set throughput.peak_tflops to its dense bf16 peak in TFLOP/s."
    )
    assert isinstance(record["throughput/model_tflops_per_second"], float)


def test_a_device_is_matched_by_its_exact_name() -> None:
    assert peak_of("NVIDIA H200", "bf16").tflops == 989.4
    assert peak_of("NVIDIA H200 SOMETHING", "bf16").tflops is None
    assert peak_of("H200", "bf16").tflops is None


def test_a_given_peak_wins_over_the_table() -> None:
    given = peak_of("NVIDIA H200", "bf16", given_tflops=700.0)
    assert (given.tflops, given.source) == (700.0, "throughput.peak_tflops")


@pytest.mark.parametrize("name", sorted(PEAKS))
def test_every_peak_has_a_source_and_falls_with_precision(name: str) -> None:
    peak = PEAKS[name]
    assert "sheet" in peak.source or "whitepaper" in peak.source
    assert peak.of("bf16") > peak.of("tf32") >= peak.of("fp32") > 0


def test_the_cpu_peak_is_counted_over_the_whole_time_after_the_barrier() -> None:
    ticks: Iterator[float] = iter([0.0, 0.5, 1.0, 1.5, 2.5])
    waited: list[str] = []
    rate = measure_cpu_peak_tflops(1.5, lambda: waited.append("all"), clock=lambda: next(ticks))
    # two products begun before 1.5 s are done at 2.5 s
    assert rate == pytest.approx(2 * 2 * CPU_MATRIX**3 / 2.5 / 1e12)
    assert waited == ["all"]


def test_the_cpu_peak_is_a_real_rate() -> None:
    assert 1e-4 < measure_cpu_peak_tflops(0.05, lambda: None) < 100
