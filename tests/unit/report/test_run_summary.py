"""How a report names a model: its size, with experts also what computes a row, its objective and its length."""

from __future__ import annotations

from pathlib import Path

import pytest

from bd3_megatron.config.load import load_config
from bd3_megatron.report.run_summary import model_name


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("llada2_mini_16b.yaml", "16.3B-A1.43B S32 L4096"),
        ("7b.yaml", "5.93B S16 L4096"),
        # whose table is as large as its tokenizer, which only the prepared data knows
        ("debug_cpu.yaml", "S4 L64"),
    ],
)
def test_a_model_is_named_by_its_sizes(root: Path, config: str, name: str) -> None:
    loaded = load_config(root / "configs" / config, ["model.vocab_size=32000"] if config == "7b.yaml" else [])
    assert model_name(loaded) == name
