"""Machines and cluster files: every device has a peak, a file replaces single numbers, mistakes are sentences."""

from __future__ import annotations

import pytest

from bd3_megatron.errors import ConfigError
from bd3_megatron.planner.machines import ALIASES, DEVICES, GIB, ClusterFile, assumptions, full_name, machine_of
from bd3_megatron.planner.peaks import PEAKS


@pytest.mark.parametrize("gpu", sorted(set(DEVICES) - {"cpu"}))
def test_every_device_a_planner_knows_has_a_peak(gpu: str) -> None:
    assert DEVICES[gpu].device_name in PEAKS


def test_a_site_replaces_single_numbers() -> None:
    site = ClusterFile(gpus_per_node=4, inter_node_gb_per_second=12.5, intra_node_latency_us=0, reserve_gib=0)
    machine = machine_of("a100-80g", peak_tflops=312.0, cluster=site)
    assert (machine.gpus_per_node, machine.inter_node_bytes_per_second) == (4, 12.5e9)
    assert machine.intra_node_latency_seconds == machine.reserve_bytes == 0
    assert machine.memory_bytes == 80 * GIB
    assert machine.intra_node_bytes_per_second == 300e9
    file_peak = machine_of("cpu", peak_tflops=None, cluster=ClusterFile(peak_tflops=0.05, cores=2))
    assert (file_peak.peak_tflops, file_peak.cores) == (0.05, 2)


@pytest.mark.parametrize(("alias", "name"), list(ALIASES.items()))
def test_an_alias_is_the_usual_form_of_a_device(alias: str, name: str) -> None:
    assert machine_of(alias, peak_tflops=1.0) == machine_of(name, peak_tflops=1.0)
    assert full_name(alias) == full_name(name) == name


def test_assumptions_name_every_number_that_matters() -> None:
    text = "\n".join(assumptions(machine_of("a100-80g", peak_tflops=312.0)))
    assert all(part in text for part in ("312 TFLOP/s", "80 GiB", "300 GB/s", "25 GB/s", "8 devices a node"))
    cpu = machine_of("cpu", peak_tflops=0.05)
    assert "all ranks share 1 cores of one host" in "\n".join(assumptions(cpu))


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gpu 'v100' is not known; use a100, a100-40g, .* or rtx5090"):
        machine_of("v100", peak_tflops=1.0)


def test_a_device_without_a_peak_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="gpu 'cpu' has no known peak at this precision; give planner.peak_tflops in a cluster"
    ):
        machine_of("cpu", peak_tflops=None)
