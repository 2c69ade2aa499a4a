"""The card says what the run recorded, and nothing it does not know."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from bd3_megatron.checkpoint.layout import step_name
from bd3_megatron.convert.from_checkpoint import convert_checkpoint
from tests.unit.convert.models import run_config, whole_checkpoint


def card(tmp_path: Path, *records: dict[str, object], licence: str = "unknown") -> str:
    run_dir = tmp_path / "secret_place" / "run"
    path = whole_checkpoint(run_dir / "checkpoints" / step_name(3), run_config(run_dir))
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"torn')
    convert_checkpoint(path, tmp_path / "hf", licence=licence)
    return (tmp_path / "hf" / "README.md").read_text()


def evaluation(step: int, perplexity: float) -> dict[str, object]:
    errors = {"eval/stderr_text_nats_per_token": 0.03, "eval/stderr_noise_nats_per_token": 0.04}
    return {"step": step, "eval/perplexity": perplexity, **errors}


def test_perplexity_has_its_error_and_is_of_this_checkpoint(tmp_path: Path) -> None:
    text = card(tmp_path, evaluation(1, 80.0), evaluation(3, 40.0), evaluation(5, 20.0), licence="apache-2.0")
    assert "| held-out perplexity | 40 ± 2 (standard error) at step 3 |" in text
    assert yaml.safe_load(text.split("---")[1])["license"] == "apache-2.0"
    assert "| clean tokens seen | 384 |" in text
    assert "| length, block size | 32 tokens, 4 |" in text and "| vocabulary | 61 ids, mask id 60 |" in text


def test_what_is_not_known_is_called_so_and_no_folder_is_told(tmp_path: Path) -> None:
    text = card(tmp_path)
    assert "| held-out perplexity | not measured |" in text and "license: unknown" in text
    assert "secret_place" not in text and str(tmp_path) not in text
