"""Each assumption of an engine that a folder breaks is named, with what to change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bd3_megatron.checkpoint.layout import step_name
from bd3_megatron.convert.from_checkpoint import convert_checkpoint
from bd3_megatron.convert.layouts import export_layout
from bd3_megatron.convert.lint import LintRemark, has_errors, lint_folder
from bd3_megatron.errors import CheckpointError
from tests.unit.convert.models import run_config, whole_checkpoint
from tools import lint_export as tool

TOKENIZER = {"added_tokens": [{"id": 60, "content": "<|mask|>"}], "model": {"vocab": {"a": 0, "b": 1}}}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported folder, and the same in SDAR's layout."""
    root = tmp_path_factory.mktemp("lint")
    path = whole_checkpoint(root / "run" / "checkpoints" / step_name(3), run_config(root / "run"), common=2.0)
    convert_checkpoint(path, root / "ours")
    (root / "ours" / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    export_layout(root / "ours", root / "sdar", "sdar", mask="moved", dtype=torch.bfloat16)
    return root


@pytest.fixture
def ours(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written / "ours", tmp_path / "ours")


@pytest.fixture
def sdar(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written / "sdar", tmp_path / "sdar")


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


def errors(answers: list[LintRemark]) -> str:
    return "\n".join(answer.sentence for answer in answers if answer.is_error)


@pytest.mark.parametrize(
    ("engine", "setting"),
    [("sglang", None), ("lmdeploy", "--dllm-block-length 4"), ("jetengine", "block_length=4")],
)
def test_an_exported_sdar_folder_contradicts_nothing(engine: Any, setting: str | None, sdar: Path) -> None:
    answers = lint_folder(sdar, engine)
    assert not has_errors(answers), errors(answers)
    said = "\n".join(answer.sentence for answer in answers)
    assert setting is None or setting in said
    # the tokenizer has three ids
    assert "151933 rows of lm_head.weight are of no token; whether their logits are low was not computed" in said


def test_transformers_needs_a_model_class(sdar: Path) -> None:
    assert "has no auto_map with a model: .* add SDAR's own modelling files" in errors(
        lint_folder(sdar, "transformers")
    ).replace("transformers cannot find its class;", ".*")


def test_rows_of_zeros_are_named(sdar: Path) -> None:
    state = load_file(sdar / "model.safetensors")
    state["lm_head.weight"][100:150_000] = 0
    save_file(state, sdar / "model.safetensors")
    assert "149900 rows of lm_head.weight are zero: their logit is 0 and engines sample them" in errors(
        lint_folder(sdar, "jetengine")
    )


def test_our_folder_is_served_by_transformers_only(ours: Path) -> None:
    assert not has_errors(lint_folder(ours, "transformers"))
    for engine in ("sglang", "lmdeploy"):
        said = errors(lint_folder(ours, engine))  # type: ignore[arg-type]
        assert "architecture BD3ForMaskedLM with model_type=bd3 is not served as block diffusion" in said
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
    "another type": (lambda f: change(f, "config.json", model_type="qwen3"), "with model_type=qwen3 is not served"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "torn tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json cannot be read"),
    "large tokenizer": (
        lambda f: change(f, "tokenizer.json", added_tokens=[{"id": 200000, "content": "x"}]),
        "the tokenizer has an id 200000, the model 151936 rows",
    ),
}


@pytest.mark.parametrize(("breaks", "sentence"), BROKEN.values(), ids=list(BROKEN))
def test_a_broken_assumption_is_named(breaks: Callable[[Path], object], sentence: str, sdar: Path) -> None:
    breaks(sdar)
    answers = lint_folder(sdar, "sglang")
    assert sentence in errors(answers) and has_errors(answers)


def test_another_block_size_is_a_setting(sdar: Path) -> None:
    change(sdar, "config.json", block_size=16)
    answers = lint_folder(sdar, "sglang")
    assert not has_errors(answers) and any("`block_size: 16`" in answer.sentence for answer in answers)


def test_a_missing_modelling_file_is_named(ours: Path) -> None:
    (ours / "plain_bd3.py").unlink()
    assert "plain_bd3.py is named by auto_map or imported from there, and missing" in errors(
        lint_folder(ours, "transformers")
    )
    without(ours, "auto_map")
    assert "has no auto_map with a model: transformers cannot find its class; export the folder again" in errors(
        lint_folder(ours, "transformers")
    )
    assert "has no auto_map with AutoConfig" in errors(lint_folder(ours, "jetengine"))


def test_the_tool_answers_with_its_exit_code(ours: Path, sdar: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([str(sdar), "--engine", "sglang"]) == 0
    assert "contradicts what sglang assumes; nothing was loaded or run" in capsys.readouterr().out
    assert tool.main([str(ours), "--engine", "lmdeploy"]) == 1
    assert "lmdeploy would serve" in capsys.readouterr().out
    (ours / "config.json").unlink()
    assert tool.main([str(ours), "--engine", "sglang"]) == 2
    assert capsys.readouterr().err.startswith("lint_export: error: ")
    with pytest.raises(CheckpointError, match="does not exist"):
        lint_folder(ours, "sglang")
