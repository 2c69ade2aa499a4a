"""What an exported folder promises to users of transformers, tried in a process that has nothing of this package.

    python folder_contract.py FOLDER

prints one JSON object: the version of transformers, and for every check "ok" or what was wrong. The folder holds a block
model in float32 with a word-level tokenizer (BOS 0, EOS 1, mask 20, words w2 to w19).
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

OURS = {"bd3_megatron", "launch", "tools", "megatron", "deepspeed", "tests"}


class Absent(PathFinder):
    """Finds everything but this package and what it trains with."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.split(".")[0] in OURS else super().find_spec(name, path, target)


sys.meta_path = [
    Absent if finder is PathFinder else finder for finder in sys.meta_path if "editable" not in repr(finder).lower()
]

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import (  # noqa: E402
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    GenerationConfig,
    TextStreamer,
    pipeline,
    set_seed,
)

FOLDER = sys.argv[1]
MASK, EOS = 20, 1
PROMPT = torch.tensor([[2, 3, 5, 7, 11]])
CHECKS: list[Callable[[], object]] = []


def check(function: Callable[[], object]) -> Callable[[], object]:
    """Register a check: it raises where the promise is broken."""
    CHECKS.append(function)
    return function


def loaded(kind: Any = AutoModelForMaskedLM, folder: str = FOLDER, **options: Any) -> Any:
    return kind.from_pretrained(folder, trust_remote_code=True, **options).eval()


@functools.cache
def shared() -> Any:
    """One model for the checks that change nothing in it."""
    return loaded()


def refused(sentence: str, call: Callable[[], object]) -> None:
    """Assert that a call ends in one sentence."""
    try:
        call()
    except ValueError as error:
        assert sentence in str(error) and "\n" not in str(error), str(error)
        return
    raise AssertionError("was not refused")


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    difference = (found.double() - expected.double()).abs().max().item()
    assert difference <= tolerance, f"differs by {difference:.3g}"


@check
def every_load_in_a_process_has_a_generation_config() -> None:
    for kind in (AutoModelForMaskedLM, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForCausalLM):
        assert loaded(kind).generation_config.do_sample is True


@check
def the_body_gives_hidden_states() -> None:
    assert loaded(AutoModel)(PROMPT).last_hidden_state.shape == (1, 5, 16)


@check
def the_tokenizer_loads_without_a_question() -> None:
    said, start = io.StringIO(), time.monotonic()
    with contextlib.redirect_stdout(said):
        tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
    assert tokenizer("w2 w3").input_ids == [2, 3] and said.getvalue() == "" and time.monotonic() - start < 10


@check
def a_pipeline_writes_text_twice() -> None:
    for _ in range(2):
        write = pipeline("text-generation", model=FOLDER, trust_remote_code=True)
        # an EOS token may come first, and ends the text
        set_seed(1)
        found = write("w2 w3", max_new_tokens=6)[0]["generated_text"]
        assert found.startswith("w2 w3") and len(found) > 5, found
    again = write("w2 w3", max_new_tokens=6, return_full_text=False)[0]["generated_text"]
    assert not again.startswith("w2 w3 w2 w3")


@check
def a_pipeline_pads_a_batch() -> None:
    write = pipeline("text-generation", model=FOLDER, trust_remote_code=True)
    write.tokenizer.pad_token, write.tokenizer.padding_side = "w19", "left"
    found = write(["w2 w3 w4 w5 w6", "w7"], max_new_tokens=6, batch_size=2)
    assert found[0][0]["generated_text"].startswith("w2 w3 w4 w5 w6")
    assert "w7" in found[1][0]["generated_text"]


@check
def the_given_columns_come_back_and_new_tokens_behind_them() -> None:
    padded = torch.cat([torch.tensor([[19, 19, 19]]), PROMPT], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 5])
    alone = shared().generate(PROMPT, max_new_tokens=6, seed=4, stop_at_eos=False)
    found = shared().generate(padded, attention_mask=mask, max_new_tokens=6, seed=4, stop_at_eos=False)
    assert found[:, :8].tolist() == padded.tolist() and found[:, 8:].tolist() == alone[:, 5:].tolist()


@check
def padding_in_front_moves_no_logits() -> None:
    padded = torch.cat([torch.tensor([[19, 19, 19]]), PROMPT], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 5])
    close(shared()(padded, attention_mask=mask).logits[:, 3:], shared()(PROMPT).logits)


@check
def padding_behind_moves_no_logits() -> None:
    padded, mask = torch.cat([PROMPT, PROMPT], dim=1), torch.tensor([[1] * 5 + [0] * 5])
    close(shared()(padded, attention_mask=mask).logits[:, :5], shared()(PROMPT).logits)


@check
def a_soft_mask_is_refused() -> None:
    refused("values other than 0 and 1", lambda: shared()(PROMPT, attention_mask=torch.full((1, 5), 0.5)))


@check
def a_misspelt_name_is_refused() -> None:
    refused("forward got clean_ids", lambda: shared()(PROMPT, clean_ids=PROMPT))


@check
def labels_without_masked_inputs_are_refused() -> None:
    refused("labels stand where the input is not masked", lambda: shared()(PROMPT, labels=PROMPT))
    assert shared()(torch.full_like(PROMPT, MASK), context_ids=PROMPT, labels=PROMPT).loss > 0


@check
def a_block_model_is_no_next_token_model() -> None:
    refused("this model predicts blocks", lambda: loaded(AutoModelForCausalLM)(PROMPT))
    refused("this model predicts blocks", lambda: loaded(AutoModelForCausalLM)(PROMPT, labels=PROMPT))


@check
def texts_end_with_an_end_token_by_default() -> None:
    rows = PROMPT.repeat(40, 1)
    found = shared().generate(rows, max_new_tokens=24, seed=3)[:, 5:].tolist()
    ended = [row for row in found if EOS in row]
    assert ended and all(set(row[row.index(EOS) :]) == {EOS} for row in ended)
    whole = shared().generate(rows, max_new_tokens=24, seed=3, stop_at_eos=False)[:, 5:].tolist()
    assert any(set(row[row.index(EOS) :]) != {EOS} for row in whole if EOS in row)


@check
def end_and_padding_ids_are_honoured() -> None:
    rows = PROMPT.repeat(8, 1)
    found = shared().generate(rows, max_new_tokens=24, seed=3, eos_token_id=[7, 8], pad_token_id=9)[:, 5:].tolist()
    for row in found:
        first = next((i for i, token in enumerate(row) if token in (7, 8)), None)
        assert first is None or set(row[first + 1 :]) <= {9}


@check
def stop_strings_end_a_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
    options: dict[str, Any] = {"max_new_tokens": 24, "seed": 3, "stop_at_eos": False}
    whole = shared().generate(PROMPT, **options)[0].tolist()
    word = tokenizer.decode([whole[10]])
    found = shared().generate(PROMPT, stop_strings=word, tokenizer=tokenizer, **options)[0].tolist()
    assert found == whole[: len(found)] and word in tokenizer.decode(found[5:]) and len(found) < len(whole)
    refused("without a tokenizer", lambda: shared().generate(PROMPT, stop_strings=word, **options))


@check
def a_streamer_prints_the_text() -> None:
    tokenizer, said = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True), io.StringIO()
    with contextlib.redirect_stdout(said):
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        found = shared().generate(PROMPT, max_new_tokens=12, seed=4, streamer=streamer)
    assert said.getvalue().split() == tokenizer.decode(found[0, 5:], skip_special_tokens=True).split()


@check
def beams_and_processors_are_refused() -> None:
    refused("num_beams=2", lambda: shared().generate(PROMPT, max_new_tokens=4, num_beams=2))
    refused("logits_processor", lambda: shared().generate(PROMPT, max_new_tokens=4, logits_processor=[len]))


@check
def a_generation_config_is_honoured_or_refused() -> None:
    greedy = GenerationConfig(max_new_tokens=6, do_sample=False)
    found = shared().generate(PROMPT, greedy)
    assert torch.equal(found, shared().generate(PROMPT, max_new_tokens=6, do_sample=False, stop_at_eos=False))
    drawn = GenerationConfig(max_new_tokens=6, do_sample=True, top_k=1, eos_token_id=EOS)
    assert torch.equal(
        shared().generate(PROMPT, drawn, seed=1), shared().generate(PROMPT, max_new_tokens=6, top_k=1, seed=1)
    )
    refused("num_beams=3", lambda: shared().generate(PROMPT, GenerationConfig(max_new_tokens=6, num_beams=3)))


@check
def min_new_tokens_is_refused() -> None:
    refused("min_new_tokens=3", lambda: shared().generate(PROMPT, max_new_tokens=6, min_new_tokens=3))


@check
def use_cache_false_is_refused() -> None:
    refused("use_cache=False", lambda: shared().generate(PROMPT, max_new_tokens=6, use_cache=False))


@check
def no_length_is_refused_and_lengths_count_columns() -> None:
    refused("no length was asked for", lambda: shared().generate(PROMPT))
    assert shared().generate(PROMPT, max_length=9, stop_at_eos=False).shape == (1, 9)


@check
def set_seed_decides_the_text() -> None:
    set_seed(7)
    found = shared().generate(PROMPT, max_new_tokens=12, num_return_sequences=2)
    assert torch.equal(found, shared().generate(PROMPT, max_new_tokens=12, num_return_sequences=2, seed=7))
    assert found[0].tolist() != found[1].tolist()


@check
def a_saved_folder_loads_alone() -> None:
    with tempfile.TemporaryDirectory() as place:
        loaded(AutoModelForMaskedLM).save_pretrained(place)
        written = {path.name for path in Path(place).iterdir()}
        assert {path.name for path in Path(FOLDER).glob("*.py")} <= written, sorted(written)
        again = loaded(AutoModelForCausalLM, place)
        close(loaded(folder=place)(PROMPT).logits, shared()(PROMPT).logits)
        assert torch.equal(
            again.generate(PROMPT, max_new_tokens=6, seed=4), shared().generate(PROMPT, max_new_tokens=6, seed=4)
        )


@check
def half_precision_is_finite_and_close() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        half = loaded().to(dtype)
        assert half(PROMPT).logits.dtype == dtype
        close(half(PROMPT).logits, shared()(PROMPT).logits, 0.2)
        assert half.generate(PROMPT, max_new_tokens=6, seed=4, stop_at_eos=False).shape == (1, 11)


@check
def a_device_map_is_honoured_or_refused_by_transformers() -> None:
    try:
        model = loaded(device_map="cpu")
    except (ValueError, ImportError) as error:
        assert "accelerate" in str(error), str(error)
        return
    close(model(PROMPT).logits, shared()(PROMPT).logits)


@check
def checkpointed_layers_give_the_same_gradients() -> None:
    grads = []
    for enabled in (False, True):
        model = loaded().train()
        if enabled:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model(torch.full_like(PROMPT, MASK), context_ids=PROMPT, labels=PROMPT).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for plain, again in zip(*grads, strict=True):
        close(again, plain)


@check
def hidden_states_and_attentions_come_where_asked() -> None:
    told = shared()(PROMPT, output_hidden_states=True, output_attentions=True)
    assert len(told.hidden_states) == 3 and [w.shape for w in told.attentions] == [(1, 4, 5, 5)] * 2
    close(shared().lm_head(told.hidden_states[-1]), told.logits)
    assert shared()(PROMPT).hidden_states is None


@check
def an_empty_prompt_begins_with_bos() -> None:
    found = shared().generate(max_new_tokens=6, stop_at_eos=False)
    assert found.shape == (1, 7) and found[0, 0] == 0


@check
def a_read_only_copy_works_as_well() -> None:
    with tempfile.TemporaryDirectory() as place:
        copied = shutil.copytree(FOLDER, Path(place) / "copy")
        for path in copied.iterdir():
            path.chmod(0o444)
        close(loaded(folder=str(copied))(PROMPT).logits, shared()(PROMPT).logits)


@check
def nothing_of_the_package_was_imported() -> None:
    assert not OURS & {name.split(".")[0] for name in sys.modules} - {"tests"}


def main() -> None:
    results = {}
    for one in CHECKS:
        try:
            with torch.random.fork_rng():
                one()
            results[one.__name__] = "ok"
        except Exception as error:
            results[one.__name__] = f"{type(error).__name__}: {error}"[:600]
    with torch.no_grad():
        logits = shared()(torch.full_like(PROMPT, MASK), context_ids=PROMPT).logits
    text = shared().generate(PROMPT, max_new_tokens=6, seed=4, stop_at_eos=False)
    said = {"version": transformers.__version__, "logits": logits[0].tolist(), "text": text[0].tolist()}
    print(json.dumps(said | {"results": results}))


if __name__ == "__main__":
    main()
