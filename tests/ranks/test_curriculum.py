"""A curriculum over block sizes is one run: every phase trains as its own block size would, on every grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bd3_megatron.checkpoint.layout import read_manifest, step_name
from bd3_megatron.config.schema import Config
from bd3_megatron.evaluate.offline import Work, evaluate_plain, model_convention, open_model, open_split
from bd3_megatron.evaluate.perplexity import ScoreSettings
from tests import tolerances
from tests.ranks.train_runs import losses, record, train, train_config, write_data

PHASES = [
    {"block_size": 1, "steps": 2},
    {"block_size": 8, "tokens": 512, "interval": [0.3, 0.8], "lr_warmup_steps": 2},
    {"block_size": 32, "lr_end": 0.0},
]
"""512 clean tokens are two steps of 8 x 32."""
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("curriculum")
    write_data(root / "data")
    # states at both seams and at the end are evaluated and kept
    kept = {"evaluate": {"every_steps": 2, "draws": 1}, "checkpoint": {"every_steps": 2, "keep_last": 0}}
    train(run(root, "one", **kept))
    return root


def run(root: Path, name: str, **sections: dict[str, Any]) -> Config:
    diffusion = {"block_size": 8, "phases": PHASES}
    return train_config(root / "data", root / name, diffusion=diffusion, train={"steps": STEPS}, **sections)


def test_every_step_trains_in_its_phase(folder: Path) -> None:
    steps = record(folder / "one", prefix="loss/train")
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["noise/block_size"] for line in steps] == [1, 1, 8, 8, 32, 32]
    assert [line["noise/interval_beta"] for line in steps] == [1.0, 1.0, 0.3, 0.3, 1e-3, 1e-3]
    # at block size 1 everything is masked; the second phase warms up anew, the last one falls to 0
    assert [line["noise/masked_fraction"] for line in steps[:2]] == [1.0, 1.0]
    assert [line["optim/lr"] for line in steps] == pytest.approx([1e-3, 1e-3, 5e-4, 1e-3, 1e-3, 5e-4])


@pytest.mark.parametrize("parallel", [{"tp": 2, "sequence_parallel": True}, {"pp": 2}], ids=str)
def test_a_curriculum_is_the_same_on_every_grid(folder: Path, parallel: dict[str, Any]) -> None:
    name = "-".join(parallel)
    train(run(folder, name, parallel=parallel))
    assert losses(folder / name) == pytest.approx(losses(folder / "one"), rel=tolerances.GRID_LOSSES_LATER)


def test_a_state_is_saved_and_evaluated_at_the_block_size_it_was_trained_with(folder: Path) -> None:
    in_loop = {line["step"]: line["eval/nll_nats_per_token"] for line in record(folder / "one", prefix="eval/")}
    for step, size in ((2, 1), (4, 8), (6, 32)):
        checkpoint = folder / "one" / "checkpoints" / step_name(step)
        assert read_manifest(checkpoint).train_state["block_size"] == size
        opened = open_model(checkpoint)
        assert opened.config.block_size == size
        convention = model_convention(opened.config)
        rows = open_split(folder / "data", folder, opened.config, convention)
        model = opened.load(device=torch.device("cpu"))
        settings = ScoreSettings(convention=convention)
        found = evaluate_plain(model, rows, settings, Work(), mask_id=opened.config.mask_token_id)
        assert found.nll_nats_per_token == pytest.approx(in_loop[step], abs=tolerances.EVALUATION)
