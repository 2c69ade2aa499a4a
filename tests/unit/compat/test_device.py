"""Without CUDA a rank is the CPU, meets the others over gloo, and keeps to its threads."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest
import torch

from bd3_megatron.compat import deepspeed, device
from bd3_megatron.compat.device import raise_open_files_limit

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def without_cuda() -> None:
    if device.cuda_is_there():
        pytest.skip("with CUDA a rank has a GPU")


def test_a_rank_is_the_cpu() -> None:
    assert device.rank_device(3) == CPU
    assert (device.collective_backend(CPU), device.device_name(CPU)) == ("gloo", "cpu")
    assert device.collective_backend(torch.device("cuda", 0)) == "nccl"


def test_a_rank_takes_one_thread_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        device.limit_cpu_threads()
        assert torch.get_num_threads() == 1
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        device.limit_cpu_threads()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


FAULTS = """
import resource, sys, torch
from bd3_megatron.compat.device import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
torch.set_num_threads(1)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(40):
        torch.empty(10_000_000).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def test_large_tensors_do_not_come_as_fresh_pages_every_time() -> None:
    pages = 40_000_000 // os.sysconf("SC_PAGE_SIZE")
    counted = {}
    for how in ("kept", "returned"):
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        counted[how] = int(done.stdout)
    assert counted["returned"] > 30 * pages, "this allocator keeps its pages by itself: keep_freed_memory is not needed"
    assert counted["kept"] < pages


def test_deepspeed_compiles_nothing_on_first_use() -> None:
    loaded = deepspeed.load_deepspeed()
    assert not any(loaded.ops.__compatible_ops__[name] for name in deepspeed.COMPILED_ON_FIRST_USE)
    assert os.environ["DS_ACCELERATOR"] == "cpu"


def test_the_limit_of_open_files_is_raised_to_the_hard_one_and_never_lowered() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        assert raise_open_files_limit(512) == 512
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (512, before[1])
        assert raise_open_files_limit(300) == 512
        assert raise_open_files_limit(before[1] + 1) == before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
