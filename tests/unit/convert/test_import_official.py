"""Official sources become folders and go back; what cannot be translated exactly is refused in one sentence."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bd3_megatron.convert.from_hf import read_folder
from bd3_megatron.convert.import_official import ImportOptions, export_official, import_official
from bd3_megatron.convert.official import fold
from bd3_megatron.convert.official_source import read_source
from bd3_megatron.convert.to_hf import write_folder
from bd3_megatron.convert.unread import read_foreign
from bd3_megatron.errors import CheckpointError, ConversionError, TokenizerError
from tests.unit.hf.models import tiny_config, tiny_model
from tests.unit.sampling.folders import write_tokenizer
from tools import export_official as export_tool
from tools import import_official as import_tool

GOLDEN = Path(__file__).parents[2] / "golden"
HF_FOLDER, LIGHTNING = GOLDEN / "hf_tiny_bs4", GOLDEN / "official_lightning_tiny_bs4.ckpt"


def test_a_hugging_face_folder_is_folded_in_float64_and_stored_in_fp32(tmp_path: Path) -> None:
    report = import_official(HF_FOLDER, tmp_path / "out")
    config, state = read_folder(tmp_path / "out")
    expected = fold({n: t.double() for n, t in load_file(HF_FOLDER / "model.safetensors").items()})
    assert all(torch.equal(state[name], expected[name].float()) for name in expected)
    assert (config.block_size, config.max_position_embeddings, config.mask_token_id) == (4, 32, 49)
    assert (config.num_attention_heads, config.style, config.tie_word_embeddings) == (4, "paper", False)
    assert "no tokenizer files: prompts must be token ids, and texts are not decoded" in report.notes


def test_a_lightning_checkpoint_gives_its_moving_average_or_its_trained_weights(tmp_path: Path) -> None:
    sources = {raw: read_source(LIGHTNING, raw=raw) for raw in (False, True)}
    for raw, source in sources.items():
        report = import_official(LIGHTNING, tmp_path / str(raw), ImportOptions(raw=raw))
        config, state = read_folder(tmp_path / str(raw))
        folded = fold({name: tensor.double() for name, tensor in source.state.items()})
        assert all(torch.equal(state[name], folded[name].float()) for name in folded)
        assert (config.block_size, config.max_position_embeddings) == (4, 32)
        assert (config.mask_token_id, config.bos_token_id, config.eos_token_id) == (49, 48, 48)
        assert any("common.FakeTok" in note for note in report.notes)


@pytest.mark.parametrize(
    ("raw", "digest"),
    [
        (False, "a99f2f597f01b26607dfb1fd972f9b83b1b6581b3e09b38a367a92dd88ea23d5"),
        (True, "6306fe08be5af3dac570fe9d7c273768a3e81d074e32c2c42ec0cde33f7f8c02"),
    ],
)
def test_the_lightning_reader_gives_the_bytes_that_another_unpickler_gave(raw: bool, digest: str) -> None:
    found = hashlib.sha256()
    for name, tensor in read_source(LIGHTNING, raw=raw).state.items():
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    assert found.hexdigest() == digest


def test_export_then_import_is_bit_equal_and_leaves_the_configuration_alone(tmp_path: Path) -> None:
    import_official(LIGHTNING, tmp_path / "ours")
    export_official(tmp_path / "ours", tmp_path / "theirs")
    import_official(tmp_path / "theirs", tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    golden = load_file(HF_FOLDER / "model.safetensors")
    assert set(theirs) == set(golden)
    described = json.loads((tmp_path / "theirs" / "config.json").read_text("utf-8"))
    assert set(json.loads((HF_FOLDER / "config.json").read_text("utf-8"))) <= {*described, "transformers_version"}


def rewritten(tmp_path: Path, change: Any) -> Path:
    """The Lightning checkpoint with its content changed (unknown classes stay out)."""
    content, _ = read_foreign(LIGHTNING)
    plain = {key: content[key] for key in ("state_dict", "ema")}
    change(plain)
    torch.save(plain, tmp_path / "changed.ckpt")
    return tmp_path / "changed.ckpt"


def test_a_checkpoint_without_hyper_parameters_asks_for_what_it_does_not_say(tmp_path: Path) -> None:
    path = rewritten(tmp_path, lambda content: None)
    with pytest.raises(ConversionError, match="seq_len=None is not stated .* pass --seq-len N"):
        import_official(path, tmp_path / "out")
    with pytest.raises(ConversionError, match="block_size=None is not stated .* pass --block-size N"):
        import_official(path, tmp_path / "out", ImportOptions(seq_len=32))
    with pytest.raises(ConversionError, match="seq_len=32 is not a multiple of block_size=5; use 30 or 35"):
        import_official(path, tmp_path / "out", ImportOptions(seq_len=32, block_size=5))
    with pytest.raises(ConversionError, match="mask_id=50 is not a row of the table; use 0 to 49"):
        import_official(path, tmp_path / "out", ImportOptions(seq_len=32, block_size=8, mask_id=50))
    assert not (tmp_path / "out").exists()
    import_official(path, tmp_path / "out", ImportOptions(seq_len=32, block_size=8, mask_id=3))
    config, _ = read_folder(tmp_path / "out")
    assert (config.block_size, config.mask_token_id) == (8, 3)


def test_compiled_names_and_raw_weights_without_an_average_are_understood(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        state = content["state_dict"]
        content["state_dict"] = {n.replace("backbone.", "backbone._orig_mod."): t for n, t in state.items()}
        del content["ema"]

    path = rewritten(tmp_path, change)
    options = ImportOptions(seq_len=32, block_size=4)
    with pytest.raises(ConversionError, match="holds no moving average"):
        import_official(path, tmp_path / "out", options)
    import_official(path, tmp_path / "out", ImportOptions(seq_len=32, block_size=4, raw=True))
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_an_average_of_other_shapes_is_refused(tmp_path: Path) -> None:
    path = rewritten(tmp_path, lambda content: content["ema"]["shadow_params"].pop())
    with pytest.raises(ConversionError, match="39 averaged tensors that do not match its 40 parameters"):
        read_source(path)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"time_conditioning": True}, "time_conditioning is on: .* cannot be folded into weights"),
        ({"model_type": "gpt2"}, "model_type='gpt2'; expected one of bd3lm, mdlm"),
    ],
)
def test_folders_of_other_models_are_refused(tmp_path: Path, fields: dict[str, Any], sentence: str) -> None:
    shutil.copytree(HF_FOLDER, tmp_path / "source")
    described = json.loads((HF_FOLDER / "config.json").read_text("utf-8")) | fields
    (tmp_path / "source" / "config.json").write_text(json.dumps(described), "utf-8")
    with pytest.raises(ConversionError, match=sentence):
        import_official(tmp_path / "source", tmp_path / "out")


def test_a_tokenizer_folder_is_copied_and_asked_for_its_ids(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    import_official(HF_FOLDER, tmp_path / "out", ImportOptions(tokenizer_dir=tokenizer))
    config, _ = read_folder(tmp_path / "out")
    assert (config.mask_token_id, config.bos_token_id, config.eos_token_id) == (20, 0, 1)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    with pytest.raises(TokenizerError, match="holds no tokenizer files"):
        import_official(HF_FOLDER, tmp_path / "other", ImportOptions(tokenizer_dir=tmp_path))


def test_missing_and_damaged_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; copy the checkpoint again"):
        read_source(tmp_path / "nothing.ckpt")
    (tmp_path / "cut.ckpt").write_bytes(LIGHTNING.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="cut.ckpt is damaged .* copy it again"):
        read_source(tmp_path / "cut.ckpt")
    torch.save({"weights": 1}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="has no state_dict"):
        read_source(tmp_path / "other.ckpt")
    shutil.copytree(HF_FOLDER, tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_source(tmp_path / "source")


def test_a_diffusion_without_a_clean_half_is_one_block_over_its_length(tmp_path: Path) -> None:
    shutil.copytree(HF_FOLDER, tmp_path / "source")
    described = json.loads((HF_FOLDER / "config.json").read_text("utf-8")) | {"cross_attn": False}
    (tmp_path / "source" / "config.json").write_text(json.dumps(described), "utf-8")
    import_official(tmp_path / "source", tmp_path / "out")
    assert read_folder(tmp_path / "out")[0].block_size == 32


def test_the_autoregressive_baseline_keeps_its_objective(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    described = json.loads((HF_FOLDER / "config.json").read_text("utf-8")) | {"causal": True}
    (tmp_path / "source" / "config.json").write_text(json.dumps(described), "utf-8")
    state = load_file(HF_FOLDER / "model.safetensors")
    kept = {n: t for n, t in state.items() if "adaLN" not in n and "sigma_map" not in n}
    save_file(kept, tmp_path / "source" / "model.safetensors")
    import_official(tmp_path / "source", tmp_path / "out")
    config, _ = read_folder(tmp_path / "out")
    assert (config.objective, config.block_size) == ("ar", 1)


def test_the_tools_report_in_lines_and_fail_in_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert import_tool.main([str(LIGHTNING), "--out", str(ours)]) == 0
    assert "took the moving average of the weights (EMA)" in capsys.readouterr().out
    assert export_tool.main([str(ours), "--out", str(theirs)]) == 0
    assert "0.16 M parameters" in capsys.readouterr().out
    assert export_tool.main([str(theirs), "--out", str(tmp_path / "more")]) == 2
    assert import_tool.main([str(tmp_path / "nothing"), "--out", str(tmp_path / "more")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 2 and "expected 'bd3'" in error and "does not exist" in error


def test_models_that_the_official_class_cannot_hold_are_not_exported(tmp_path: Path) -> None:
    write_folder(tiny_model(4, dtype=torch.float32).state_dict(), tiny_config(4), tmp_path / "modern")
    with pytest.raises(
        ConversionError, match="style=modern cannot be exported to the official class, which fixes style=paper"
    ):
        export_official(tmp_path / "modern", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mask_that_is_the_sources_end_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="the mask id 48 is also the id of bos and eos"):
        import_official(LIGHTNING, tmp_path / "out", ImportOptions(mask_id=48))
    assert not (tmp_path / "out").exists()
