"""Qwen3-MoE folders become ours and go back to the bit, with transformers' own class as the reference implementation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bd3_megatron.config.schema import Config
from bd3_megatron.convert.from_checkpoint import convert_checkpoint
from bd3_megatron.convert.from_hf import read_folder
from bd3_megatron.convert.layouts import export_layout
from bd3_megatron.convert.start_run import start_run
from bd3_megatron.errors import ConversionError
from bd3_megatron.hf.plain_bd3 import plain_model
from tests.tolerances import FOREIGN_LOGITS
from tests.unit.convert.models import run_config
from tests.unit.convert.test_from_ar import OURS, ROWS, SHAPE, causal_logits, saved, tokens

EXPERTS = {"number": 4, "top_k": 2, "width": 24, "leading_dense_layers": 1}


def qwen3_moe(folder: Path, *, tied: bool) -> Any:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    config = transformers.Qwen3MoeConfig(
        **SHAPE, **experts, head_dim=12, tie_word_embeddings=tied, mlp_only_layers=[0], rms_norm_eps=1e-6
    )
    torch.manual_seed(5)
    model = transformers.Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # stacked experts are not drawn by every version
            if "experts" in name or name.endswith("gate.weight"):
                parameter.normal_(0.0, 0.2)
    return saved(model, folder)


def moe_run(run_dir: Path, *, tied: bool, **experts: Any) -> Config:
    model = {"head_dim": 12, "tie_embeddings": tied, "experts": EXPERTS | experts, **OURS}
    return run_config(run_dir, model=model, diffusion={"objective": "ar", "block_size": 4})


def stacked(folder: Path) -> None:
    """The folder's experts as transformers 5 holds them in memory."""
    path = folder / "model.safetensors"
    state = load_file(path)
    prefix = "model.layers.1.mlp.experts."
    parts = {n: [state.pop(f"{prefix}{e}.{n}_proj.weight") for e in range(4)] for n in ("gate", "up", "down")}
    both = [torch.cat(pair) for pair in zip(parts["gate"], parts["up"], strict=True)]
    state |= {f"{prefix}gate_up_proj": torch.stack(both), f"{prefix}down_proj": torch.stack(parts["down"])}
    save_file(state, path, {"format": "pt"})


@pytest.mark.parametrize(("tied", "is_stacked"), [(True, False), (False, True)], ids=["tied", "untied, stacked"])
def test_qwen3_moe_goes_through_a_run_and_back_to_the_bit(tied: bool, is_stacked: bool, tmp_path: Path) -> None:
    source = qwen3_moe(tmp_path / "qwen", tied=tied)
    stored = load_file(tmp_path / "qwen" / "model.safetensors")
    if is_stacked:
        stacked(tmp_path / "qwen")
    report = start_run(tmp_path / "qwen", moe_run(tmp_path / "run", tied=tied), vocab_size=ROWS, mask_id=None)
    assert report.max_logit_difference < 1e-5
    convert_checkpoint(tmp_path / "run", tmp_path / "ours")
    ours = plain_model(*read_folder(tmp_path / "ours"))(tokens())
    assert (ours - causal_logits(source, tokens())).abs().max() <= FOREIGN_LOGITS
    export_layout(tmp_path / "ours", tmp_path / "back", "qwen3", dtype=torch.float32)
    back = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert torch.equal(causal_logits(back, tokens()), causal_logits(source, tokens()))
    written = load_file(tmp_path / "back" / "model.safetensors")
    assert set(written) == set(stored) and all(torch.equal(stored[name], written[name]) for name in stored)


def test_a_model_section_with_other_experts_is_refused(tmp_path: Path) -> None:
    qwen3_moe(tmp_path / "qwen", tied=False)
    with pytest.raises(ConversionError, match=r"does not describe the source; set in model\.experts number=4 \(is 8\)"):
        start_run(tmp_path / "qwen", moe_run(tmp_path / "run", tied=False, number=8), vocab_size=ROWS, mask_id=None)


def test_a_folder_without_one_of_its_experts_is_refused(tmp_path: Path) -> None:
    qwen3_moe(tmp_path / "qwen", tied=False)
    path = tmp_path / "qwen" / "model.safetensors"
    state = load_file(path)
    del state["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(state, path, {"format": "pt"})
    with pytest.raises(
        ConversionError, match=r"lacks 1 parameter \['model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight'\]"
    ):
        start_run(tmp_path / "qwen", moe_run(tmp_path / "run", tied=False), vocab_size=ROWS, mask_id=None)


def test_dense_layers_between_experts_are_refused(tmp_path: Path) -> None:
    qwen3_moe(tmp_path / "qwen", tied=False)
    path = tmp_path / "qwen" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mlp_only_layers": [1]}))
    with pytest.raises(ConversionError, match=r"mlp_only_layers=\[1\]: only leading layers can be dense here"):
        start_run(tmp_path / "qwen", moe_run(tmp_path / "run", tied=False), vocab_size=ROWS, mask_id=None)
