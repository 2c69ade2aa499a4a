"""The Triton backend refuses with reasons; its tables have the shapes its kernels read; interpreted, it is the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bd3_megatron.attention import machine, triton_pair
from bd3_megatron.attention.request import AttentionRequest
from bd3_megatron.attention.triton_pair import Tiles
from bd3_megatron.attention.visibility import Visibility
from bd3_megatron.errors import BackendError
from tests.tolerances import FAST_PATH_FP32
from tests.unit.attention.problems import problem, random_documents

REQUEST = AttentionRequest(
    device_type="cuda",
    dtype=torch.bfloat16,
    batch=1,
    rows=Visibility.pair(64, 4),
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
)
CPU = torch.device("cpu")


def test_refusals_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "needs a CUDA device, not 'cpu'" in str(triton_pair.refuse(replace(REQUEST, device_type="cpu")))
    monkeypatch.setattr(machine, "has", lambda package: True)
    assert triton_pair.refuse(REQUEST) is None
    assert "no kernel for torch.float64" in str(triton_pair.refuse(replace(REQUEST, dtype=torch.float64)))
    assert "compiles for minutes in fp32" in str(triton_pair.refuse(replace(REQUEST, dtype=torch.float32)))
    assert "no kernel for head_dim=80" in str(triton_pair.refuse(replace(REQUEST, head_dim=80)))
    monkeypatch.setattr(machine, "has", lambda package: False)
    assert "Triton, which is not installed" in str(triton_pair.refuse(REQUEST))
    p = problem(Visibility.pair(8, 4), head_dim=16)
    with pytest.raises(BackendError, match="Triton, which is not installed"):
        triton_pair.attend(p.noisy, p.clean, p.visibility, scale=1.0)


def test_tables_have_a_row_for_every_row_and_a_turn_for_every_tile() -> None:
    visibility = Visibility(4, 64, ((0, 64),), ((0, 60),), ((0, 60),), random_documents(64, 1))
    table = triton_pair.tables(visibility, CPU, Tiles(16, 32))
    assert table.packed and table.noisy_clean.shape == (2, 2, 64) and table.clean_clean.shape == (2, 2, 60)
    assert table.pair_turns.shape == (2, 4, 4) and table.own_turns.shape == (2, 4, 4)
    assert table.clean_keys_noisy.shape == table.clean_keys_clean.shape == table.noisy_keys.shape == (2, 2, 4)
    assert all(t.dtype == torch.int32 for t in vars(table).values() if isinstance(t, torch.Tensor))


def test_a_visibility_keeps_its_tables() -> None:
    visibility = Visibility.pair(64, 4)
    first, again = (triton_pair.tables(visibility, CPU) for _ in range(2))
    assert first is again and not first.packed
    assert triton_pair.tables(visibility, CPU, Tiles(keys=32)) is not first


@pytest.mark.parametrize(("length", "block_size"), [(24, 3), (16, 16)])
def test_interpreted_kernels_equal_the_reference(length: int, block_size: int, root: Path) -> None:
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "tests.unit.attention.interpreted_triton", str(length), str(block_size)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < FAST_PATH_FP32
