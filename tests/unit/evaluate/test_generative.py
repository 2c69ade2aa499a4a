"""Generated text under a scorer: the scorer is transformers' own, the points carry both sides of the trade."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from bd3_megatron.cli import main
from bd3_megatron.convert.to_hf import write_folder
from bd3_megatron.data.tokenizer_open import open_tokenizer
from bd3_megatron.errors import CheckpointError, DataError, SamplingError, TokenizerError
from bd3_megatron.evaluate.generative import GenerationRequest, frontier, grid_of, measure_samples
from bd3_megatron.evaluate.mauve_score import mauve_is_there
from bd3_megatron.evaluate.scoring_model import ScoringModel
from bd3_megatron.evaluate.text_statistics import distinct_ngrams, text_statistics, unigram_entropy
from bd3_megatron.sampling.generate import Sampler
from tests import tolerances
from tests.unit.evaluate.tiny import tiny_model

WORDS = ["<unk>", "<eos>", *(f"w{n}" for n in range(20))]


@pytest.fixture(scope="module")
def scorer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 with random weights and a vocabulary of words."""
    folder = tmp_path_factory.mktemp("scorer")
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    config = GPT2Config(vocab_size=len(WORDS), n_positions=16, n_embd=8, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scorer(scorer_folder: Path) -> ScoringModel:
    return ScoringModel.load(scorer_folder)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A block-diffusion model over bytes, with its tokenizer."""
    root = tmp_path_factory.mktemp("model")
    tokenizer = open_tokenizer("bytes")
    tokenizer.save(root / "tokenizer")
    return export(root, "block", tokenizer.vocab_size)


def export(root: Path, objective: str, vocab: int) -> Path:
    special = open_tokenizer("bytes").special
    model = tiny_model(1 if objective == "ar" else 4, vocab=vocab, objective=objective)
    shape = model.model.shape
    shape.bos_token_id, shape.eos_token_id, shape.mask_token_id = special.bos, special.eos, special.mask  # type: ignore[attr-defined]
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    write_folder(state, shape, root / objective, tokenizer_dir=root / "tokenizer")  # type: ignore[arg-type]
    return root / objective


def test_the_scoring_models_perplexity_is_transformers_own(scorer: ScoringModel) -> None:
    text = "w3 w7 w1 w1 w12 w19 w0"
    ids = scorer.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = scorer.model(input_ids=ids, labels=ids).loss.item()
    found = scorer.score(text)
    assert found.num_tokens == 6
    assert found.perplexity == pytest.approx(math.exp(loss), rel=tolerances.EVALUATION)


def test_long_texts_are_scored_in_windows_that_move_by_half(scorer: ScoringModel) -> None:
    text = " ".join(f"w{n * 7 % 20}" for n in range(30))
    ids = scorer.tokenizer(text, return_tensors="pt")["input_ids"]
    total = 0.0
    with torch.no_grad():
        for start, first, stop in ((0, 1, 16), (8, 16, 24), (16, 24, 30)):
            log_p = scorer.model(input_ids=ids[:, start:stop]).logits[0].log_softmax(dim=-1)
            total -= sum(log_p[i - 1 - start, ids[0, i]].item() for i in range(first, stop))
    found = scorer.score(text)
    assert found.num_tokens == 29
    assert found.nll_nats == pytest.approx(total, rel=tolerances.EVALUATION)


def test_end_tokens_are_seen_and_are_no_targets(scorer: ScoringModel) -> None:
    with_end = scorer.score("w3 <eos> w7")
    assert with_end.num_tokens == 1
    assert scorer.score("").perplexity is None and scorer.score("w1").num_tokens == 0


def test_the_score_of_many_is_the_mean_over_texts_with_its_error(scorer: ScoringModel) -> None:
    texts = ["w3 w7 w1", "w1 w1 w1 w1 w1", "w9", "w4 w2"]
    found = scorer.score_all(texts)
    each = [scorer.score(text).perplexity for text in texts if scorer.score(text).num_tokens]
    assert found.num_texts == 3 and found.perplexity == pytest.approx(sum(each) / 3)  # type: ignore[arg-type]
    spread = torch.tensor(each, dtype=torch.float64).std().item()
    assert found.stderr == pytest.approx(spread / math.sqrt(3))
    with pytest.raises(DataError, match="none of 1 text has a token to score"):
        scorer.score_all(["w1"])


def test_folders_that_hold_no_scorer_are_refused(scorer_folder: Path, model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        ScoringModel.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="predicts blocks, so it gives no likelihood of the next token"):
        ScoringModel.load(model_folder)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(CheckpointError, match="holds no causal language model"):
        ScoringModel.load(tmp_path)
    for path in scorer_folder.iterdir():
        if "token" not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(TokenizerError, match="holds no tokenizer"):
        ScoringModel.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be loaded"):
        ScoringModel.load(tmp_path)


def test_our_own_autoregressive_export_scores_without_running_its_code(model_folder: Path) -> None:
    root = model_folder.parent
    folder = export(root, "ar", open_tokenizer("bytes").vocab_size)
    for path in folder.glob("*.py"):
        path.write_text("raise SystemExit('this code must not run')\n")
    own = ScoringModel.load(folder)
    assert own.score("hello").num_tokens == 4


def test_statistics_of_hand_made_samples() -> None:
    samples = [[1, 1, 2, 2], [1, 2, 1], []]
    found = text_statistics(samples)
    assert unigram_entropy([1, 1, 2, 2]) == pytest.approx(math.log(2)) and unigram_entropy([]) == 0.0
    assert found["distinct_1"] == pytest.approx(2 / 7)
    # 11 12 22 | 12 21
    assert found["distinct_2"] == pytest.approx(4 / 5)
    assert distinct_ngrams([[1, 2]], 3) is None
    assert (found["length_min_tokens"], found["length_median_tokens"], found["length_max_tokens"]) == (0, 3.0, 4)


def test_a_point_carries_diversity_and_cost(model_folder: Path) -> None:
    sampler = Sampler.from_pretrained(model_folder, device="cpu")
    request = GenerationRequest(num_samples=3, num_tokens=8, seed=4, options={"top_p": 0.9})
    points = frontier(sampler, None, request, grid_of(["first_hitting", "ancestral"], [0.5, 1.0]))
    assert [(p["rule"], p["temperature"]) for p in points] == [
        ("first_hitting", 0.5),
        ("first_hitting", 1.0),
        ("ancestral", 0.5),
        ("ancestral", 1.0),
    ]
    assert all(p["top_p"] == 0.9 and p["forwards_per_token"] > 0 and p["entropy_nats"] > 0 for p in points)
    again = measure_samples(sampler, None, request, rule="ancestral", temperature=1.0)
    assert again == points[3]
    with pytest.raises(SamplingError, match="rule='none' is unknown"):
        measure_samples(sampler, None, request, rule="none")


def test_text_is_scored_by_another_tokenizer(model_folder: Path, scorer: ScoringModel) -> None:
    sampler = Sampler.from_pretrained(model_folder, device="cpu")
    point = measure_samples(sampler, scorer, GenerationRequest(num_samples=2, num_tokens=48))
    assert point["perplexity"] > 1 and point["corpus_perplexity"] > 1
    sampler.tokenizer = None
    with pytest.raises(TokenizerError, match="has no tokenizer, so its samples are no text to score"):
        measure_samples(sampler, scorer, GenerationRequest(num_samples=2, num_tokens=8))


def test_the_command_prints_the_frontier(
    model_folder: Path, scorer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--num-samples", "2", "--num-tokens", "48", "--device", "cpu", "--temperatures", "0.7", "1.0"]
    code = main(
        ["evaluate", str(model_folder), "--frontier", "--scoring-model", str(scorer_folder), *options, "--json"]
    )
    points = json.loads(capsys.readouterr().out)
    assert code == 0 and [p["temperature"] for p in points] == [0.7, 1.0] and points[0]["perplexity"] > 1


def test_mauve_is_measured_where_its_package_is_there_and_said_to_be_left_out_elsewhere(
    model_folder: Path, scorer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "human.txt").write_text("".join(f"w{n} w{n + 1}\n" for n in range(2, 10)), encoding="utf-8")
    asked = ["evaluate", str(model_folder), "--frontier", "--num-samples", "8", "--num-tokens", "16", "--device", "cpu"]
    references = ["--references", str(tmp_path / "human.txt")]
    assert main([*asked, *references]) == 2
    assert "the scoring model embeds; give --scoring-model FOLDER" in capsys.readouterr().err
    scored = [*asked, "--scoring-model", str(scorer_folder)]
    assert main([*scored, "--references", str(tmp_path / "none.txt")]) == 2
    assert "is not a file; give a file of texts, one a line" in capsys.readouterr().err
    assert main([*scored, *references, "--json"]) == 0
    said = capsys.readouterr()
    (point,) = json.loads(said.out)
    if mauve_is_there():
        assert 0 < point["mauve"] <= 1
    else:
        assert "mauve" not in point and "note: MAUVE is left out: its package is not installed" in said.err


def test_features_are_the_last_hidden_state_of_each_text(scorer: ScoringModel) -> None:
    texts = ["w2 w3 w4", "", "w5"]
    found = scorer.features(texts)
    assert found.shape[0] == 2
    ids = torch.tensor([scorer.tokenizer.encode("w2 w3 w4", add_special_tokens=False)])
    with torch.no_grad():
        expected = scorer.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
    torch.testing.assert_close(torch.from_numpy(found[0]), expected.float(), atol=tolerances.EXACT_FP64, rtol=0)
    assert scorer.features([""]).shape[0] == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data", "x"], "give --data, --zero-shot, --tasks or --frontier"),
        (["--rules", "first_hitting", "magic"], "rule='magic' is unknown"),
        (["--temperatures", "1.0", "nan"], "temperature=nan is out of range"),
        (["--top-p", "0"], "top_p=0.0 is out of range"),
        (["--steps", "0"], "steps=0 is out of range"),
        (["--seed", "-1"], "--seed -1 is out of range"),
        (["--num-samples", "0"], "--num-samples 0 is out of range; use 1 to"),
        (["--num-tokens", "1000000000"], "--num-tokens 1000000000 is out of range"),
        (["--scoring-model", "no/scorer"], "--scoring-model 'no/scorer' holds no config.json"),
        (["--device", "tpu"], "--device 'tpu' is not known"),
    ],
)
def test_mistakes_are_refused_before_anything_is_loaded(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "no/such/folder", "--frontier", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
