"""SDAR's layout: its fields, its names, and the mask id that its engines assume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

from bd3_megatron.checkpoint.layout import step_name
from bd3_megatron.convert.from_checkpoint import convert_checkpoint
from bd3_megatron.convert.layerwise import plain_logits
from bd3_megatron.convert.layouts import export_layout
from bd3_megatron.convert.moved_mask import move_mask
from bd3_megatron.convert.plain_source import FolderSource
from bd3_megatron.convert.sdar import SDAR_MASK_ID, SDAR_VOCAB_SIZE
from bd3_megatron.convert.silent_rows import SILENCE, probe, silent_row
from bd3_megatron.errors import ConversionError
from bd3_megatron.hf.configuration_bd3 import BD3Config
from bd3_megatron.sampling.folder import read_config
from tests.unit.convert.models import MASK, run_config, whole_checkpoint
from tools import convert_checkpoint as tool


def ours(tmp_path: Path, *, common: float = 2.0, **settings: Any) -> Path:
    config = run_config(tmp_path / "ours", **settings)
    path = whole_checkpoint(tmp_path / "ours" / "checkpoints" / step_name(3), config, common=common)
    convert_checkpoint(path, tmp_path / "ours_hf")
    return tmp_path / "ours_hf"


def with_tokenizer(folder: Path, model: tokenizers.models.Model) -> Path:
    """A tokenizer of 60 pieces and a mask with id 60, as transformers saves them."""
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["w1", "<|mask|>"])
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="w1", mask_token="<|mask|>").save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout of 2048 rows: all but what depends on there being a hundred thousand of them."""
    monkeypatch.setattr("bd3_megatron.convert.sdar.SDAR_MASK_ID", 2000)
    monkeypatch.setattr("bd3_megatron.convert.sdar.SDAR_VOCAB_SIZE", 2048)


WORDS = {f"w{i}": i for i in range(MASK)}


def drawn_ids(folder: Path, num_samples: int = 200) -> list[int]:
    """Tokens that an engine which knows nothing of unused rows draws at temperature 1 for a block of masks."""
    tree, state = described(folder), FolderSource(folder)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "rope_theta", "max_position_embeddings", "block_size", "mask_token_id")
    config = BD3Config(qk_norm=True, layer_norm_eps=tree["rms_norm_eps"], **{name: tree[name] for name in names})
    prompt_BL = torch.randint(0, MASK, (num_samples // 4, 8), generator=torch.Generator().manual_seed(3))
    masks_BL = torch.full((len(prompt_BL), 4), config.mask_token_id)
    logits = plain_logits(state, config, torch.cat([prompt_BL, masks_BL], 1), None, span=4)[:, 8:]
    cumulated = logits.flatten(0, 1).softmax(-1).cumsum(-1)
    chance = torch.rand(len(cumulated), 1, generator=torch.Generator().manual_seed(4)) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, chance).flatten().tolist()


def described(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def test_the_mask_moves_to_where_the_engines_look_for_it_and_no_other_row_is_drawn(tmp_path: Path) -> None:
    folder = ours(tmp_path)
    remarks = export_layout(folder, tmp_path / "sdar", "sdar", mask="moved", dtype=torch.float32)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "sdar" / "model.safetensors")
    assert set(before) == set(after)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    assert after[embedding].shape[0] == after[head].shape[0] == SDAR_VOCAB_SIZE
    assert torch.equal(after[embedding][SDAR_MASK_ID], before[embedding][MASK])
    assert all(torch.equal(after[name][:MASK], before[name][:MASK]) for name in (embedding, head))
    config = described(tmp_path / "sdar")
    assert config["architectures"] == ["SDARForCausalLM"] and config["model_type"] == "sdar"
    assert (config["mask_token_id"], config["vocab_size"], config["block_size"]) == (SDAR_MASK_ID, SDAR_VOCAB_SIZE, 4)
    assert "suppress_tokens" not in described(tmp_path / "sdar", "generation_config.json")
    assert any("the mask moved from 60 to 151669" in remark for remark in remarks)
    assert set(drawn_ids(tmp_path / "sdar")) <= set(range(MASK))
    # the same rows as zeros, which is what padding makes of them
    after[head][MASK:] = 0
    save_file(after, tmp_path / "sdar" / "model.safetensors")
    assert sum(i >= MASK for i in drawn_ids(tmp_path / "sdar")) > 100


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("place", ["moved", "kept"])
def test_no_id_without_a_token_is_ever_drawn(place: Any, tied: bool, tmp_path: Path) -> None:
    folder = ours(tmp_path, model={"tie_embeddings": tied})
    remarks = export_layout(folder, tmp_path / "sdar", "sdar", mask=place, dtype=torch.bfloat16)
    assert set(drawn_ids(tmp_path / "sdar")) <= set(range(MASK))
    config = described(tmp_path / "sdar")
    assert config["tie_word_embeddings"] is False
    assert config["mask_token_id"] == (2000 if place == "moved" else MASK)
    assert any("have at most" in remark and "of the probability" in remark for remark in remarks)
    assert tied == any("stored apart" in remark for remark in remarks)


def test_a_model_without_a_common_direction_is_refused(tmp_path: Path) -> None:
    folder = ours(tmp_path, common=0.0)
    with pytest.raises(ConversionError, match="no row of the output table keeps unused ids silent: .* trained"):
        export_layout(folder, tmp_path / "sdar", "sdar", mask="kept")
    assert not (tmp_path / "sdar").exists()


@pytest.mark.usefixtures("few_rows")
def test_the_written_folder_is_what_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ours(tmp_path)
    monkeypatch.setattr("bd3_megatron.convert.sdar.silent_row", lambda states_ND: torch.zeros(states_ND.shape[1]))
    with pytest.raises(ConversionError, match="ids that are no token have probability .* the folder was not written"):
        export_layout(folder, tmp_path / "sdar", "sdar", mask="moved")
    assert not (tmp_path / "sdar").exists()


def test_the_silent_row_is_silent_at_the_weakest_state() -> None:
    states_ND = 1.0 + 0.5 * torch.randn(400, 16, generator=torch.Generator().manual_seed(1))
    products_N = states_ND @ silent_row(states_ND)
    assert products_N.max().item() == pytest.approx(-SILENCE)


def test_a_probe_is_the_same_every_time_and_holds_no_mask_as_a_token(tmp_path: Path) -> None:
    folder = ours(tmp_path)
    config, source = read_config(folder), FolderSource(folder)
    first, second = probe(source, config), probe(source, config)
    assert torch.equal(first.states_ND, second.states_ND) and torch.equal(first.clean_BL, second.clean_BL)
    is_masked = first.noisy_BL == MASK
    assert 0.5 < is_masked.float().mean() < 0.95 and not (first.clean_BL == MASK).any()
    assert torch.equal(first.noisy_BL[~is_masked], first.clean_BL[~is_masked])


@pytest.mark.parametrize(
    ("model", "follows"),
    [
        (tokenizers.models.WordLevel(WORDS, unk_token="w0"), True),
        (tokenizers.models.BPE({"w": 0, "5": 1, "7": 2, "1": 3, "w1": 4, "w5": 5}, [("w", "1"), ("w", "5")]), True),
        (tokenizers.models.Unigram([(word, -1.0) for word in WORDS], 0), False),
    ],
    ids=["word level", "BPE", "Unigram"],
)
def test_the_tokenizers_own_mask_follows(model: Any, follows: bool, tmp_path: Path) -> None:
    folder = with_tokenizer(ours(tmp_path), model)
    before, text = transformers.PreTrainedTokenizerFast.from_pretrained(folder), "w5 <|mask|> w7"
    old, ids = before.mask_token_id, before(text).input_ids
    moved = move_mask(folder, old, SDAR_MASK_ID)
    read = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    new = SDAR_MASK_ID if follows else old
    assert moved == follows and read.mask_token_id == new
    assert read(text).input_ids == [new if i == old else i for i in ids] and ids.count(old) == 1
    assert read.decode(read(text).input_ids) == before.decode(ids)
    assert read.convert_ids_to_tokens(old) == (None if follows else "<|mask|>")


@pytest.mark.usefixtures("few_rows")
def test_what_the_export_says_of_the_tokenizer_is_so(tmp_path: Path) -> None:
    folder = with_tokenizer(ours(tmp_path), tokenizers.models.WordLevel(WORDS, unk_token="w0"))
    remarks = export_layout(folder, tmp_path / "sdar", "sdar", mask="moved")
    assert "and in the tokenizer" in remarks
    read = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "sdar")
    assert read.mask_token_id == 2000 and read.eos_token_id == 1
    remarks = export_layout(folder, tmp_path / "kept", "sdar", mask="kept")
    assert "the mask stays at 60: tell JetEngine mask_token_id=60" in remarks
    assert transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "kept").mask_token_id == MASK


def test_transformers_reads_the_configuration_as_jetengine_asks_for_it(tmp_path: Path, own_remote_code: None) -> None:
    folder = ours(tmp_path)
    export_layout(folder, tmp_path / "sdar", "sdar", mask="kept")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "sdar", trust_remote_code=True)
    assert (config.model_type, config.hidden_size, config.head_dim, config.num_hidden_layers) == ("sdar", 32, 8, 2)
    assert (config.block_size, config.mask_token_id, config.tie_word_embeddings) == (4, MASK, False)
    assert config.dtype == torch.bfloat16 and config.rms_norm_eps == described(tmp_path / "sdar")["rms_norm_eps"]
    assert not (folder / "configuration_sdar.py").exists()


def test_a_mask_elsewhere_is_refused_unless_it_is_said_where_it_goes(tmp_path: Path) -> None:
    with pytest.raises(
        ConversionError, match="mask_token_id=60, but SGLang and LMDeploy assume 151669.*--remap-mask.*--keep"
    ):
        export_layout(ours(tmp_path), tmp_path / "sdar", "sdar")
    assert not (tmp_path / "sdar").exists()


def test_block_diffusion_is_no_qwen3(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="objective=block cannot be written as qwen3: .* the next token's"):
        export_layout(ours(tmp_path), tmp_path / "qwen", "qwen3")


@pytest.mark.parametrize(
    ("model", "match"),
    [
        ({"qk_norm": False}, "qk_norm=false cannot be written as sdar"),
        ({"style": "paper", "num_kv_heads": 4, "qk_norm": False}, "style=paper cannot be written as sdar"),
    ],
)
def test_a_model_it_cannot_express_is_refused(model: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=match):
        export_layout(ours(tmp_path, model=model), tmp_path / "sdar", "sdar", mask="moved")


def test_shifted_logits_are_refused(tmp_path: Path) -> None:
    folder = ours(tmp_path, diffusion={"objective": "ar"})
    with pytest.raises(ConversionError, match="objective=ar has shifted logits"):
        export_layout(folder, tmp_path / "sdar", "sdar")


@pytest.mark.usefixtures("few_rows")
def test_the_tool_writes_the_layout_from_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours(tmp_path)
    arguments = [str(tmp_path / "ours"), "--out", str(tmp_path / "sdar"), "--layout", "sdar"]
    assert tool.main(arguments) == 2
    assert "--remap-mask" in capsys.readouterr().err
    assert tool.main([*arguments, "--remap-mask", "--dtype", "bf16"]) == 0
    assert described(tmp_path / "sdar")["torch_dtype"] == "bfloat16"
    assert tool.main([*arguments, "--keep-mask"]) == 0
    assert described(tmp_path / "sdar")["mask_token_id"] == MASK
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "ours_hf", "sdar"]
