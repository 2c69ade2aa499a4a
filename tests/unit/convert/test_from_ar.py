"""Qwen3, Llama and SDAR folders become ours and go back, with transformers' own classes as references."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file

from bd3_megatron.checkpoint.layout import step_name
from bd3_megatron.checkpoint.read import open_checkpoint
from bd3_megatron.config.load import load_config
from bd3_megatron.config.objective import block_sizes
from bd3_megatron.config.schema import Config
from bd3_megatron.convert.from_ar import ArSource, describe_as_bd3, read_ar_folder
from bd3_megatron.convert.from_checkpoint import convert_checkpoint
from bd3_megatron.convert.from_hf import read_folder
from bd3_megatron.convert.layouts import export_layout
from bd3_megatron.convert.sdar import SDAR_MASK_ID
from bd3_megatron.convert.start_run import refuse_other_shape, start_run
from bd3_megatron.data.tokenizer_open import check_folder_tokenizer, open_tokenizer
from bd3_megatron.errors import ConversionError, TokenizerError
from bd3_megatron.hf.plain_bd3 import plain_model
from tests.tolerances import FOREIGN_LOGITS
from tests.unit.convert.models import run_config

ROWS = 72
"""Of the source's tables."""
SHAPE: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OURS = {"layer_norm_eps": 1e-6, "rope_base": 10000.0}


def qwen3(folder: Path, *, tied: bool) -> Any:
    config = transformers.Qwen3Config(**SHAPE, head_dim=12, tie_word_embeddings=tied)
    return saved(transformers.Qwen3ForCausalLM(config), folder)


def llama(folder: Path, **more: Any) -> Any:
    return saved(
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, tie_word_embeddings=False, **more)), folder
    )


def saved(model: Any, folder: Path) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    model.eval().save_pretrained(folder)
    return model


def causal_logits(model: Any, ids_BL: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids_BL).logits


def tokens() -> torch.Tensor:
    return torch.randint(0, ROWS, (2, 12), generator=torch.Generator().manual_seed(1))


def qwen_run(run_dir: Path, *, tied: bool, objective: str = "ar") -> Config:
    return run_config(
        run_dir,
        model={"head_dim": 12, "tie_embeddings": tied, **OURS},
        diffusion={"objective": objective, "block_size": 4},
    )


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_qwen3_goes_through_a_run_and_back_to_the_bit(tied: bool, tmp_path: Path) -> None:
    source = qwen3(tmp_path / "qwen", tied=tied)
    config = qwen_run(tmp_path / "run", tied=tied)
    report = start_run(tmp_path / "qwen", config, vocab_size=ROWS, mask_id=None)
    assert report.max_logit_difference < 1e-5
    convert_checkpoint(tmp_path / "run", tmp_path / "ours")
    ours = plain_model(*read_folder(tmp_path / "ours"))(tokens())
    assert (ours - causal_logits(source, tokens())).abs().max() <= FOREIGN_LOGITS
    export_layout(tmp_path / "ours", tmp_path / "back", "qwen3", dtype=torch.float32)
    back = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert torch.equal(causal_logits(back, tokens()), causal_logits(source, tokens()))
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("qwen", "back"))
    assert set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_llama_is_the_same_model_under_our_rule(tmp_path: Path) -> None:
    source = llama(tmp_path / "llama")
    config = run_config(
        tmp_path / "run", model={"qk_norm": False, **OURS}, diffusion={"objective": "ar", "block_size": 4}
    )
    start_run(tmp_path / "llama", config, vocab_size=ROWS, mask_id=None)
    convert_checkpoint(tmp_path / "run", tmp_path / "ours")
    ours = plain_model(*read_folder(tmp_path / "ours"))(tokens())
    assert (ours - causal_logits(source, tokens())).abs().max() <= FOREIGN_LOGITS


@pytest.mark.parametrize(("vocab_size", "mask_id"), [(ROWS, 70), (ROWS + 1, ROWS), (65, 64)])
@pytest.mark.parametrize("mask_init", ["mean", "noise"])
def test_the_mask_gets_a_row_and_the_others_stay(vocab_size: int, mask_id: int, mask_init: Any, tmp_path: Path) -> None:
    qwen3(tmp_path / "qwen", tied=False)
    foreign = read_ar_folder(tmp_path / "qwen")
    described = describe_as_bd3(foreign, vocab_size=vocab_size, mask_id=mask_id, block_size=4, length=32)
    assert (foreign.logit_alignment, described.logit_alignment) == ("shifted", "none")
    source, again = (ArSource(foreign, described, mask_init=mask_init) for _ in range(2))
    stored = load_file(tmp_path / "qwen" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        table, rows = source.tensor(name), stored[name]
        assert source.shape(name) == table.shape == (vocab_size, 32)
        others = [row for row in range(min(vocab_size, ROWS)) if row != mask_id]
        assert torch.equal(table[others], rows[others])
        distance = (table[mask_id] - rows.mean(0)).abs().max()
        assert (distance < 1e-6) == (mask_init == "mean")
        assert torch.equal(table, again.tensor(name))


def test_an_ar_model_starts_a_block_diffusion_run(tmp_path: Path) -> None:
    qwen3(tmp_path / "qwen", tied=True)
    config = qwen_run(tmp_path / "run", tied=True, objective="block")
    start_run(tmp_path / "qwen", config, vocab_size=ROWS, mask_id=70)
    manifest = open_checkpoint(tmp_path / "run" / "checkpoints" / step_name(0)).manifest
    assert manifest.origin == {"model_type": "qwen3", "logit_alignment": "shifted", "mask_row": "mean"}
    assert (manifest.step, manifest.kind, manifest.mask_id, manifest.train_state) == (0, "whole", 70, {})
    with pytest.raises(ConversionError, match="holds checkpoints already; name a new run.dir"):
        start_run(tmp_path / "qwen", config, vocab_size=ROWS, mask_id=70)


def test_our_folder_goes_through_a_run_and_back_to_the_byte(tmp_path: Path) -> None:
    qwen3(tmp_path / "qwen", tied=True)
    start_run(tmp_path / "qwen", qwen_run(tmp_path / "a", tied=True, objective="block"), vocab_size=ROWS, mask_id=70)
    convert_checkpoint(tmp_path / "a", tmp_path / "hf_a")
    start_run(tmp_path / "hf_a", qwen_run(tmp_path / "b", tied=True, objective="block"), vocab_size=ROWS, mask_id=70)
    convert_checkpoint(tmp_path / "b", tmp_path / "hf_b")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "hf_a" / name).read_bytes() == (tmp_path / "hf_b" / name).read_bytes()
    with pytest.raises(ConversionError, match="has 72 ids and mask 70, the run's data has 72 and 71"):
        start_run(
            tmp_path / "hf_a", qwen_run(tmp_path / "c", tied=True, objective="block"), vocab_size=ROWS, mask_id=71
        )


def test_a_model_section_that_says_something_else_is_told_what_to_say(tmp_path: Path) -> None:
    qwen3(tmp_path / "qwen", tied=True)
    config = run_config(tmp_path / "run", diffusion={"objective": "ar"})
    with pytest.raises(ConversionError) as caught:
        start_run(tmp_path / "qwen", config, vocab_size=ROWS, mask_id=None)
    for text in (
        "model.head_dim=12 (is 8)",
        "model.tie_embeddings=True (is False)",
        "model.layer_norm_eps=1e-06 (is 1e-05)",
    ):
        assert text in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_biases_are_refused_unless_they_are_zero(tmp_path: Path) -> None:
    config = transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True)
    model = transformers.Qwen2ForCausalLM(config)
    model.save_pretrained(tmp_path / "zero")
    foreign = read_ar_folder(tmp_path / "zero")
    described = describe_as_bd3(foreign, vocab_size=ROWS, mask_id=70, block_size=4, length=32)
    assert not [name for name in ArSource(foreign, described).names() if name.endswith("bias")]
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.bias.fill_(0.5)
    model.save_pretrained(tmp_path / "biased")
    with pytest.raises(
        ConversionError, match="layers.0.self_attn.q_proj.bias is not zero; attention here has no biases"
    ):
        ArSource(read_ar_folder(tmp_path / "biased"), described)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "gpt2"}, "holds model_type='gpt2'; this reads qwen3, qwen2, llama, sdar"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': an activation other than"),
        ({"use_sliding_window": True}, "sliding-window attention cannot be expressed"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "has sliding_attention layers"),
        ({"num_experts": 8}, "is a mixture of experts"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rotary positions of type 'llama3'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "yarn"}}, "rotary positions of type 'yarn'"),
    ],
)
def test_what_the_modern_style_cannot_express_is_refused(change: dict[str, Any], match: str, tmp_path: Path) -> None:
    llama(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConversionError, match=match):
        read_ar_folder(tmp_path)


HUB: dict[str, dict[str, Any]] = {
    "ar_to_bd_qwen3_0b6": {
        **{"model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16},
        **{"num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072, "rms_norm_eps": 1e-6},
        **{"rope_theta": 1000000, "rope_scaling": None, "tie_word_embeddings": True, "vocab_size": 151936},
        **{"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False, "max_window_layers": 28},
        **{"bos_token_id": 151643, "eos_token_id": 151645, "max_position_embeddings": 40960},
    },
    "ar_to_bd_smollm2_135m": {
        **{"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9},
        **{"num_key_value_heads": 3, "intermediate_size": 1536, "rms_norm_eps": 1e-5, "rope_theta": 100000},
        **{
            "rope_scaling": None,
            "tie_word_embeddings": True,
            "vocab_size": 49152,
            "hidden_act": "silu",
            "mlp_bias": False,
        },
        **{"attention_bias": False, "bos_token_id": 0, "eos_token_id": 0, "max_position_embeddings": 8192},
    },
}
"""config.json as the hub has it."""


@pytest.mark.parametrize("name", HUB)
def test_a_shipped_config_describes_the_model_it_names(name: str, root: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HUB[name]))
    config = load_config(root / "configs" / f"{name}.yaml")
    rows = config.model.vocab_size or HUB[name]["vocab_size"] + 1
    foreign = read_ar_folder(tmp_path)
    described = describe_as_bd3(
        foreign, vocab_size=rows, mask_id=rows - 1, block_size=block_sizes(config)[0], length=config.data.seq_len
    )
    refuse_other_shape(described, config)


def test_both_spellings_of_the_rotary_base_are_read(tmp_path: Path) -> None:
    llama(tmp_path)
    path = tmp_path / "config.json"
    tree = json.loads(path.read_text())
    for change in (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": None, "rope_theta": 5e5},
    ):
        path.write_text(json.dumps(tree | change))
        assert read_ar_folder(tmp_path).shape["rope_theta"] == 5e5


def test_an_sdar_folder_is_read_with_its_mask_and_block(tmp_path: Path) -> None:
    model = qwen3(tmp_path / "qwen", tied=False)
    # final states of a trained model have a direction in common
    model.model.embed_tokens.weight.data += 2.0
    saved(model, tmp_path / "qwen")
    config = qwen_run(tmp_path / "run", tied=False, objective="block")
    start_run(tmp_path / "qwen", config, vocab_size=ROWS, mask_id=70)
    convert_checkpoint(tmp_path / "run", tmp_path / "ours")
    export_layout(tmp_path / "ours", tmp_path / "sdar", "sdar", mask="moved", dtype=torch.float32)
    foreign = read_ar_folder(tmp_path / "sdar")
    assert (foreign.model_type, foreign.block_size, foreign.mask_id) == ("sdar", 4, SDAR_MASK_ID)
    assert foreign.logit_alignment == "none"


def test_another_tokenizer_of_equal_size_is_refused(tmp_path: Path) -> None:
    qwen3(tmp_path / "qwen", tied=False)
    words = {name: {f"w{i if name == 'one' else 68 - i}": i for i in range(69)} for name in ("one", "other")}
    for name, vocabulary in words.items():
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
        made.add_special_tokens(["w1", "<|mask|>"])
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="w1", mask_token="<|mask|>")
        fast.save_pretrained(tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        shutil.copy(path, tmp_path / "qwen" / path.name)
    one, other = (open_tokenizer(tmp_path / name) for name in ("one", "other"))
    assert one.vocab_size == other.vocab_size == 70
    check_folder_tokenizer(tmp_path / "qwen", (one.fingerprint, "the data"))
    config = qwen_run(tmp_path / "run", tied=False, objective="block")
    with pytest.raises(TokenizerError, match="qwen has the tokenizer .*, the data has .*: the same ids are other text"):
        start_run(tmp_path / "qwen", config, vocab_size=ROWS, mask_id=70, tokenizer=(other.fingerprint, "the data"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_mask_that_is_the_end_token_is_refused(tmp_path: Path) -> None:
    qwen3(tmp_path / "qwen", tied=False)
    config = qwen_run(tmp_path / "run", tied=False, objective="block")
    with pytest.raises(TokenizerError, match="qwen: the mask id 2 is also the id of eos"):
        start_run(tmp_path / "qwen", config, vocab_size=ROWS, mask_id=2)
