"""SDAR's layout: its fields, its names, and the mask id that its engines assume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bd3_megatron.checkpoint.layout import step_name
from bd3_megatron.convert.from_checkpoint import convert_checkpoint
from bd3_megatron.convert.sdar import SDAR_MASK_ID, SDAR_VOCAB_SIZE, export_layout
from bd3_megatron.errors import ConversionError
from tests.unit.convert.models import MASK, VOCAB, run_config, whole_checkpoint
from tools import convert_checkpoint as tool


def ours(tmp_path: Path, name: str = "ours", *, vocab_size: int = VOCAB, **settings: Any) -> Path:
    config = run_config(tmp_path / name, **settings)
    path = whole_checkpoint(tmp_path / name / "checkpoints" / step_name(3), config, vocab_size=vocab_size)
    convert_checkpoint(path, tmp_path / f"{name}_hf")
    return tmp_path / f"{name}_hf"


def described(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def test_the_mask_moves_to_where_the_engines_look_for_it(tmp_path: Path) -> None:
    folder = ours(tmp_path)
    remarks = export_layout(folder, tmp_path / "sdar", "sdar", remap_mask=True, dtype=torch.float32)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "sdar" / "model.safetensors")
    assert set(before) == set(after)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert after[name].shape[0] == SDAR_VOCAB_SIZE
        assert torch.equal(after[name][SDAR_MASK_ID], before[name][MASK])
        assert torch.equal(after[name][:MASK], before[name][:MASK])
        assert not after[name][MASK:SDAR_MASK_ID].count_nonzero()
    config = described(tmp_path / "sdar")
    assert config["architectures"] == ["SDARForCausalLM"] and config["model_type"] == "sdar"
    assert (config["mask_token_id"], config["vocab_size"], config["block_size"]) == (SDAR_MASK_ID, SDAR_VOCAB_SIZE, 4)
    forbidden = described(tmp_path / "sdar", "generation_config.json")["suppress_tokens"]
    assert forbidden == [i for i in range(MASK, SDAR_VOCAB_SIZE) if i != SDAR_MASK_ID]
    assert any("the mask moved from 60 to 151669" in remark for remark in remarks)


def test_a_mask_elsewhere_is_refused_unless_it_may_move(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="mask_token_id=60, but SGLang and LMDeploy assume 151669.*--remap-mask"):
        export_layout(ours(tmp_path), tmp_path / "sdar", "sdar")
    assert not (tmp_path / "sdar").exists()


@pytest.mark.parametrize(
    ("model", "match"),
    [
        ({"qk_norm": False}, "qk_norm=false cannot be written as sdar"),
        ({"style": "paper", "num_kv_heads": 4, "qk_norm": False}, "style=paper cannot be written as sdar"),
    ],
)
def test_a_model_it_cannot_express_is_refused(model: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=match):
        export_layout(ours(tmp_path, model=model), tmp_path / "sdar", "sdar", remap_mask=True)


def test_shifted_logits_are_refused(tmp_path: Path) -> None:
    folder = ours(tmp_path, diffusion={"objective": "ar"})
    with pytest.raises(ConversionError, match="objective=ar has shifted logits"):
        export_layout(folder, tmp_path / "sdar", "sdar")


def test_the_tool_writes_the_layout_from_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours(tmp_path)
    arguments = [str(tmp_path / "ours"), "--out", str(tmp_path / "sdar"), "--layout", "sdar"]
    assert tool.main(arguments) == 2
    assert "--remap-mask" in capsys.readouterr().err
    assert tool.main([*arguments, "--remap-mask", "--dtype", "bf16"]) == 0
    assert described(tmp_path / "sdar")["torch_dtype"] == "bfloat16"
    assert tool.main([str(tmp_path / "ours_hf"), "--out", str(tmp_path / "qwen"), "--layout", "qwen3"]) == 0
    assert described(tmp_path / "qwen")["architectures"] == ["Qwen3ForCausalLM"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "ours_hf", "qwen", "sdar"]
