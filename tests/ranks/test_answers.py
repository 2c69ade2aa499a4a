"""Instructions end to end: chats prepared by the tool, a shipped configuration trained on them, the plain model beside it."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from bd3_megatron.config.load import load_config
from bd3_megatron.data.mixture import Mixture
from bd3_megatron.train.dataset import ShardRows, open_data
from bd3_megatron.train.mixing import mixture_stages
from bd3_megatron.train.plan import RunPlan
from tests import tolerances
from tests.ranks.parity import plain_job
from tests.ranks.train_runs import record, train
from tests.unit.data.chats import chat, chat_tokenizer, write_rows
from tools import prepare_data

DEBUG = Path(__file__).parents[2] / "configs" / "debug_cpu.yaml"
STEPS = 2
SHORT = (f"train.steps={STEPS}", "train.global_batch_size=4", "model.num_layers=2", "checkpoint.every_steps=0")
# at the default the elements that cancel down to rounding grow under Adam (see parity.job_config)
CALM = ("model.init_std=0.01", "watch.leak_check=false", "watch.preflight=false")


@pytest.mark.parametrize("grid", ["parallel.dp=2", "parallel.tp=2"])
def test_chats_train_the_debug_model_as_the_plain_model(
    grid: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"messages": chat(f"What is {n}?", f"{n} it is.", "Sure?", "Yes, " * (n % 7 + 1))} for n in range(60)]
    path, data = write_rows(tmp_path / "chats.jsonl", rows), tmp_path / "data"
    tokenizer = chat_tokenizer(tmp_path / "tokenizer")
    asked = ("--dataset", path, "--messages", "--tokenizer", tokenizer, "--out", data, "--valid-fraction", 0.2)
    assert prepare_data.main([*map(str, asked), "--quiet"]) == 0
    answers = ("diffusion.axes.denominator=answer_length", "data.packing=isolated")
    where = (f"data.path={data}", f"run.dir={tmp_path / 'run'}", "evaluate.at_start_and_end=true")
    config = load_config(DEBUG, [*SHORT, *CALM, *answers, *where, grid])
    ranks = train(config)
    opened = open_data(config)
    assert isinstance(opened.train, ShardRows) and opened.valid is not None
    mixed = opened.train.dataset.mixed(Mixture(mixture_stages(config.data, RunPlan(config))))
    expected = plain_job(config, rows=mixed, steps=STEPS, vocab=opened.vocab_size, mask_id=opened.special.mask)
    steps = record(tmp_path / "run", prefix="optim/lr")
    losses = [line["loss/train_nats_per_token"] for line in steps]
    assert losses == pytest.approx(expected.losses, rel=tolerances.GRID_LOSSES_LATER) and len(losses) == STEPS
    assert [line["optim/grad_norm"] for line in steps] == pytest.approx(expected.norms, rel=tolerances.GRID_NORMS_LATER)
    # the run says what it predicts, and its evaluation counts the answers and their ends
    rows_read = ranks[0]["state"]["rows"]
    assert "training sources hold prompts with their answers" in "".join(capfd.readouterr())
    counted, held_out = record(tmp_path / "run", prefix="eval/")[-1]["eval/num_tokens"], rows_read["valid"]
    assert counted == held_out["supervised"] + held_out["documents"] < held_out["tokens"]
