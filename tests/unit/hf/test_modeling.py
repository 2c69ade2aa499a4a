"""The exported folder through transformers: remote code, both heads, dtypes, masks, labels, generate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from bd3_megatron.convert.to_hf import write_folder
from bd3_megatron.hf.modeling_bd3 import BD3ForCausalLM, BD3ForMaskedLM
from tests.tolerances import CACHED_FP64, EXACT_FP64
from tests.unit.hf.models import MASK, STYLES, decode, noised, tiny_config, tiny_model, tokens

HF = Path(__file__).parents[3] / "bd3_megatron" / "hf"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An exported fp64 folder, and a place of its own for transformers' copies of its code."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = tiny_model(4)
    write_folder(model.state_dict(), tiny_config(4), tmp_path / "exported", dtype=torch.float64)
    return tmp_path / "exported"


def test_the_modelling_file_names_every_file_that_travels() -> None:
    text = (HF / "modeling_bd3.py").read_text("utf-8")
    others = {path.stem for path in HF.glob("*.py")} - {"__init__", "modeling_bd3"}
    assert {name for name in others if f"from .{name} import" in text} == others


@pytest.mark.parametrize("kind", [AutoModelForMaskedLM, AutoModelForCausalLM])
def test_an_exported_folder_loads_as_remote_code_and_gives_the_plain_logits(folder: Path, kind: type) -> None:
    loaded = kind.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64)
    clean = tokens(2, 32)
    noisy = noised(clean)
    expected = tiny_model(4)(noisy, clean)
    found = loaded(input_ids=noisy, context_ids=clean).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=EXACT_FP64)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(loaded(clean).logits, tiny_model(4)(clean), rtol=0, atol=EXACT_FP64)


def test_logits_come_in_the_dtype_asked_for(folder: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        loaded = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
        assert loaded(tokens(1, 32), context_ids=tokens(1, 32)).logits.dtype == dtype


def test_generate_in_the_folder_gives_the_engines_tokens(folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64)
    prompts = [[2, 3, 4], [5, 6, 7]]
    expected = decode(tiny_model(4), prompts, 12, seed=9)[0]
    assert loaded.generate(torch.tensor(prompts), max_new_tokens=12, seed=9).tolist() == expected
    torch.manual_seed(9)
    assert loaded.generate(input_ids=torch.tensor(prompts), max_length=15).tolist() == expected
    padded = torch.tensor([[0, 0, 2, 3, 4]])
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    assert loaded.generate(padded, attention_mask=mask, num_tokens=12, seed=9).tolist() == expected[:1]
    greedy = decode(tiny_model(4), [[0]], 12, temperature=0, seed=1)[0]
    assert loaded.generate(max_new_tokens=12, do_sample=False, seed=1).tolist() == greedy


def test_generate_pads_texts_that_end_early_and_returns_to_training_mode() -> None:
    model = BD3ForMaskedLM(tiny_config(4, pad_token_id=9)).double()
    model.load_state_dict(tiny_model(4).state_dict())
    model.train()
    prompts = tokens(6, 3, seed=4)
    found = model.generate(prompts, max_new_tokens=40, seed=3, stop_at_eos=True).tolist()
    expected = decode(tiny_model(4), prompts.tolist(), 40, seed=3, stop_at_eos=True)[0]
    width = max(map(len, expected))
    assert found == [text + [9] * (width - len(text)) for text in expected]
    assert model.training


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_new_tokens": 4, "num_beams": 3}, "generate got num_beams, which it does not know"),
        ({}, "give exactly one of max_new_tokens, num_tokens and max_length"),
        ({"max_new_tokens": 4, "top_p": 2.0}, "top_p=2.0 is out of range"),
        ({"max_new_tokens": 4, "attention_mask": torch.ones(1, 2)}, "attention_mask has shape"),
    ],
)
def test_generate_refuses_what_it_would_have_to_ignore(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        BD3ForCausalLM(tiny_config(4)).generate(tokens(1, 3), **options)


def test_generate_from_nothing_needs_a_bos_token() -> None:
    with pytest.raises(ValueError, match="the prompt is empty and the model has no BOS token"):
        BD3ForCausalLM(tiny_config(4, bos_token_id=None)).generate(max_new_tokens=4)


@pytest.mark.parametrize("style", STYLES)
def test_a_saved_model_loads_again_tied_or_not(style: str, tmp_path: Path) -> None:
    model = BD3ForMaskedLM(tiny_config(4, style=style)).eval()
    model.save_pretrained(tmp_path)
    again = BD3ForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(model(tokens(1, 32)).logits, again(tokens(1, 32)).logits)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == (style == "tied")


def test_padding_is_a_document_that_no_token_sees() -> None:
    model = BD3ForMaskedLM(tiny_config(4)).double().eval()
    ids = tokens(1, 32)
    other = ids.clone()
    other[:, 20:] = tokens(1, 12, seed=8)
    mask = (torch.arange(32) < 20).long()[None]
    first, second = model(ids, attention_mask=mask).logits, model(other, attention_mask=mask).logits
    torch.testing.assert_close(first[:, :20], second[:, :20], rtol=0, atol=EXACT_FP64)
    documents = torch.tensor([[0] * 8 + [1] * 24])
    both = model(ids, attention_mask=mask, document_ids=documents).logits
    alone = model(ids[:, :20], document_ids=documents[:, :20]).logits
    torch.testing.assert_close(both[:, :20], alone, rtol=0, atol=CACHED_FP64)
    with pytest.raises(ValueError, match="give one 0 or 1 a token"):
        model(ids, attention_mask=mask[:, :5])


def test_labels_give_the_mean_cross_entropy_shifted_only_for_ar() -> None:
    ids = tokens(1, 32)
    masked = BD3ForMaskedLM(tiny_config(4)).eval()
    labels = ids.masked_fill(torch.arange(32) % 2 == 0, -100)
    own = masked(noised(ids), context_ids=ids, labels=labels)
    kept = own.logits[0, 1::2].log_softmax(-1).gather(-1, ids[0, 1::2, None])
    torch.testing.assert_close(own.loss, -kept.mean())
    causal = BD3ForCausalLM(tiny_config(1, objective="ar")).eval()
    found = causal(ids, labels=ids, return_dict=False)
    next_token = found[1][0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
    torch.testing.assert_close(found[0], -next_token.mean())
    assert len(causal(ids, return_dict=False)) == 1
    assert MASK == masked.config.mask_token_id
