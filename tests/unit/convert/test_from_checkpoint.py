"""A checkpoint becomes a folder, tensor by tensor, and the folder is proved to be the checkpoint."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bd3_megatron.checkpoint.layout import read_manifest, step_name
from bd3_megatron.checkpoint.read import open_checkpoint
from bd3_megatron.checkpoint.save import save
from bd3_megatron.config.load import config_from_tree
from bd3_megatron.convert.from_checkpoint import (
    checked_difference,
    convert_checkpoint,
    find_checkpoint,
    prove,
    tokenizer_of,
    trained_block_size,
)
from bd3_megatron.convert.from_hf import read_folder
from bd3_megatron.convert.layerwise import parallel_logits, plain_logits, random_tokens
from bd3_megatron.convert.name_table import NameTable
from bd3_megatron.convert.plain_source import CheckpointSource, FolderSource
from bd3_megatron.convert.to_hf import stream_folder, write_folder
from bd3_megatron.data.tokenizer_bytes import ByteTokenizer
from bd3_megatron.errors import CheckpointError, ConversionError, TokenizerError
from bd3_megatron.hf.plain_bd3 import plain_model
from bd3_megatron.parallel.topology import Topology
from tests.ranks.checkpoint_runs import build, raw_state, steps, tiny
from tests.ranks.harness import run_ranks
from tests.unit.convert.models import MASK, VOCAB, run_config, whole_checkpoint
from tools import convert_checkpoint as tool

MODELS: dict[str, dict[str, Any]] = {
    "modern": {},
    "tied": {"tie_embeddings": True},
    "wide heads, no qk norm": {"head_dim": 12, "qk_norm": False},
    "paper": {"style": "paper", "num_kv_heads": 4, "qk_norm": False},
}


@pytest.fixture(params=MODELS.values(), ids=list(MODELS))
def run_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config = run_config(tmp_path / "run", model=request.param)
    whole_checkpoint(tmp_path / "run" / "checkpoints" / step_name(3), config)
    return tmp_path / "run"


def test_a_checkpoint_becomes_a_folder(run_dir: Path, tmp_path: Path) -> None:
    report = convert_checkpoint(run_dir, tmp_path / "hf")
    config, state = read_folder(tmp_path / "hf")
    assert (config.vocab_size, config.mask_token_id, config.block_size, config.max_position_embeddings) == (
        VOCAB,
        MASK,
        4,
        32,
    )
    assert report.max_logit_difference < 1e-5 and report.step == 3
    assert report.num_parameters == sum(t.numel() for t in state.values())


def test_both_forwards_are_the_plain_models(run_dir: Path, tmp_path: Path) -> None:
    convert_checkpoint(run_dir, tmp_path / "hf")
    config, state = read_folder(tmp_path / "hf")
    noisy_BL, clean_BL = random_tokens(VOCAB, 12), random_tokens(VOCAB, 12, seed=2)
    expected = plain_model(config, state)(noisy_BL, clean_BL)
    found = plain_logits(FolderSource(tmp_path / "hf"), config, noisy_BL, clean_BL, span=4)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    reader = open_checkpoint(run_dir / "checkpoints" / step_name(3))
    model = config_from_tree(reader.manifest.config).model
    fused = parallel_logits(reader.tensor, model, noisy_BL, clean_BL, span=4, vocab_size=VOCAB)
    assert torch.allclose(fused, expected, rtol=0, atol=1e-5)


def test_streaming_writes_the_very_folder_that_writing_at_once_does(run_dir: Path, tmp_path: Path) -> None:
    convert_checkpoint(run_dir, tmp_path / "hf")
    config, state = read_folder(tmp_path / "hf")
    write_folder(state, config, tmp_path / "at_once")
    streamed = {p.name: p.read_bytes() for p in (tmp_path / "hf").iterdir() if p.suffix != ".safetensors"}
    at_once = {p.name: p.read_bytes() for p in (tmp_path / "at_once").iterdir() if p.suffix != ".safetensors"}
    assert {k: v for k, v in streamed.items() if k in at_once} == at_once
    assert set(streamed) - set(at_once) <= {"README.md"}


def test_a_large_model_is_cut_into_files_with_an_index(run_dir: Path, tmp_path: Path) -> None:
    reader = open_checkpoint(run_dir / "checkpoints" / step_name(3))
    convert_checkpoint(run_dir, tmp_path / "hf")
    config, state = read_folder(tmp_path / "hf")
    table = NameTable(config_from_tree(reader.manifest.config).model, VOCAB)
    stream_folder(CheckpointSource(reader, table, "model"), config, tmp_path / "cut", shard_bytes=8000)
    assert len(list((tmp_path / "cut").glob("model-*-of-*.safetensors"))) > 2
    again = read_folder(tmp_path / "cut")[1]
    assert all(torch.equal(again[name], state[name]) for name in state) and set(again) == set(state)


def test_bf16_is_proved_against_the_rounded_checkpoint(run_dir: Path, tmp_path: Path) -> None:
    report = convert_checkpoint(run_dir, tmp_path / "hf", dtype=torch.bfloat16)
    assert report.max_logit_difference < 1e-5
    assert all(t.dtype == torch.bfloat16 for t in read_folder(tmp_path / "hf")[1].values())


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_the_proof_sees_a_wrong_tensor(name: str, tmp_path: Path) -> None:
    config = run_config(tmp_path / "run")
    path = whole_checkpoint(tmp_path / "run" / "checkpoints" / step_name(3), config)
    convert_checkpoint(path, tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    state = load_file(file)
    state[name] = state[name].roll(1, 0)
    save_file(state, file, metadata={"format": "pt"})
    described = read_folder(tmp_path / "hf")[0]
    with pytest.raises(
        ConversionError, match="logits of the written folder and the checkpoint differ by .* do not use"
    ):
        prove(open_checkpoint(path), "model", config, FolderSource(tmp_path / "hf"), described, dtype=torch.float32)


def test_a_folder_that_fails_its_proof_never_gets_its_name(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bd3_megatron.convert.from_checkpoint.PROOF_TOLERANCE", -1.0)
    with pytest.raises(ConversionError, match="do not use"):
        convert_checkpoint(run_dir, tmp_path / "hf")
    assert not (tmp_path / "hf").exists() and not [p for p in tmp_path.iterdir() if p.name.startswith(".hf")]


@pytest.mark.parametrize("at", ["weights", "proof", "name"])
def test_a_killed_conversion_leaves_the_old_folder_and_the_next_one_tidies(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(tmp_path / "run")
    whole_checkpoint(tmp_path / "run" / "checkpoints" / step_name(3), config)
    arguments = [str(tmp_path / "run"), "--out", str(tmp_path / "out" / "hf")]
    assert tool.main(arguments) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out" / "hf").iterdir()}
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        target = {
            "weights": "bd3_megatron.convert.to_hf.copy_files",
            "proof": "bd3_megatron.convert.from_checkpoint.prove",
            "name": "bd3_megatron.files._swap",
        }[at]
        monkeypatch.setattr(target, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        try:
            tool.main([*arguments, "--dtype", "bf16"])
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert {path.name: path.read_bytes() for path in (tmp_path / "out" / "hf").iterdir()} == before
    assert len(os.listdir(tmp_path / "out")) == 3
    assert tool.main(arguments) == 0
    assert os.listdir(tmp_path / "out") == ["hf"]


def test_numbers_that_are_none_are_no_proof() -> None:
    with pytest.raises(ConversionError, match="differ by nan"):
        checked_difference(torch.zeros(2), torch.tensor([0.0, float("nan")]), "a and b")


def test_averaged_weights_are_taken_unless_raw_ones_are_asked_for(tmp_path: Path) -> None:
    config = tiny(tp=2)

    def on_rank(topology: Topology) -> Any:
        engine = build(config, topology)
        steps(engine, 0, 2)
        save(engine, tmp_path / "checkpoints", step=2, samples_consumed=8, config=config, train_state={})
        raw = raw_state(engine)["model.decoder.final_layernorm.weight"]
        with engine.averaged_weights():
            return raw, raw_state(engine)["model.decoder.final_layernorm.weight"]

    raw, averaged = run_ranks(on_rank, config.parallel)[0]
    assert not torch.equal(raw, averaged)
    assert convert_checkpoint(tmp_path, tmp_path / "hf").which == "averaged"
    assert torch.equal(read_folder(tmp_path / "hf")[1]["model.norm.weight"], averaged)
    assert convert_checkpoint(tmp_path, tmp_path / "hf", raw=True).which == "raw"
    assert torch.equal(read_folder(tmp_path / "hf")[1]["model.norm.weight"], raw)


def test_the_exported_block_size_is_that_of_the_update_that_led_to_the_checkpoint(tmp_path: Path) -> None:
    phases = [{"block_size": 32, "steps": 3}, {"block_size": 8, "tokens": 4 * 32 * 2}, {"block_size": 4}]
    config = run_config(tmp_path, diffusion={"phases": phases})
    manifest = read_manifest(whole_checkpoint(tmp_path / step_name(3), config))
    at = [trained_block_size(config, replace(manifest, step=step)) for step in (0, 3, 4, 5, 6, 100)]
    assert at == [32, 32, 8, 8, 4, 4]
    ar = run_config(tmp_path, diffusion={"objective": "ar"})
    assert trained_block_size(ar, replace(manifest, step=5)) == 1
    # what the run wrote down goes before what its configuration lets expect
    stated = whole_checkpoint(tmp_path / step_name(4), config, step=4, train_state={"block_size": 16})
    convert_checkpoint(stated, tmp_path / "hf")
    assert read_folder(tmp_path / "hf")[0].block_size == 16


@pytest.mark.parametrize(
    "wrong",
    [
        *({"block_size": value} for value in (0, -4, 2.5, "8", True)),
        {"tokenizer": {"fingerprint": "x"}},
        {"tokenizer": 3},
    ],
    ids=str,
)
def test_a_train_state_that_no_run_can_have_is_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    path = whole_checkpoint(tmp_path / step_name(3), run_config(tmp_path), train_state=wrong)
    with pytest.raises(CheckpointError, match=r"train_state=.* must be values by name, with a block_size from 1 and a"):
        convert_checkpoint(path, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_what_cannot_be_converted_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run_config(tmp_path / "run")
    path = whole_checkpoint(tmp_path / "run" / "checkpoints" / step_name(3), config)
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not delete")
    bad = path / "weights" / "part-00000.safetensors"
    content = bad.read_bytes()
    cases = [
        ([str(tmp_path / "nowhere"), "--out", str(tmp_path / "hf")], "does not exist; give a run's folder"),
        ([str(tmp_path / "empty"), "--out", str(tmp_path / "hf")], "holds no complete checkpoint"),
        ([str(path), "--out", str(tmp_path / "mine")], "holds something that is not a bd3 folder"),
    ]
    for arguments, sentence in cases:
        assert tool.main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("convert_checkpoint: error: ") and sentence in captured.err
        assert captured.err.count("\n") == 1
    bad.write_bytes(content[:-1])
    assert tool.main([str(tmp_path / "run"), "--out", str(tmp_path / "hf")]) == 2
    assert "torn" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists() and (tmp_path / "mine" / "thesis.txt").exists()


def test_the_checkpoint_a_person_means_is_found(tmp_path: Path) -> None:
    config = run_config(tmp_path / "run")
    older, newer = (whole_checkpoint(tmp_path / "run" / "checkpoints" / step_name(s), config, step=s) for s in (2, 4))
    assert find_checkpoint(tmp_path / "run") == find_checkpoint(tmp_path / "run" / "checkpoints") == newer
    assert find_checkpoint(older) == older
    (newer / "manifest.json").write_text("{}")
    assert find_checkpoint(tmp_path / "run") == older
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        find_checkpoint(newer)


def test_a_checkpoint_of_another_shape_than_its_configuration_is_refused(tmp_path: Path) -> None:
    path = whole_checkpoint(tmp_path / step_name(3), run_config(tmp_path, model={"tie_embeddings": True}))
    table = NameTable(run_config(tmp_path).model, VOCAB)
    with pytest.raises(ConversionError, match="disagree on 1 parameter, output_layer.weight among them"):
        CheckpointSource(open_checkpoint(path), table, "model")


def test_the_tool_says_what_it_did(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([str(run_dir), "--out", str(tmp_path / "hf"), "--dtype", "bf16"]) == 0
    out = capsys.readouterr().out
    assert "raw weights of" in out and "differ by at most" in out and "no tokenizer was found" in out
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_tokenizer_must_be_the_runs(tmp_path: Path) -> None:
    path = whole_checkpoint(tmp_path / "run" / "checkpoints" / step_name(3), run_config(tmp_path / "run"))
    manifest = open_checkpoint(path).manifest
    ByteTokenizer().save(tmp_path / "data" / "tokenizer")
    fingerprint = ByteTokenizer().fingerprint
    known = replace(manifest, train_state={"tokenizer": {"fingerprint": fingerprint}})
    folder = tmp_path / "data" / "tokenizer"
    assert tokenizer_of(path, tmp_path / "data", manifest) == tokenizer_of(path, tmp_path / "data", known) == folder
    assert tokenizer_of(path, tmp_path, known) is None and tokenizer_of(path, None, known) is None
    other = replace(manifest, train_state={"tokenizer": {"fingerprint": "f" * 64}})
    with pytest.raises(TokenizerError, match="tokenizer has the tokenizer .*, the run at step 3 has f{16}"):
        tokenizer_of(path, tmp_path / "data", other)


def test_an_export_needs_no_data_where_the_run_kept_its_tokenizer(tmp_path: Path) -> None:
    own = ByteTokenizer()
    state = {"tokenizer": {"fingerprint": own.fingerprint, **own.special.as_dict()}}
    config = run_config(tmp_path / "run")
    path = whole_checkpoint(tmp_path / "run" / "checkpoints" / step_name(3), config, train_state=state, vocab_size=260)
    own.save(tmp_path / "run" / "tokenizer")
    report = convert_checkpoint(path, tmp_path / "hf")
    described = read_folder(tmp_path / "hf")[0]
    assert (described.bos_token_id, described.eos_token_id, described.pad_token_id) == (256, 257, 258)
    assert described.tokenizer_fingerprint == own.fingerprint
    assert (tmp_path / "hf" / "bd3_tokenizer.json").is_file() and not any("found" in note for note in report.notes)
