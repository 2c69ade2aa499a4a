"""The Sampler: prompts in any form, results in order, the same text whatever the batch, and sentences for bad requests."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bd3_megatron.data.tokenizer_open import open_tokenizer
from bd3_megatron.errors import CheckpointError, SamplingError, TokenizerError
from bd3_megatron.hf.modeling_bd3 import BD3ForCausalLM
from bd3_megatron.sampling.generate import Sampler
from tests.unit.hf.models import MASK, tokens
from tests.unit.sampling.folders import WORDS, exported, write_tokenizer


@pytest.fixture(scope="module")
def worded(tmp_path_factory: pytest.TempPathFactory) -> Sampler:
    """A sampler with a tokenizer."""
    root = tmp_path_factory.mktemp("worded")
    return Sampler.from_pretrained(exported(root / "out", tokenizer_dir=write_tokenizer(root / "tokenizer")))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Sampler:
    """A sampler without one."""
    return Sampler.from_pretrained(exported(tmp_path_factory.mktemp("bare") / "out"))


def test_prompts_are_texts_or_ids_one_or_several_and_results_keep_their_order(worded: Sampler) -> None:
    results = worded.generate(
        ["w5 w6 w7", [3, 4], ""], num_tokens=9, seed=2, num_samples=2, batch_size=4, stop_at_eos=False
    )
    assert [(r.prompt_index, r.sample_index) for r in results] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert [r.prompt_tokens for r in results[::2]] == [[5, 6, 7], [3, 4], [0]]
    assert all(len(r.tokens) == 9 and MASK not in r.tokens and r.stop_reason == "length" for r in results)
    assert results[0].tokens != results[1].tokens
    assert worded.generate([3, 4], num_tokens=9, seed=2, stop_at_eos=False)[0].tokens == results[2].tokens
    assert worded.generate("w5 w6 w7", num_tokens=9, seed=2, stop_at_eos=False)[0].tokens == results[0].tokens
    words = [f"w{token}" for token in results[0].tokens if token > 1]
    assert results[0].text is not None and results[0].text.split() == words


def test_batch_size_never_changes_a_text(bare: Sampler) -> None:
    prompts = [tokens(n, seed=n).tolist() for n in (3, 9, 1, 30, 4, 6, 17, 2)]
    alone = bare.generate(prompts, num_tokens=20, seed=1, batch_size=1)
    together = bare.generate(prompts, num_tokens=20, seed=1, batch_size=8)
    assert [(r.tokens, r.num_forwards) for r in alone] == [(r.tokens, r.num_forwards) for r in together]
    assert all(r.text is None for r in alone)
    one_by_one = [bare.generate([prompt], num_tokens=20, seed=1)[0].tokens for prompt in prompts]
    assert one_by_one == [r.tokens for r in together]


def test_hugging_face_generate_gives_the_same_tokens(bare: Sampler) -> None:
    model = BD3ForCausalLM(bare.config).double()
    model.load_state_dict(bare.model.state_dict())
    prompts = tokens(3, 5, seed=2)
    found = model.generate(prompts, max_new_tokens=40, seed=7, top_p=0.9, stop_at_eos=False)[:, 5:].tolist()
    results = bare.generate(prompts.tolist(), num_tokens=40, seed=7, top_p=0.9, stop_at_eos=False)
    assert found == [r.tokens for r in results]


def test_streamed_blocks_add_up_to_the_generated_text(worded: Sampler) -> None:
    whole = worded.generate("w5 w6 w7", num_tokens=30, seed=2, stop_at_eos=False)[0]
    blocks = list(worded.stream("w5 w6 w7", num_tokens=30, seed=2, stop_at_eos=False))
    assert [token for block in blocks for token in block.tokens] == whole.tokens
    assert "".join(block.text or "" for block in blocks) == whole.text
    assert [block.stop_reason for block in blocks][-2:] == [None, "length"]


def test_a_text_ends_where_a_stop_string_is_complete(worded: Sampler) -> None:
    whole = worded.generate("w5", num_tokens=40, seed=3, stop_at_eos=False)[0]
    assert whole.text is not None
    stop = " ".join(whole.text.split()[10:12])
    stops = ["never", stop]
    ended = worded.generate("w5", num_tokens=40, seed=3, stop_strings=stops, stop_at_eos=False)[0]
    assert ended.stop_reason == "string"
    assert ended.text == whole.text[: whole.text.index(stop)]
    assert ended.tokens == whole.tokens[: len(ended.tokens)]
    assert len(ended.tokens) < len(whole.tokens)


def test_eos_ends_a_text_unless_it_is_told_not_to(bare: Sampler) -> None:
    prompts = [[n] for n in range(2, 10)]
    whole = bare.generate(prompts, num_tokens=30, seed=3, stop_at_eos=False)
    ended = bare.generate(prompts, num_tokens=30, seed=3)
    assert any(r.stop_reason == "eos" for r in ended)
    asked = bare.generate(prompts, num_tokens=30, seed=3, stop_at_eos=True)
    assert [r.tokens for r in asked] == [r.tokens for r in ended]
    streamed = list(bare.stream(prompts[0], num_tokens=30, seed=3))
    assert [token for block in streamed for token in block.tokens] == ended[0].tokens
    for full, cut in zip(whole, ended, strict=True):
        keep = full.tokens.index(1) + 1 if 1 in full.tokens else 30
        assert cut.tokens == full.tokens[:keep]


def test_spans_are_filled_within_the_block_rule_and_refused_outside_it(worded: Sampler) -> None:
    result = worded.infill("w2 w3 w4 w5 w6 [MASK] w7 [MASK] [MASK]", seed=1)[0]
    assert [result.tokens[i] for i in (0, 1, 2, 3, 4, 6)] == [2, 3, 4, 5, 6, 7]
    assert len(result.tokens) == 9 and MASK not in result.tokens
    assert result.text is not None and result.text.startswith("w2 w3 w4 w5 w6 ")
    with pytest.raises(
        SamplingError, match=r"position 1 is masked, and the text given at position 4 lies where its block"
    ):
        worded.infill([2, MASK, 3, 4, 5])
    with pytest.raises(SamplingError, match="the text holds no mask token, so there is nothing to fill"):
        worded.infill([[2, 3]])


def test_figures_count_forwards_tokens_and_bytes(bare: Sampler) -> None:
    bare.generate([[1, 2, 3, 4]] * 2, num_tokens=8, seed=1)
    figures = bare.figures
    assert figures is not None
    assert (figures.num_samples, figures.num_tokens, figures.num_forwards) == (2, 16, 8)
    assert figures.forwards_per_token == 0.5
    # 2 tables, 2 layers, 2 texts, 2 key heads, 12 slots and the bin, heads of 4, fp64
    assert figures.cache_bytes == 2 * 2 * 2 * 2 * 13 * 4 * 8
    table = bare.model.model.embed_tokens.weight
    assert figures.weight_bytes == sum(p.numel() * 8 for p in bare.model.parameters()) - table.numel() * 8
    assert 0 < figures.seconds_to_first_block <= figures.seconds
    assert figures.share_of_bound(1e9) == pytest.approx(8 * figures.weight_bytes / 1e9 / figures.seconds)
    assert len(figures.lines(1e9)) == 3


def test_finished_results_are_told_as_they_come(bare: Sampler) -> None:
    told: list[int] = []
    results = bare.generate(
        [[n] for n in range(2, 8)],
        num_tokens=30,
        seed=3,
        on_finished=lambda r: told.append(r.prompt_index),
    )
    assert sorted(told) == list(range(6))
    assert told == sorted(told, key=lambda i: (results[i].num_forwards, i))


def test_dtype_and_device_are_chosen_at_loading(bare: Sampler, tmp_path: Path) -> None:
    folder = exported(tmp_path / "out")
    half = Sampler.from_pretrained(folder, dtype="bfloat16", device="cpu")
    assert half.model.lm_head.weight.dtype == torch.bfloat16
    assert len(half.generate([[2]], num_tokens=5)[0].tokens) == 5
    with pytest.raises(SamplingError, match="dtype='int4' is unknown; use one of float32, bfloat16"):
        Sampler.from_pretrained(folder, dtype="int4")
    with pytest.raises(SamplingError, match="graphs were asked for on the CPU"):
        Sampler.from_pretrained(folder, device="cpu", with_graphs=True)


@pytest.mark.parametrize(
    ("prompts", "options", "sentence"),
    [
        ("hello", {}, "the prompt is text, but the folder has no tokenizer"),
        ([], {}, "no prompts were given"),
        ([[1] * 33], {}, "the prompt has 33 tokens and the window 32; give its last 32 tokens or fewer"),
        ([[99]], {}, "token ids 99 to 99 are outside the vocabulary; use 0 to 20"),
        ([[1, MASK]], {}, "a prompt holds the mask token; use infill to fill masks"),
        ([[1]], {"num_tokens": 0}, "num_tokens=0 is out of range; use 1 to 10000000"),
        ([[1]], {"num_samples": 0}, "num_samples=0 is out of range"),
        ([[1]], {"batch_size": 0}, "batch_size=0 is out of range"),
        ([[1]], {"rule": "magic"}, "rule='magic' is unknown; use one of first_hitting"),
        ([[1]], {"top_p": 1.5}, "top_p=1.5 is out of range; use more than 0 and at most 1"),
        ([[1]], {"temperature": -1.0}, "temperature=-1.0 is out of range; use 0"),
        ([[1]], {"beams": 3}, "unknown option beams; use entropy_bound"),
        ([[1]], {"stop_strings": ["x"]}, "stop strings were given, but the folder has no tokenizer"),
    ],
)
def test_bad_requests_are_one_sentence(bare: Sampler, prompts: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SamplingError, match=sentence):
        bare.generate(prompts, **{"num_tokens": 4, **options})


def test_requests_that_the_folder_cannot_serve_are_one_sentence(tmp_path: Path, worded: Sampler) -> None:
    rootless = Sampler.from_pretrained(exported(tmp_path / "rootless", bos_token_id=None, eos_token_id=None))
    with pytest.raises(SamplingError, match="the prompt is empty and the model has no BOS token"):
        rootless.generate("", num_tokens=4)
    with pytest.raises(SamplingError, match="stop_at_eos was asked for, but the model has no EOS token"):
        rootless.generate([[2]], num_tokens=4, stop_at_eos=True)
    with pytest.raises(SamplingError, match="a stop string is empty"):
        worded.generate("w2", num_tokens=4, stop_strings=[""])


def test_damaged_folders_are_one_sentence(tmp_path: Path) -> None:
    folder = exported(tmp_path / "out")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for damage in (whole[:-100], b"\xff" * 64, b""):
        weights.write_bytes(damage)
        with pytest.raises(CheckpointError, match="model.safetensors is damaged .* copy or export the folder again"):
            Sampler.from_pretrained(folder)
    weights.write_bytes(whole)
    described = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(described | {"num_hidden_layers": 3}), "utf-8")
    with pytest.raises(CheckpointError, match="holds weights of another model"):
        Sampler.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(described), "utf-8")
    (folder / "tokenizer.json").write_text("{", "utf-8")
    with pytest.raises(TokenizerError, match="cannot be loaded"):
        Sampler.from_pretrained(folder)


ISOLATED = """
import sys
from importlib.machinery import PathFinder

class Absent(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.split(".")[0] in {"megatron", "deepspeed", "apex", "datasets", "sentencepiece", "wandb"}
        return None if hidden else super().find_spec(name, path, target)

sys.meta_path = [Absent if finder is PathFinder else finder for finder in sys.meta_path]
from bd3_megatron.cli import main
sys.exit(main(["sample", sys.argv[1], "--prompt-ids", "2,3", "--num-tokens", "6", "--seed", "4"]))
"""


def test_the_sampler_needs_no_training_engine(
    tmp_path: Path, bare: Sampler, clean_environment: Mapping[str, str]
) -> None:
    folder = exported(tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", ISOLATED, str(folder)], capture_output=True, text=True, env=dict(clean_environment)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(map(str, bare.generate([2, 3], num_tokens=6, seed=4)[0].tokens))


def test_another_tokenizer_of_equal_size_is_refused_and_the_same_saved_anew_is_not(tmp_path: Path) -> None:
    own = write_tokenizer(tmp_path / "own")
    fingerprint = open_tokenizer(own).fingerprint
    folder = exported(tmp_path / "out", tokenizer_dir=own, tokenizer_fingerprint=fingerprint)
    transformers.PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    shutil.copytree(tmp_path / "saved", folder, dirs_exist_ok=True)
    assert Sampler.from_pretrained(folder).generate(["w2 w3"], num_tokens=4)
    swapped = [*WORDS[:2], *reversed(WORDS[2:-1]), WORDS[-1]]
    write_tokenizer(tmp_path / "other", words=swapped)
    shutil.copytree(tmp_path / "other", folder, dirs_exist_ok=True)
    with pytest.raises(
        TokenizerError, match=r"out has the tokenizer .*, the model's .*config.json has .*: the same ids"
    ):
        Sampler.from_pretrained(folder)
