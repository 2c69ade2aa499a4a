"""LLaDA2 folders become ours: fused q, k, v, split and merged experts, sigmoid routing with groups and a bias."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bd3_megatron.checkpoint.layout import step_name
from bd3_megatron.checkpoint.read import open_checkpoint
from bd3_megatron.convert.start_run import start_run
from bd3_megatron.errors import ConversionError
from tests.unit.convert.models import run_config

ROWS, MASK = 72, 70
TREE: dict[str, Any] = {
    "model_type": "llada2_moe",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": ROWS,
    "rms_norm_eps": 1e-6,
    "rope_theta": 600000,
    "partial_rotary_factor": 0.5,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "mask_token_id": MASK,
    "hidden_act": "silu",
}
EXPERTS = {"number": 4, "top_k": 2, "width": 24, "shared_width": 24, "leading_dense_layers": 1, "score": "sigmoid"}
EXPERTS |= {"groups": 2, "group_top_k": 1, "scaling_factor": 2.5, "bias": True}
OURS = {"head_dim": 8, "qk_norm": True, "layer_norm_eps": 1e-6, "rope_base": 600000.0, "rotary_fraction": 0.5}


def llada2(folder: Path, *, merged: bool) -> dict[str, Tensor]:
    """A folder with LLaDA2's names and random weights."""
    torch.manual_seed(2)
    shapes: dict[str, tuple[int, ...]] = {"model.word_embeddings.weight": (ROWS, 32), "lm_head.weight": (ROWS, 32)}
    shapes |= {"model.norm.weight": (32,)}
    for n in range(2):
        layer = f"model.layers.{n}."
        shapes |= {f"{layer}input_layernorm.weight": (32,), f"{layer}post_attention_layernorm.weight": (32,)}
        shapes |= {f"{layer}attention.query_key_value.weight": (64, 32), f"{layer}attention.dense.weight": (32, 32)}
        shapes |= {f"{layer}attention.{k}_layernorm.weight": (8,) for k in ("query", "key")}
    shapes |= {f"model.layers.0.mlp.{p}_proj.weight": (48, 32) for p in ("gate", "up")}
    shapes |= {"model.layers.0.mlp.down_proj.weight": (32, 48)}
    mlp = "model.layers.1.mlp."
    shapes |= {f"{mlp}gate.weight": (4, 32), f"{mlp}gate.expert_bias": (4,)}
    for expert in (*(f"experts.{e}" for e in range(4)), "shared_experts"):
        shapes |= {f"{mlp}{expert}.{p}_proj.weight": (24, 32) for p in ("gate", "up")}
        shapes |= {f"{mlp}{expert}.down_proj.weight": (32, 24)}
    state = {name: 0.2 * torch.randn(shape) for name, shape in shapes.items()}
    stored = dict(state)
    for part in ("gate", "up", "down") if merged else ():
        stored[f"{mlp}experts.{part}_proj"] = torch.stack(
            [stored.pop(f"{mlp}experts.{e}.{part}_proj.weight") for e in range(4)]
        )
    folder.mkdir()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(TREE))
    return state


@pytest.mark.parametrize("merged", [False, True], ids=["split", "merged"])
def test_llada2_starts_a_run(merged: bool, tmp_path: Path) -> None:
    state = llada2(tmp_path / "llada2", merged=merged)
    config = run_config(tmp_path / "run", model={**OURS, "experts": EXPERTS}, diffusion={"block_size": 4})
    report = start_run(tmp_path / "llada2", config, vocab_size=ROWS, mask_id=MASK)
    assert report.max_logit_difference < 1e-5
    found = open_checkpoint(tmp_path / "run" / "checkpoints" / step_name(0))
    mlp = "decoder.layers.1.mlp."
    assert torch.equal(found.tensor(f"{mlp}router.expert_bias"), state["model.layers.1.mlp.gate.expert_bias"])
    first = found.tensor(f"{mlp}experts.linear_fc1.weight")
    both = [state[f"model.layers.1.mlp.experts.3.{p}_proj.weight"] for p in ("gate", "up")]
    assert torch.equal(first[3], torch.cat(both))
    # a group of ours: two query heads, their key head, their value head
    fused = state["model.layers.0.attention.query_key_value.weight"].view(8, 8, 32)
    groups = found.tensor("decoder.layers.0.self_attention.linear_qkv.weight").view(2, 4, 8, 32)
    assert torch.equal(groups[1], fused[[2, 3, 5, 7]])
    # the mask's row is the model's own
    assert torch.equal(
        found.tensor("embedding.word_embeddings.weight")[MASK], state["model.word_embeddings.weight"][MASK]
    )


def test_other_scores_than_llada2_has_are_refused(tmp_path: Path) -> None:
    llada2(tmp_path / "llada2", merged=False)
    path = tmp_path / "llada2" / "config.json"
    path.write_text(json.dumps(TREE | {"score_function": "softmax"}))
    config = run_config(tmp_path / "run", model={**OURS, "experts": EXPERTS}, diffusion={"block_size": 4})
    with pytest.raises(
        ConversionError, match=r"has score_function='softmax', LLaDA2's models have sigmoid; use one of those"
    ):
        start_run(tmp_path / "llada2", config, vocab_size=ROWS, mask_id=MASK)
