"""Mixtures of experts in the layouts of SDAR-MoE and LLaDA2: there and back to the bit, and what they cannot express."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from bd3_megatron.checkpoint.layout import step_name
from bd3_megatron.checkpoint.read import open_checkpoint
from bd3_megatron.convert.from_checkpoint import convert_checkpoint
from bd3_megatron.convert.layouts import export_layout
from bd3_megatron.convert.start_run import start_run
from bd3_megatron.errors import ConversionError
from bd3_megatron.model.partition import EMBEDDING, HEAD_WEIGHT
from tests.unit.convert import test_llada2
from tests.unit.convert.models import MASK, VOCAB, run_config, whole_checkpoint

SOFTMAX = {"head_dim": 8, "qk_norm": True, "experts": {"number": 4, "top_k": 2, "width": 24}}
LLADA2 = {**test_llada2.OURS, "experts": test_llada2.EXPERTS}


def ours(tmp_path: Path, model: dict[str, Any]) -> Path:
    """An exported folder of random weights."""
    config = run_config(tmp_path / "ours", model=model)
    path = whole_checkpoint(tmp_path / "ours" / "checkpoints" / step_name(3), config, common=2.0)
    convert_checkpoint(path, tmp_path / "ours_hf")
    return tmp_path / "ours_hf"


@pytest.mark.parametrize(
    ("layout", "model", "model_type"),
    [("sdar", SOFTMAX, "sdar_moe"), ("llada2", LLADA2, "llada2_moe")],
    ids=["sdar_moe", "llada2"],
)
def test_a_mixture_goes_out_and_comes_back_to_the_bit(
    layout: str, model: dict[str, Any], model_type: str, tmp_path: Path, own_remote_code: None
) -> None:
    folder = ours(tmp_path, model)
    export_layout(folder, tmp_path / "theirs", layout, mask="kept", dtype=torch.float32)
    described = transformers.AutoConfig.from_pretrained(tmp_path / "theirs", trust_remote_code=True)
    assert (described.model_type, described.num_experts, described.num_experts_per_tok) == (model_type, 4, 2)
    back = run_config(tmp_path / "back", model=model)
    report = start_run(tmp_path / "theirs", back, vocab_size=VOCAB, mask_id=MASK)
    assert report.model_type == model_type
    first = open_checkpoint(tmp_path / "ours" / "checkpoints" / step_name(3))
    second = open_checkpoint(tmp_path / "back" / "checkpoints" / step_name(0))
    assert set(first.names()) == set(second.names())
    for name in first.names():
        before, after = first.tensor(name), second.tensor(name)
        # rows beyond the vocabulary mean nothing, and the mask's of the output table is made silent
        if name in (EMBEDDING, HEAD_WEIGHT):
            before, after = before[:MASK], after[:MASK]
        assert torch.equal(before, after), name


def test_the_names_are_those_of_llada2(tmp_path: Path) -> None:
    export_layout(ours(tmp_path, LLADA2), tmp_path / "theirs", "llada2", mask="kept")
    theirs = test_llada2.llada2(tmp_path / "random", merged=False)
    stored = load_file(tmp_path / "theirs" / "model.safetensors")
    rows = {"model.word_embeddings.weight", "lm_head.weight"}
    assert {n: t.shape for n, t in stored.items() if n not in rows} == {
        n: t.shape for n, t in theirs.items() if n not in rows
    }
    written = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert written["architectures"] == ["LLaDA2MoeModelLM"]
    shapes = {key: value for key, value in test_llada2.TREE.items() if key not in ("vocab_size", "mask_token_id")}
    assert {key: written[key] for key in shapes} == shapes


@pytest.mark.parametrize(
    ("model", "layout", "law"),
    [
        ({}, "llada2", "a dense model cannot be written as llada2"),
        (SOFTMAX, "llada2", "score_function=softmax cannot be written as llada2, whose experts have sigmoid"),
        (LLADA2, "sdar", r"partial_rotary_factor=0\.5 cannot be written as sdar"),
        (
            {**LLADA2, "experts": {**test_llada2.EXPERTS, "shared_width": 20}},
            "llada2",
            "a shared expert of width 20 cannot be written as llada2",
        ),
    ],
)
def test_what_a_layout_cannot_express_is_refused(model: dict[str, Any], layout: str, law: str, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=law):
        export_layout(ours(tmp_path, model), tmp_path / "theirs", layout, mask="kept")
