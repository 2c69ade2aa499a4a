"""The exported folder through transformers: remote code, both heads, dtypes, masks, labels, generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, GenerationConfig

from bd3_megatron.convert.to_hf import write_folder
from bd3_megatron.hf.modeling_bd3 import BD3ForCausalLM, BD3ForMaskedLM, BD3Model
from tests.tolerances import CACHED_FP64, EXACT_FP64
from tests.unit.hf.models import MASK, STYLES, decode, noised, tiny_config, tiny_model, tokens

HF = Path(__file__).parents[3] / "bd3_megatron" / "hf"


@pytest.fixture
def folder(tmp_path: Path, own_remote_code: None) -> Path:
    """An exported fp64 folder."""
    model = tiny_model(4)
    write_folder(model.state_dict(), tiny_config(4), tmp_path / "exported", dtype=torch.float64)
    return tmp_path / "exported"


def language_model(**fields: Any) -> BD3ForMaskedLM:
    """The tiny model inside the wrapper, sampling as an exported folder does."""
    model = BD3ForMaskedLM(tiny_config(4, **fields)).double()
    model.load_state_dict(tiny_model(4).state_dict())
    model.generation_config.do_sample = True
    return model


def test_the_modelling_file_names_every_file_that_travels() -> None:
    text = (HF / "modeling_bd3.py").read_text("utf-8")
    # those of SDAR and LLaDA2 travel with folders of their layouts alone
    others = {path.stem for path in HF.glob("*.py")} - {
        *("__init__", "modeling_bd3", "configuration_sdar", "configuration_llada2_moe")
    }
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
    if kind is AutoModelForMaskedLM:
        torch.testing.assert_close(loaded(clean).logits, tiny_model(4)(clean), rtol=0, atol=EXACT_FP64)
    body = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64)
    hidden = body(noisy, context_ids=clean).last_hidden_state
    torch.testing.assert_close(loaded.lm_head(hidden), expected, rtol=0, atol=EXACT_FP64)


def test_logits_come_in_the_dtype_asked_for(folder: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        loaded = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
        assert loaded(tokens(1, 32), context_ids=tokens(1, 32)).logits.dtype == dtype


def test_generate_in_the_folder_gives_the_engines_tokens(folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64)
    prompts = [[2, 3, 4], [5, 6, 7]]
    expected = decode(tiny_model(4), prompts, 12, seed=9)[0]
    whole = {"stop_at_eos": False}
    assert loaded.generate(torch.tensor(prompts), max_new_tokens=12, seed=9, **whole).tolist() == expected
    torch.manual_seed(9)
    assert loaded.generate(input_ids=torch.tensor(prompts), max_length=15, **whole).tolist() == expected
    greedy = decode(tiny_model(4), [[0]], 12, temperature=0, seed=1)[0]
    assert loaded.generate(max_new_tokens=12, do_sample=False, seed=1, **whole).tolist() == greedy
    asked = GenerationConfig(max_new_tokens=12, eos_token_id=None)
    assert loaded.generate(generation_config=asked, bos_token_id=0, seed=1).tolist() == greedy


def test_the_given_columns_come_back_as_they_were_and_new_tokens_behind_them() -> None:
    model = language_model(pad_token_id=9)
    prompt = [2, 3, 4]
    new = decode(tiny_model(4), [prompt], 12, seed=9)[0][0][3:]
    for padded, mask in (
        ([9, 9, *prompt], [0, 0, 1, 1, 1]),
        ([*prompt, 9], [1, 1, 1, 0]),
        ([2, 5, 3, 4], [1, 0, 1, 1]),
    ):
        found = model.generate(
            torch.tensor([padded]), attention_mask=torch.tensor([mask]), max_new_tokens=12, seed=9, stop_at_eos=False
        )
        assert found[0].tolist() == [*padded, *new]
    # without a mask the padding token is padding
    found = model.generate(torch.tensor([[9, 9, *prompt]]), max_new_tokens=12, seed=9, stop_at_eos=False)
    assert found[0].tolist() == [9, 9, *prompt, *new]
    # masks in the last block of the text are filled where they stand
    filled = model.generate(torch.tensor([[2, 3, MASK, 5]]), max_new_tokens=4, seed=9)[0].tolist()
    assert (filled[:2], filled[3]) == ([2, 3], 5) and MASK not in filled


def test_texts_end_with_an_end_token_and_padding_unless_asked_otherwise() -> None:
    model = language_model(pad_token_id=9)
    model.train()
    prompts = tokens(6, 3, seed=4)
    text = torch.ones_like(prompts)
    found = model.generate(prompts, max_new_tokens=40, seed=3, attention_mask=text).tolist()
    expected = decode(tiny_model(4), prompts.tolist(), 40, seed=3, stop_at_eos=True)[0]
    width = max(map(len, expected))
    assert found == [text + [9] * (width - len(text)) for text in expected]
    assert model.training
    options = {"max_new_tokens": 40, "seed": 3, "attention_mask": text, "eos_token_id": [5, 7], "pad_token_id": 8}
    ended = model.generate(prompts, **options).tolist()
    for whole, row in zip(decode(tiny_model(4), prompts.tolist(), 40, seed=3)[0], ended, strict=True):
        stop = next((i + 1 for i, token in enumerate(whole) if token in (5, 7) and i >= 3), len(whole))
        assert row == whole[:stop] + [8] * (len(row) - stop)


def test_a_streamer_is_shown_the_prompt_and_every_block(capsys: pytest.CaptureFixture[str]) -> None:
    class Seen:
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.has_ended = False

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.has_ended = True

    model, streamer = language_model(), Seen()
    found = model.generate(torch.tensor([[2, 3, 4]]), max_new_tokens=12, seed=9, streamer=streamer)
    assert streamer.tokens == found[0].tolist() and streamer.has_ended
    with pytest.raises(ValueError, match="a streamer shows one text and 2 were asked for"):
        model.generate(torch.tensor([[2], [3]]), max_new_tokens=12, streamer=streamer)


def test_a_text_ends_where_a_stop_string_is_complete() -> None:
    class Letters:
        def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
            return "".join(chr(97 + token) for token in token_ids)

    model = language_model()
    whole = model.generate(torch.tensor([[2, 3, 4]]), max_new_tokens=20, seed=9, stop_at_eos=False)[0].tolist()
    string = Letters().decode(whole[9:11], skip_special_tokens=True)
    options = {"max_new_tokens": 20, "seed": 9, "stop_at_eos": False, "stop_strings": string}
    found = model.generate(torch.tensor([[2, 3, 4]]), tokenizer=Letters(), **options)[0].tolist()
    assert found == whole[: len(found)] and Letters().decode(found, skip_special_tokens=True).endswith(string)
    with pytest.raises(ValueError, match="stop_strings were given without a tokenizer"):
        model.generate(torch.tensor([[2, 3, 4]]), **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"max_new_tokens": 4, "inputs_embeds": torch.zeros(1, 4, 32)},
            r"generate got inputs_embeds=a tensor \[1, 4, 32\], which",
        ),
        (
            {"max_new_tokens": torch.tensor([4, 5])},
            r"^max_new_tokens=a tensor \[2\] is not one value; give a number\.$",
        ),
        ({"max_new_tokens": 4, "top_k": torch.ones(2)}, r"^top_k=a tensor \[2\] is not one value"),
        ({"max_new_tokens": 4, "num_beams": 3}, "generate got num_beams=3, which block decoding does not do"),
        ({"max_new_tokens": 4, "min_new_tokens": 3}, "min_new_tokens=3, which block decoding does not do"),
        ({"max_new_tokens": 4, "logits_processor": [1]}, r"logits_processor=\[1\], which block decoding"),
        ({"max_new_tokens": 4, "assistant_model": 7}, "assistant_model=7, which block decoding does not do"),
        ({"max_new_tokens": 4, "maximum_tokens": 7}, "maximum_tokens=7, which block decoding does not do"),
        ({"max_new_tokens": 4, "use_cache": False}, "use_cache=False was asked for; block decoding always caches"),
        ({"generation_config": GenerationConfig(num_beams=2, max_new_tokens=4)}, "num_beams=2, which"),
        ({"generation_config": GenerationConfig(return_dict_in_generate=True)}, "return_dict_in_generate=True"),
        ({}, "no length was asked for; give max_new_tokens=N"),
        ({"max_new_tokens": 4, "max_length": 9}, "max_new_tokens and max_length were both given"),
        ({"max_length": 3}, "max_length=3 leaves 0 to generate; ask for 1 or more"),
        ({"max_new_tokens": 4, "num_return_sequences": -1}, "num_return_sequences=-1 leaves -1"),
        ({"max_new_tokens": 4, "top_p": 2.0}, "top_p=2.0 is out of range"),
        ({"max_new_tokens": 4, "attention_mask": torch.ones(1, 2)}, "attention_mask has shape"),
        ({"max_new_tokens": 4, "attention_mask": torch.full((1, 3), 0.5)}, "values other than 0 and 1"),
        ({"max_new_tokens": 4, "attention_mask": torch.zeros(1, 3)}, "the prompt is empty"),
    ],
)
def test_generate_refuses_what_it_would_have_to_ignore(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        BD3ForCausalLM(tiny_config(4)).generate(tokens(1, 3), **options)


def test_what_asks_for_nothing_is_taken_by_generate() -> None:
    quiet = {"num_beams": 1, "logits_processor": None, "synced_gpus": False, "use_cache": True, "min_length": 0}
    model = language_model()
    found = model.generate(tokens(1, 3), max_new_tokens=4, seed=1, **quiet)
    assert torch.equal(found, model.generate(tokens(1, 3), max_new_tokens=4, seed=1))


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


@pytest.mark.parametrize("in_front", [0, 1, 3, 4])
def test_padding_moves_no_logits_wherever_it_stands(in_front: int) -> None:
    model = BD3ForMaskedLM(tiny_config(4)).double().eval()
    noisy, clean = noised(tokens(1, 12)), tokens(1, 12)
    front, behind = tokens(1, in_front, seed=5), tokens(1, 2, seed=6)
    mask = torch.tensor([[0] * in_front + [1] * 12 + [0] * 2])
    padded = [torch.cat([front, half, behind], dim=1) for half in (noisy, clean)]
    for alone, together in (
        (model(noisy).logits, model(padded[0], attention_mask=mask).logits),
        (model(noisy, clean).logits, model(padded[0], padded[1], attention_mask=mask).logits),
    ):
        torch.testing.assert_close(together[:, in_front : in_front + 12], alone, rtol=0, atol=CACHED_FP64)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"clean_ids": tokens(1, 8)},
            "forward got clean_ids, which it does not know; use input_ids, context_ids, document_ids",
        ),
        ({"past_key_values": 1}, "forward got past_key_values, which it does not know; use input_ids"),
        ({"attention_mask": torch.full((1, 8), 0.5)}, "attention_mask holds values other than 0 and 1"),
        ({"attention_mask": torch.ones(1, 5)}, "give one 0 or 1 a token"),
        (
            {"document_ids": torch.full((1, 8), -1)},
            r"document_ids are torch.int64 \[1, 8\] .* whole number from 0 on a token",
        ),
        ({"document_ids": torch.zeros(1, 8)}, r"document_ids are torch.float32 \[1, 8\] for input_ids \[1, 8\]"),
        # it would be broadcast, and no document would end anywhere
        ({"document_ids": torch.zeros(1, 1).long()}, r"document_ids are torch.int64 \[1, 1\] for input_ids \[1, 8\]"),
        ({"input_ids": tokens(1, 8)[0]}, r"input_ids have shape \[8\]; give token ids \[rows, columns\]"),
        ({"labels": tokens(1, 4)}, r"labels have shape \[1, 4\] and input_ids \[1, 8\]; give one label a token"),
        ({"labels": tokens(1, 8)}, "8 labels stand where the input is not masked: the model is shown those tokens"),
    ],
)
@pytest.mark.parametrize("kind", [BD3Model, BD3ForMaskedLM])
def test_forward_refuses_what_it_would_have_to_ignore(kind: type, given: dict[str, object], sentence: str) -> None:
    if kind is BD3Model and "labels" in given:
        sentence = "forward got labels, which it does not know"
    with pytest.raises(ValueError, match=sentence):
        kind(tiny_config(4))(**{"input_ids": tokens(1, 8)} | given)


def test_a_block_model_is_no_next_token_model() -> None:
    causal = BD3ForCausalLM(tiny_config(4)).eval()
    for given in ({}, {"labels": tokens(1, 8)}, {"context_ids": tokens(1, 8), "labels": tokens(1, 8)}):
        with pytest.raises(ValueError, match="this model predicts blocks: its logits belong to their own position"):
            causal(tokens(1, 8), **given)


@pytest.mark.parametrize("style", STYLES)
def test_hidden_states_and_attentions_are_those_of_the_forward(style: str) -> None:
    model = BD3ForMaskedLM(tiny_config(4, style=style)).double().eval()
    noisy, clean = noised(tokens(2, 12)), tokens(2, 12)
    plain, told = (
        model(noisy, clean),
        model(noisy, clean, output_hidden_states=True, output_attentions=True),
    )
    torch.testing.assert_close(told.logits, plain.logits, rtol=0, atol=EXACT_FP64)
    assert plain.hidden_states is None and len(told.hidden_states) == 3
    torch.testing.assert_close(model.lm_head(told.hidden_states[-1]), plain.logits, rtol=0, atol=EXACT_FP64)
    torch.testing.assert_close(told.hidden_states[0], model.model.embed_tokens(noisy), rtol=0, atol=EXACT_FP64)
    assert [weights.shape for weights in told.attentions] == [(2, 4, 12, 24)] * 2
    for weights in told.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 12).double(), rtol=0, atol=EXACT_FP64)
        # a noisy row of the first block sees that block alone
        assert weights[:, :, :4, 4:].abs().max() == 0
    assert len(model(noisy, clean, output_hidden_states=True, return_dict=False)) == 2


def test_checkpointed_layers_give_the_same_gradients() -> None:
    grads = []
    for enabled in (False, True):
        model = BD3ForMaskedLM(tiny_config(4, residual_dropout=0.3)).double().train()
        model.load_state_dict(tiny_model(4).state_dict())
        if enabled:
            # the name of 4.x, deprecated in 5.x, is tried by tests/integration/test_transformers_versions.py
            model.activation_checkpointing_enable()
        noisy, clean = noised(tokens(2, 12)), tokens(2, 12)
        torch.manual_seed(1)
        model(noisy, clean, labels=clean.masked_fill(noisy != MASK, -100)).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=EXACT_FP64)


def test_labels_give_the_mean_cross_entropy_shifted_only_for_ar() -> None:
    ids = tokens(1, 32)
    masked = BD3ForMaskedLM(tiny_config(4)).eval()
    noisy = ids.masked_fill(torch.arange(32) % 2 == 1, MASK)
    labels = ids.masked_fill(torch.arange(32) % 2 == 0, -100)
    own = masked(noisy, context_ids=ids, labels=labels)
    kept = own.logits[0, 1::2].log_softmax(-1).gather(-1, ids[0, 1::2, None])
    torch.testing.assert_close(own.loss, -kept.mean())
    causal = BD3ForCausalLM(tiny_config(1, objective="ar")).eval()
    found = causal(ids, labels=ids, return_dict=False)
    next_token = found[1][0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
    torch.testing.assert_close(found[0], -next_token.mean())
    assert len(causal(ids, return_dict=False)) == 1
