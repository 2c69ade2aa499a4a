"""Each assumption of an engine that a folder breaks is named, with what to change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bd3_megatron.checkpoint.layout import step_name
from bd3_megatron.convert.from_checkpoint import convert_checkpoint
from bd3_megatron.convert.lint import LintRemark, lint_folder, served_rightly
from bd3_megatron.convert.sdar import export_layout
from bd3_megatron.errors import CheckpointError
from tests.unit.convert.models import run_config, whole_checkpoint
from tools import lint_export as tool

TOKENIZER = {"added_tokens": [{"id": 60, "content": "<|mask|>"}], "model": {"vocab": {"a": 0, "b": 1}}}


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    path = whole_checkpoint(tmp_path / "run" / "checkpoints" / step_name(3), run_config(tmp_path / "run"))
    convert_checkpoint(path, tmp_path / "ours")
    (tmp_path / "ours" / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return tmp_path / "ours"


@pytest.fixture
def sdar(ours: Path, tmp_path: Path) -> Path:
    export_layout(ours, tmp_path / "sdar", "sdar", remap_mask=True, dtype=torch.bfloat16)
    change(tmp_path / "sdar", "tokenizer.json", added_tokens=[{"id": 151669, "content": "<|mask|>"}])
    return tmp_path / "sdar"


def change(folder: Path, name: str, **fields: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def without(folder: Path, field: str) -> None:
    tree = json.loads((folder / "config.json").read_text())
    del tree[field]
    (folder / "config.json").write_text(json.dumps(tree))


def drop_tensor(folder: Path, name: str) -> None:
    state = load_file(folder / "model.safetensors")
    del state[name]
    save_file(state, folder / "model.safetensors")


def errors(findings: list[LintRemark]) -> str:
    return "\n".join(finding.sentence for finding in findings if finding.is_error)


@pytest.mark.parametrize("engine", ["sglang", "lmdeploy"])
def test_an_exported_sdar_folder_is_served(engine: Any, sdar: Path) -> None:
    findings = lint_folder(sdar, engine)
    assert served_rightly(findings), errors(findings)
    assert engine == "sglang" or any("--dllm-block-length 4" in finding.sentence for finding in findings)


def test_our_folder_is_served_by_transformers_only(ours: Path) -> None:
    assert served_rightly(lint_folder(ours, "transformers"))
    for engine in ("sglang", "lmdeploy"):
        said = errors(lint_folder(ours, engine))  # type: ignore[arg-type]
        assert "architecture BD3ForMaskedLM is unknown to" in said and "--layout sdar" in said
        assert f"mask_token_id=60, but {engine} masks with 151669" in said


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "another mask": (
        lambda f: change(f, "config.json", mask_token_id=7),
        "mask_token_id=7, but sglang masks with 151669",
    ),
    "no mask": (lambda f: without(f, "mask_token_id"), "names no mask_token_id"),
    "no block size": (lambda f: without(f, "block_size"), "names no block_size"),
    "shifted": (
        lambda f: change(f, "config.json", logit_alignment="shifted"),
        "logit_alignment=shifted, but sglang computes",
    ),
    "prefix": (lambda f: change(f, "config.json", prefix_attention="causal"), "prefix_attention=causal"),
    "grid": (lambda f: change(f, "config.json", block_grid="prompt"), "block_grid=prompt"),
    "vocabulary": (
        lambda f: change(f, "config.json", vocab_size=151940),
        "has 151936 rows, config.json says vocab_size=151940",
    ),
    "mask outside": (lambda f: change(f, "config.json", mask_token_id=151936), "lies outside the vocabulary"),
    "tied and stored": (lambda f: change(f, "config.json", tie_word_embeddings=True), "lm_head.weight is stored too"),
    "untied and missing": (lambda f: drop_tensor(f, "lm_head.weight"), "lm_head.weight is missing"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "torn tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json cannot be read"),
    "large tokenizer": (
        lambda f: change(f, "tokenizer.json", added_tokens=[{"id": 200000, "content": "x"}]),
        "the tokenizer has 200001 ids, the model 151936",
    ),
}


@pytest.mark.parametrize(("breaks", "sentence"), BROKEN.values(), ids=list(BROKEN))
def test_a_broken_assumption_is_named(breaks: Callable[[Path], object], sentence: str, sdar: Path) -> None:
    breaks(sdar)
    findings = lint_folder(sdar, "sglang")
    assert sentence in errors(findings) and not served_rightly(findings)


def test_another_block_size_is_a_setting(sdar: Path) -> None:
    change(sdar, "config.json", block_size=16)
    findings = lint_folder(sdar, "sglang")
    assert served_rightly(findings) and any("`block_size: 16`" in finding.sentence for finding in findings)


def test_a_missing_modelling_file_is_named(ours: Path) -> None:
    (ours / "plain_bd3.py").unlink()
    assert "plain_bd3.py is named by auto_map or imported from there, and missing" in errors(
        lint_folder(ours, "transformers")
    )
    without(ours, "auto_map")
    assert "has no auto_map" in errors(lint_folder(ours, "transformers"))


def test_the_tool_answers_with_its_exit_code(ours: Path, sdar: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([str(sdar), "--engine", "sglang"]) == 0
    assert "sglang serves" in capsys.readouterr().out
    assert tool.main([str(ours), "--engine", "lmdeploy"]) == 1
    assert "lmdeploy does not serve" in capsys.readouterr().out
    (ours / "config.json").unlink()
    assert tool.main([str(ours), "--engine", "sglang"]) == 2
    assert capsys.readouterr().err.startswith("lint_export: error: ")
    with pytest.raises(CheckpointError, match="does not exist"):
        lint_folder(ours, "sglang")
