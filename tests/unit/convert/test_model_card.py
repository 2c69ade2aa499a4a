"""The card says what the run recorded, and nothing it does not know; its code runs as it is pasted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from bd3_megatron.checkpoint.layout import read_manifest, step_name
from bd3_megatron.config.load import config_from_tree
from bd3_megatron.convert.average import average
from bd3_megatron.convert.from_checkpoint import convert_checkpoint
from bd3_megatron.data.convention import EvaluationConvention
from tests.unit.convert.models import run_config, whole_checkpoint
from tests.unit.data.corpora import BYTES, SPECIAL, VOCAB


def card(
    tmp_path: Path, *records: dict[str, object], licence: str | None = None, ema_decay: float = 0.0, **manifest: Any
) -> str:
    run_dir = tmp_path / "secret_place" / "run"
    data = {"seq_len": 32, "path": str(tmp_path / "secret_place" / "web")}
    config = run_config(run_dir, data=data, optim={"ema_decay": ema_decay})
    path = whole_checkpoint(run_dir / "checkpoints" / step_name(3), config, **manifest)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"torn')
    convert_checkpoint(path, tmp_path / "hf", licence=licence)
    return (tmp_path / "hf" / "README.md").read_text()


def evaluation(step: int, perplexity: float, **more: object) -> dict[str, object]:
    errors = {"eval/stderr_text_nats_per_token": 0.03, "eval/stderr_noise_nats_per_token": 0.04}
    return {"step": step, "eval/perplexity": perplexity, **errors, **more}


def test_perplexity_has_its_error_and_is_of_this_checkpoint(tmp_path: Path) -> None:
    text = card(tmp_path, evaluation(1, 80.0), evaluation(3, 40.0), evaluation(5, 20.0), licence="apache-2.0")
    assert "| held-out perplexity | 40 ± 2 (standard error) at step 3 |" in text
    assert yaml.safe_load(text.split("---")[1])["license"] == "apache-2.0"
    assert "| clean tokens seen | 384 |" in text
    assert "| length, block size | 32 tokens, 4 |" in text and "| vocabulary | 61 ids, mask id 60 |" in text


def test_a_perplexity_of_other_weights_is_not_taken_for_that_of_the_folder(tmp_path: Path) -> None:
    # the run kept an average and evaluated it; the folder holds the trained weights
    text = card(tmp_path, evaluation(3, 40.0), ema_decay=0.9)
    assert ", raw weights of step 3, written by" in text
    assert "(standard error) at step 3, of the averaged weights, not of these |" in text
    run_dir = tmp_path / "secret_place" / "run"
    paths = [run_dir / "checkpoints" / step_name(step) for step in (2, 3)]
    whole_checkpoint(paths[0], config_from_tree(read_manifest(paths[1]).config), step=2, seed=2)
    average(paths, run_dir / "checkpoints" / "mean")
    convert_checkpoint(run_dir / "checkpoints" / "mean", tmp_path / "mean")
    text = (tmp_path / "mean" / "README.md").read_text()
    assert ", the mean of the raw weights of steps 2, 3, written by" in text
    assert "| held-out perplexity | not measured |" in text


def test_what_the_run_read_and_how_it_was_measured_is_said(tmp_path: Path) -> None:
    source = {"rows": 900, "documents": 1200, "tokens": 30_000}
    state = {
        "tokenizer": {"fingerprint": BYTES.fingerprint, "bos": 5, "eos": 6, "pad": None, "mask": 60},
        "rows": {"train": [source, source], "valid": None},
    }
    convention = EvaluationConvention(packing="isolated", aligned_block=4)
    counted = {"eval/num_tokens": 4321, "eval/num_sequences": 200}
    text = card(tmp_path, evaluation(3, 40.0, **counted), train_state=state, evaluation=convention.to_json())
    assert "| data | web: 2,400 documents of 60,000 tokens |" in text
    assert f"| tokenizer | fingerprint {BYTES.fingerprint[:16]}; ids bos 5, eos 6 |" in text
    assert f"| measured by | 4,321 tokens of 200 held-out sequences; {convention.sentence()} |" in text


def test_what_is_not_known_is_called_so_and_no_folder_is_told(tmp_path: Path) -> None:
    text = card(tmp_path)
    assert "| held-out perplexity | not measured |" in text and "| measured by | unknown |" in text
    assert "| tokenizer | unknown |" in text and "| data | web |" in text
    assert "secret_place" not in text and str(tmp_path) not in text
    # nobody but the owner can give a licence
    assert "license" not in text and yaml.safe_load(text.split("---")[1])["library_name"] == "transformers"


@pytest.mark.parametrize(("objective", "kept"), [("block", True), ("block", False), ("ar", True)])
def test_the_cards_code_runs_as_it_is_pasted(
    objective: str, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    diffusion = {"objective": objective, "block_size": 4}
    config = run_config(tmp_path / "run", diffusion=diffusion)
    state = {"tokenizer": {"fingerprint": BYTES.fingerprint, **SPECIAL.as_dict()}}
    path = whole_checkpoint(
        tmp_path / "run" / "checkpoints" / step_name(3),
        config,
        train_state=state,
        vocab_size=VOCAB,
        mask_id=SPECIAL.mask,
    )
    if kept:
        BYTES.save(tmp_path / "run" / "tokenizer")
    convert_checkpoint(path, tmp_path / "hf")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "hf" / "README.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path / "hf")
    exec(compile(code, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert said.startswith("The" if kept else "[256, ") and len(said) > 5
