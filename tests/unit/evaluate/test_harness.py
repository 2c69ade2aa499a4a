"""The real lm-evaluation-harness on a tiny model with a planted rule; likelihoods against enumeration."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance

from bd3_megatron.cli import main
from bd3_megatron.convert.to_hf import write_folder
from bd3_megatron.errors import RangeError, SamplingError, TokenizerError
from bd3_megatron.evaluate.harness import HarnessModel
from bd3_megatron.evaluate.noise_plan import pattern_weights
from bd3_megatron.hf.configuration_bd3 import BD3Config
from bd3_megatron.hf.plain_bd3 import PlainBD3
from tests import tolerances
from tests.unit.evaluate.planted import answer, write_tasks
from tests.unit.evaluate.tiny import tiny_model
from tests.unit.sampling.folders import write_tokenizer

EOS, MASK = 1, 20


def asked(kind: str, *arguments: tuple[object, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]  # type: ignore[arg-type]


def small(folder: Path, **fields: object) -> tuple[Path, PlainBD3]:
    """An exported float64 folder of a model over words w2 .. w19, and the model."""
    config = BD3Config(
        vocab_size=21,
        num_hidden_layers=2,
        hidden_size=8,
        num_attention_heads=2,
        intermediate_size=16,
        mask_token_id=MASK,
        bos_token_id=0,
        eos_token_id=EOS,
        **{"max_position_embeddings": 8, "block_size": 4, **fields},  # type: ignore[arg-type]
    )
    model = PlainBD3(config).double().eval()
    # the length shows in no weight
    model.load_state_dict(tiny_model(4, vocab=21, layers=2).state_dict())
    tokenizer = write_tokenizer(folder / "tokenizer")
    write_folder(model.state_dict(), config, folder / "hf", tokenizer_dir=tokenizer, dtype=torch.float64)
    return folder / "hf", model


@torch.no_grad()
def bound(model: PlainBD3, ids: list[int], scored: range, size: int) -> float:
    """-log-likelihood bound of some tokens: every mask pattern of the scored tokens of every block, one pass each."""
    total = 0.0
    for start in range(scored.start // size * size, scored.stop, size):
        free = [i for i in range(start, start + size) if i in scored]
        weights = pattern_weights(len(free), 0.001)
        for bits in itertools.product((False, True), repeat=len(free)):
            masked = [i for i, bit in zip(free, bits, strict=True) if bit]
            if not masked:
                continue
            noisy = torch.tensor([[*ids[: start + size], *[MASK] * (start + size - len(ids))]])
            noisy[0, masked] = MASK
            logits = model(noisy)[0]
            logits[:, MASK] = -torch.inf
            log_p = logits.log_softmax(dim=-1)
            total -= weights[len(masked) - 1] * sum(log_p[i, ids[i]].item() for i in masked)
    return total


def test_the_rule_decides_three_local_tasks(planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = write_tasks(tmp_path)
    tasks = ["--tasks", "rule_choice,rule_text", "rule_write", "--include-path", str(tmp_path)]
    assert main(["evaluate", str(planted), *tasks, "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    results = found["results"]
    assert results["rule_choice"]["acc,none"] == 1.0 and found["n-shot"]["rule_choice"] == 1
    assert results["rule_write"]["exact_match,none"] == 1.0
    model = HarnessModel(str(planted), device="cpu")
    nats = -sum(model.loglikelihood_rolling(asked("loglikelihood_rolling", *((text,) for text in texts))))
    num_bytes = sum(map(len, texts))
    assert results["rule_text"]["bits_per_byte,none"] == pytest.approx(nats / math.log(2) / num_bytes)
    assert results["rule_text"]["word_perplexity,none"] == pytest.approx(math.exp(nats / len(texts)))
    # three letters of four in eight bytes cannot be known, and the end is a guess between two lengths
    assert 0.6 < nats / math.log(2) / num_bytes < 1.3
    assert found["config"]["bd3_likelihood"].startswith("bound on the likelihood, without noise")
    assert "isolated packing aligned to 4" in found["config"]["bd3_convention"]


def test_the_trained_continuation_is_preferred_by_far(planted: Path) -> None:
    model = HarnessModel(str(planted), device="cpu")
    right, *wrong = model.loglikelihood(
        asked("loglikelihood", *(("abd=", one) for one in (answer("abd"), "dcb", "mno", "bbb")))
    )
    assert right[0] > -0.2 and right[1]
    assert all(value < -2 and not is_greedy for value, is_greedy in wrong)


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_likelihoods_equal_enumeration(tmp_path: Path, block_size: int) -> None:
    folder, plain = small(tmp_path, block_size=block_size)
    model = HarnessModel(str(folder), device="cpu", packing="isolated", batch_size="3")
    cases = [("w5 w3 w7", " w2"), ("w5 w3 w7", " w2 w9 w4"), ("w6", " w8 w8"), ("", "w4 w2 w3 w11 w12")]
    found = model.loglikelihood(asked("loglikelihood", *cases))
    for (context, continuation), (value, _) in zip(cases, found, strict=True):
        given, ids = len(context.split()), [int(w[1:]) for w in f"{context} {continuation}".split()]
        expected = bound(plain, ids, range(given, len(ids)), block_size)
        assert value == pytest.approx(-expected, abs=tolerances.EXACT_FP64)
    document = [4, 2, 3, 11, 12, EOS]
    document += [EOS] * (-len(document) % block_size)
    expected = bound(plain, document, range(len(document)), block_size)
    (rolled,) = model.loglikelihood_rolling(asked("loglikelihood_rolling", ("w4 w2 w3 w11 w12",)))
    assert rolled == pytest.approx(-expected, abs=tolerances.EXACT_FP64)


def test_wrapped_text_begins_behind_an_end_token_and_rows_behind_a_beginning(tmp_path: Path) -> None:
    folder, plain = small(tmp_path)
    ids = [4, 2, 3]
    for options, start, end in (
        ({}, [EOS], [EOS]),
        ({"append_eos": False}, [], []),
        ({"wrap_special": True}, [0], [EOS]),
    ):
        model = HarnessModel(str(folder), device="cpu", packing="wrap", **options)  # type: ignore[arg-type]
        text = [*start, *ids, *end]
        expected = bound(plain, text, range(len(start), len(text)), 4)
        (rolled,) = model.loglikelihood_rolling(asked("loglikelihood_rolling", ("w4 w2 w3",)))
        assert rolled == pytest.approx(-expected, abs=tolerances.EXACT_FP64)


def test_an_autoregressive_model_predicts_from_an_end_token(tmp_path: Path) -> None:
    folder, plain = small(tmp_path, block_size=1, objective="ar")
    model = HarnessModel(str(folder), device="cpu", packing="pad")
    found = [model.loglikelihood(asked("loglikelihood", one))[0][0] for one in (("", "w4 w2"), ("w4", " w2"))]
    with torch.no_grad():
        log_p = plain(torch.tensor([[EOS, 4, 2]]))[0].log_softmax(dim=-1)
        given = plain(torch.tensor([[4, 2]]))[0].log_softmax(dim=-1)
    assert found[0] == pytest.approx((log_p[0, 4] + log_p[1, 2]).item(), abs=tolerances.EXACT_FP64)
    assert found[1] == pytest.approx(given[0, 2].item(), abs=tolerances.EXACT_FP64)


def test_large_blocks_are_drawn_and_no_score_depends_on_the_request(tmp_path: Path) -> None:
    folder, plain = small(tmp_path, block_size=16, max_position_embeddings=16)
    model = HarnessModel(str(folder), device="cpu", draws=16)
    cases = [("w5 w3", " w2 w4"), ("w7", " w2 w9"), ("w5 w3", " w9 w4")]
    together = model.loglikelihood(asked("loglikelihood", *cases))
    alone = [model.loglikelihood(asked("loglikelihood", one))[0] for one in reversed(cases)][::-1]
    assert [value for value, _ in together] == pytest.approx([v for v, _ in alone], abs=tolerances.EXACT_FP64)
    assert model.likelihood == "bound on the likelihood, of 6 texts from 16 draws of noise"
    # continuations of one context are compared under one noise, those of another under another
    numbers = [model._text(given, scored).noise_number for given, scored in (([5, 3], [2]), ([5, 3], [9]), ([7], [2]))]
    assert numbers[0] == numbers[1] != numbers[2]
    # two scored tokens of a block of sixteen: three patterns say all
    fresh = HarnessModel(str(folder), device="cpu")
    ((value, _),) = fresh.loglikelihood(asked("loglikelihood", cases[0]))
    assert fresh.likelihood.startswith("bound on the likelihood, without noise")
    ids = [5, 3, 2, 4]
    assert value == pytest.approx(-bound(plain, ids, range(2, 4), 16), abs=tolerances.EXACT_FP64)


def test_long_texts_lose_nothing_and_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, plain = small(tmp_path)
    model = HarnessModel(str(folder), device="cpu", packing="isolated", append_eos=False)
    words = [3, 9, 4, 2, 8, 5, 7, 6, 11, 12]
    context = " ".join(f"w{w}" for w in words[:9])
    ((value, _),) = model.loglikelihood(asked("loglikelihood", (context, " w12")))
    # the block of the tenth token sees the four before it
    assert value == pytest.approx(-bound(plain, words[4:], range(5, 6), 4), abs=tolerances.EXACT_FP64)
    said = capsys.readouterr().err
    assert "1 of 1 texts are longer than the trained length of 8 tokens" in said and "the newest 4 tokens" in said
    assert model.get_model_info()["bd3_longer_than_trained"] == {"loglikelihood": 1}
    model.generate_until(asked("generate_until", ("w3 w9 w4", {"until": [], "max_gen_toks": 6})))
    assert "generate_until: 1 of 1 texts are longer" in capsys.readouterr().err


def test_what_is_called_greedy_is_what_is_written(tmp_path: Path) -> None:
    folder, _ = small(tmp_path)
    model = HarnessModel(str(folder), device="cpu", packing="isolated")
    (written,) = model.generate_until(asked("generate_until", ("w5 w3", {"max_gen_toks": 4, "do_sample": False})))
    ((_, is_greedy),) = model.loglikelihood(asked("loglikelihood", ("w5 w3", f" {written.strip()}")))
    assert is_greedy and len(written.split()) == 4


def test_generation_stops_and_refuses_what_it_does_not_have(planted: Path) -> None:
    model = HarnessModel(str(planted), device="cpu")
    until = [{"until": [";"], "max_gen_toks": 8}, {"until": "c", "max_gen_toks": 8}, {"max_gen_toks": 12}]
    found = model.generate_until(asked("generate_until", *(("abd=", one) for one in until)))
    assert found[:2] == ["bca", "b"] and found[2].startswith("bca;")
    with pytest.raises(SamplingError, match="block decoding has no penalty_alpha; leave it out"):
        model.generate_until(asked("generate_until", ("abd=", {"penalty_alpha": 0.5})))
    with pytest.raises(SamplingError, match="block decoding has no num_beams"):
        model.generate_until(asked("generate_until", ("abd=", {"num_beams": 4})))


def test_folders_tasks_and_numbers_that_cannot_be_served_are_named(
    planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RangeError, match="batch_size=auto is no whole number from 1 on"):
        HarnessModel(str(planted), device="cpu", batch_size="auto")
    config = BD3Config(vocab_size=4, hidden_size=8, num_attention_heads=2, mask_token_id=3, num_hidden_layers=1)
    write_folder(PlainBD3(config).state_dict(), config, tmp_path / "hf")
    with pytest.raises(TokenizerError, match="has no tokenizer with an end token"):
        HarnessModel(str(tmp_path / "hf"), device="cpu")
    tasks = ["evaluate", str(planted), "--device", "cpu", "--tasks", "rule_choice"]
    for wrong, sentence in (
        (["--include-path", str(tmp_path / "none")], "is not a folder; give the folder of the tasks' YAML files"),
        (["--official"], "--tasks takes neither --official nor --num-sequences"),
        (["--limit", "0"], "--limit 0 is out of range"),
    ):
        assert main([*tasks, *wrong]) == 2
        assert sentence in capsys.readouterr().err
