"""Kernels on rows: each within rounding of its formula in every dtype, and a wrong one is found before the first step."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bd3_megatron.config.experts import ExpertsConfig
from bd3_megatron.config.schema import ModelConfig
from bd3_megatron.errors import BackendError
from bd3_megatron.model import activation, experts, norms, rotary
from bd3_megatron.model.row_kernels import check_row_kernels, row_kernels, worst_error
from tests import tolerances

CPU = torch.device("cpu")
MODERN = ModelConfig(hidden_size=96, num_layers=1, num_heads=6, style="modern", qk_norm=True)
MIXTURE = replace(MODERN, experts=ExpertsConfig(number=8, top_k=2, width=48))
PAPER = ModelConfig(hidden_size=96, num_layers=1, num_heads=6, style="paper")


@pytest.mark.parametrize("model", [MODERN, MIXTURE, PAPER], ids=["modern", "mixture", "paper"])
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [
        (torch.float64, tolerances.EXACT_FP64),
        (torch.float32, tolerances.ROWS_FP32),
        (torch.bfloat16, tolerances.ROWS_BF16),
    ],
)
def test_outputs_and_gradients_are_within_rounding(model: ModelConfig, dtype: torch.dtype, bound: float) -> None:
    kernels = row_kernels(model, dtype=dtype, device=CPU)
    errors = {one.name: worst_error(one) for one in kernels}
    assert max(errors.values()) < bound, errors
    assert check_row_kernels(kernels).count(" by torch") == len(kernels)


def turned_in_bf16(heads: Tensor, turn: Tensor, sign: int) -> Tensor:
    cosine, sine = turn.bfloat16().to(heads.dtype)
    return heads * cosine + sign * heads.roll(heads.shape[-1] // 2, -1) * sine


def never_turned_back(heads: Tensor, turn: Tensor, sign: int) -> Tensor:
    return heads * turn[0] + heads.roll(heads.shape[-1] // 2, -1) * turn[1]


def without_bias(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, None, eps) + 0 * bias


def with_another_eps(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 10 * eps)


def by_the_next_expert(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return torch.cat(
        [F.linear(part, matrix) for part, matrix in zip(rows.split(counts.tolist()), weight.roll(1, 0), strict=True)]
    )


def swapped(inner: Tensor) -> Tensor:
    return inner[..., :16] * F.silu(inner[..., 16:])


@pytest.mark.parametrize(
    ("model", "owner", "name", "wrong", "said"),
    [
        (MODERN, rotary, "_turn", turned_in_bf16, "rotary turn by torch is off by"),
        (MODERN, rotary, "_turn", never_turned_back, "rotary turn by torch is off by"),
        (MODERN, rotary, "_turn", lambda heads, turn, sign: heads * float("nan"), "off by nan"),
        (MODERN, norms._RmsNorm, "apply", with_another_eps, "RMSNorm by torch .* is off by"),
        (PAPER, norms._LayerNorm, "apply", without_bias, "LayerNorm by torch .* is off by"),
        (MIXTURE, experts, "looped_product", by_the_next_expert, "experts by torch, one after another is off by"),
        (MODERN, activation._SwiGlu, "apply", swapped, "SwiGLU by torch .* is off by"),
    ],
)
def test_a_wrong_kernel_is_found(
    monkeypatch: pytest.MonkeyPatch, model: ModelConfig, owner: object, name: str, wrong: object, said: str
) -> None:
    kernels = row_kernels(model, dtype=torch.float32, device=CPU)
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(BackendError, match=said):
        check_row_kernels(kernels)


def test_the_interpreted_rotary_kernel_equals_the_formula(root: Path) -> None:
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "tests.unit.model.interpreted_rotary"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fp32, bf16 = map(float, done.stdout.split())
    # the interpreter cuts the bits of bf16 off instead of rounding them
    assert fp32 < tolerances.ROWS_FP32 and bf16 < 2**-7
