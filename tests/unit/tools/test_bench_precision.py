"""The figures of tools/bench/results/precision.md are within the suite's bounds, and rounding the logits is not."""

from __future__ import annotations

import pytest
import torch

from bd3_megatron.config.schema import ModelConfig
from tests import tolerances
from tools.bench import precision

CPU = torch.device("cpu")


@pytest.mark.parametrize("style", ["modern", "paper"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, tolerances.ROWS_BF16), (torch.float32, tolerances.ROWS_FP32)]
)
def test_errors_of_rows_are_rounding(style: str, dtype: torch.dtype, bound: float) -> None:
    model = ModelConfig(hidden_size=128, num_layers=1, num_heads=4, style=style, qk_norm=style == "modern")
    found = list(precision.rows_errors(model, dtype, CPU))
    assert {name for name, *_ in found} >= {"rotary turn", "residual"}
    assert all(0 <= output < bound and 0 < gradient < bound for _, _, output, gradient in found), found


def test_errors_of_the_head_are_rounding_and_those_of_rounded_logits_are_not() -> None:
    sizes = {"rows": 128, "hidden": 64, "vocab": 512, "device": CPU}
    ours, rounded = (precision.head_errors(**sizes, logits_in_bf16=rounds) for rounds in (False, True))
    assert ours.largest_nats < tolerances.HEAD_BF16_NLL
    assert max(ours.hidden, ours.table) < tolerances.HEAD_BF16_GRADIENT
    assert rounded.mean_nats > 100 * ours.largest_nats


def test_the_tool_prints_both_tables(alone: None, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--hidden", "64", "--heads", "4", "--rows", "32", "--vocab", "64"]
    assert precision.main(["--no-note", *sizes]) == 0
    said = capsys.readouterr().out
    assert "| paper | LayerNorm | torch (written out) | bfloat16 |" in said and "| fp32 logits (shipped) |" in said
