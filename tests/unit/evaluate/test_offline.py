"""Exported folders: golden losses, the model's own chain rule, the command, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bd3_megatron.checkpoint.layout import step_name
from bd3_megatron.cli import main
from bd3_megatron.convert.from_checkpoint import convert_checkpoint
from bd3_megatron.convert.official import fold
from bd3_megatron.convert.to_hf import write_folder
from bd3_megatron.data.batch import CleanBatch
from bd3_megatron.data.loader import TokenDataset
from bd3_megatron.data.prepare import PrepareRequest, prepare
from bd3_megatron.data.sources import text_source
from bd3_megatron.diffusion.corrupt import NoisyBatch
from bd3_megatron.evaluate.offline import Work, evaluate_plain, load_model, weighted_sums
from bd3_megatron.evaluate.perplexity import ScoreSettings
from bd3_megatron.hf.configuration_bd3 import BD3Config
from bd3_megatron.hf.plain_bd3 import PlainBD3, plain_model
from tests import tolerances
from tests.unit.convert.models import run_config, whole_checkpoint
from tests.unit.data.corpora import BYTES, SPECIAL, VOCAB, write_split
from tests.unit.evaluate.tiny import LENGTH, MASK_ID, every_row, random_rows, tiny_model
from tests.unit.sampling.folders import write_tokenizer

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
CPU = torch.device("cpu")


@pytest.mark.parametrize("block_size", [4, 16])
def test_official_evaluation_losses_are_reproduced(block_size: int) -> None:
    golden = load_file(GOLDEN / f"bd3lm_tiny_bs{block_size}.safetensors")
    official = {name: tensor.double() for name, tensor in load_file(GOLDEN / "tiny_state.safetensors").items()}
    config = BD3Config(
        vocab_size=50,
        style="paper",
        num_hidden_layers=3,
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=32,
        block_size=block_size,
        mask_token_id=49,
    )
    clean_BL, noisy_BL, t_BL = golden["x0"], golden["xt"], golden["t"].double()
    countable_BL = (torch.arange(32) > 0).expand(4, -1)
    batch = NoisyBatch(
        noisy_BL=noisy_BL,
        clean_BL=clean_BL,
        is_masked_BL=noisy_BL == 49,
        weight_BL=1.0 / t_BL,
        t_BK=t_BL[:, ::block_size],
        drawn_BK=t_BL[:, ::block_size].long(),
        countable_BL=countable_BL,
    )
    clean = CleanBatch(tokens_BL=clean_BL, index_B=torch.arange(4))
    sums_B = weighted_sums(plain_model(config, fold(official)), clean, batch, CPU, mask_id=49)
    found = sums_B.sum() / countable_BL.sum()
    assert found.item() == pytest.approx(golden["eval_loss_f64"].item(), abs=tolerances.GOLDEN_FP64)


@torch.no_grad()
def chain_rule(model: PlainBD3, tokens_NL: Tensor) -> float:
    """-log p of each token given the ones before it, by one forward a position; nats per token."""
    total = 0.0
    for position in range(tokens_NL.shape[1]):
        seen_NL = tokens_NL[:, : position + 1].clone()
        seen_NL[:, position] = MASK_ID
        logits_NV = model(seen_NL)[:, position]
        logits_NV[:, MASK_ID] = -torch.inf
        total -= float(logits_NV.log_softmax(dim=-1).gather(1, tokens_NL[:, position, None]).sum())
    return total / tokens_NL.numel()


def test_blocks_of_one_token_equal_the_models_chain_rule() -> None:
    rows, model = random_rows(7), tiny_model(1)
    found = evaluate_plain(model, rows, ScoreSettings(draws=4), Work(), mask_id=MASK_ID)
    assert found.is_exact and found.stderr_noise == 0.0
    assert found.nll_nats_per_token == pytest.approx(chain_rule(model, rows.tokens_NL), abs=tolerances.CHAIN_RULE)


def test_blocks_of_one_token_are_a_distribution_over_texts() -> None:
    texts_NL = every_row(4)
    model = tiny_model(1, length=4)
    clean = CleanBatch(tokens_BL=texts_NL, index_B=torch.arange(len(texts_NL)))
    plan = ScoreSettings().plan(objective="block", block_size=1, mask_id=MASK_ID)
    noisy = plan.noisy(clean, torch.zeros(len(texts_NL), dtype=torch.int64))
    nll_N = weighted_sums(model, clean, noisy, CPU, mask_id=MASK_ID)
    assert (-nll_N).exp().sum().item() == pytest.approx(1.0, abs=tolerances.EXACT_FP64)


def test_autoregressive_models_predict_all_tokens_but_the_first() -> None:
    rows, model = random_rows(6), tiny_model(1, objective="ar")
    found = evaluate_plain(model, rows, ScoreSettings(draws=4), Work(batch_size=4), mask_id=None)
    with torch.no_grad():
        log_p = model(rows.tokens_NL)[:, :-1].log_softmax(dim=-1)
    expected = -log_p.gather(2, rows.tokens_NL[:, 1:, None]).mean().item()
    assert found.num_tokens == 6 * (LENGTH - 1)
    assert found.nll_nats_per_token == pytest.approx(expected, abs=tolerances.EXACT_FP64)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared text under the byte tokenizer, with a held-out split."""
    folder = tmp_path_factory.mktemp("text")
    words = "".join(f"Line {n} holds {n * n} words.\n\n" for n in range(300))
    (folder / "a.txt").write_text(words, encoding="utf-8")
    prepare(
        PrepareRequest(
            out=folder / "data",
            sources={"train": text_source([str(folder / "a.txt")])},
            tokenizer="bytes",
            vocab_size=300,
            valid_fraction=0.1,
        )
    )
    return folder / "data"


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported folder for that text."""
    vocab = TokenDataset.open(data / "valid", seq_len=LENGTH, shuffle=False).vocab_size
    model = tiny_model(4, vocab=vocab)
    out = tmp_path_factory.mktemp("model") / "hf"
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    write_folder(state, model.model.shape, out, tokenizer_dir=data / "tokenizer")  # type: ignore[arg-type]
    return out


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["evaluate", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_command_prints_both_errors_and_json(data: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--data", data, "--num-sequences", 6, "--device", "cpu")
    code, out, _ = evaluate(capsys, folder, *asked)
    assert code == 0 and "standard errors: noise" in out and "text" in out
    code, out, _ = evaluate(capsys, folder, *asked, "--json", "--batch-size", 3)
    found = json.loads(out)
    model, config = load_model(folder, device=CPU)
    dataset = TokenDataset.open(data / "valid", seq_len=LENGTH, shuffle=False)
    settings = ScoreSettings(num_sequences=6, draws=2)
    expected = evaluate_plain(model, dataset, settings, Work(), mask_id=config.mask_token_id)
    assert found["nll_nats_per_token"] == pytest.approx(expected.nll_nats_per_token, abs=tolerances.EVALUATION)
    assert (found["num_sequences"], found["draws"]) == (6, 2)
    code, out, err = evaluate(capsys, folder, "--data", data / "valid", "--official", "--num-sequences", 2)
    assert code == 0 and f"over {2 * (LENGTH - 1)} tokens in 2 sequences" in out and "first token" in err


def test_an_override_is_said_and_changes_the_number(
    data: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--data", data, "--num-sequences", 6)
    own = json.loads(evaluate(capsys, folder, *asked, "--json")[1])
    assert own["overridden"] == [] and own["convention"]["packing"] == "wrap"
    other = json.loads(evaluate(capsys, folder, *asked, "--packing", "pad", "--no-append-eos", "--json")[1])
    assert other["overridden"] == ["packing", "append_eos"] and other["nll_nats_per_token"] != own["nll_nats_per_token"]
    _, _, err = evaluate(capsys, folder, *asked, "--wrap-special", "--min-t", "0.01")
    assert "convention (overridden: wrap_special, min_t): wrap packing, rows between BOS and EOS" in err


def test_a_recipe_that_the_convention_overrides_is_said(
    data: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "valid"
    copied.mkdir()
    for path in (data / "valid").iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    header = json.loads((copied / "header.json").read_text())
    (copied / "header.json").write_text(json.dumps(header | {"packing": {"wrap_special": True}}))
    code, _, err = evaluate(capsys, folder, "--data", copied, "--num-sequences", 2)
    assert code == 0 and "note: the text's own recipe says wrap_special=True; it is scored under" in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--packing", "stack"], "packing='stack' is not known; use wrap, isolated or pad"),
        (["--min-t", "0"], "min_t=0 is outside [0.001, 1)"),
        (["--official", "--no-first-token-given"], "leave --no-first-token-given out"),
        (["--draws", "0"], "--draws 0 is out of range; use 1 to 1000000"),
        (["--num-sequences", "0"], "--num-sequences 0 is out of range; use 1 to"),
        (["--official", "--exact"], "--official draws its noise and --exact enumerates it; leave one out"),
        (["--device", "tpu"], "--device 'tpu' is not known; use cpu or cuda"),
        (["--split", "test", "--data", "nowhere"], "nowhere does not exist"),
    ],
)
def test_bad_requests_are_one_sentence(
    arguments: list[str], sentence: str, data: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = evaluate(capsys, folder, "--data", data, *arguments)
    assert code == 2 and sentence in err and err.count("\n") == 1


def test_text_of_another_tokenizer_or_vocabulary_is_refused(
    data: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "hf"
    small = tiny_model(4)
    state = {name: tensor.float() for name, tensor in small.state_dict().items()}
    write_folder(state, small.model.shape, other)  # type: ignore[arg-type]
    code, _, err = evaluate(capsys, other, "--data", data)
    assert code == 2 and "and the model of 4; prepare the text with the model's tokenizer" in err
    record = folder / "bd3_tokenizer.json"
    assert record.is_file()
    header = json.loads((data / "valid" / "header.json").read_text())
    copied = tmp_path / "valid"
    copied.mkdir()
    for path in (data / "valid").iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    (copied / "header.json").write_text(json.dumps(header | {"tokenizer_fingerprint": "0" * 64}))
    code, _, err = evaluate(capsys, folder, "--data", copied)
    assert code == 2 and "valid has 0000000000000000: the same ids are other text" in err


def test_a_tokenizer_of_equal_size_is_not_the_models(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = BYTES.fingerprint
    state = {"tokenizer": {"fingerprint": own, **SPECIAL.as_dict()}}
    config = run_config(tmp_path / "run")
    path = whole_checkpoint(
        tmp_path / "run" / "checkpoints" / step_name(3), config, train_state=state, vocab_size=VOCAB
    )
    convert_checkpoint(path, tmp_path / "hf")
    for text, code in (("same", 0), ("other", 2)):
        fingerprint = own if text == "same" else "0" * 64
        write_split(tmp_path / text / "valid", [[list(b"as many ids, and other text") * 3]], fingerprint=fingerprint)
        # neither folder holds tokenizer files: the run's manifest and the model's config.json say which one it was
        for model in (tmp_path / "run", tmp_path / "hf"):
            found, _, err = evaluate(capsys, model, "--data", tmp_path / text)
            assert found == code
            assert code == 0 or "valid has the tokenizer 0000000000000000, the model in " in err
    BYTES.save(tmp_path / "hf")
    assert evaluate(capsys, tmp_path / "hf", "--data", tmp_path / "same")[0] == 0
    write_tokenizer(tmp_path / "words")
    (tmp_path / "hf" / "bd3_tokenizer.json").unlink()
    shutil.copytree(tmp_path / "words", tmp_path / "hf", dirs_exist_ok=True)
    code, _, err = evaluate(capsys, tmp_path / "hf", "--data", tmp_path / "same")
    assert code == 2 and "hf has the tokenizer " in err and "config.json has " in err


def test_a_split_shorter_than_one_sequence_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b.txt").write_text("ab", encoding="utf-8")
    request = PrepareRequest(
        out=tmp_path / "data",
        sources={"valid": text_source([str(tmp_path / "b.txt")])},
        tokenizer="bytes",
        vocab_size=300,
        valid_fraction=0.0,
    )
    prepare(request)
    code, _, err = evaluate(capsys, folder, "--data", tmp_path / "data")
    assert code == 2 and f"fewer than one row of seq_len={LENGTH}" in err


def test_damaged_folders_are_refused(
    folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = evaluate(capsys, tmp_path / "none", "--data", data)
    assert code == 2 and "is not a folder; give an exported model folder" in err
    broken = tmp_path / "hf"
    broken.mkdir()
    for path in folder.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    code, _, err = evaluate(capsys, broken, "--data", data)
    assert code == 2 and "holds weights of another model" in err
