"""A run that is stopped and resumed is the run that was not: in the middle of everything, and at every seam.

The run has whatever could remember something: phases over block sizes, interval searches, a growing batch, dropout.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bd3_megatron.config.schema import Config
from bd3_megatron.errors import ConfigError
from tests import tolerances
from tests.ranks.launches import launched
from tests.ranks.train_runs import losses, record, train, train_config, write_data
from tests.unit.data.corpora import BYTES

PHASES = [{"block_size": 8, "steps": 3, "lr_warmup_steps": 2}, {"block_size": 4, "steps": 3}, {"block_size": 32}]
STEPS = 8
STOPS = (2, 3, 5, 6)
"""Inside the first phase and its batch warm-up, at its seam, inside the second, at its seam."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    write_data(root / "data")
    return root


def run(root: Path, name: str, *, dropout: float = 0.0, **parallel: Any) -> Config:
    return train_config(
        root / "data",
        root / name,
        diffusion={"phases": PHASES, "search_every_steps": 2, "search_batches": 1, "search_widths": [0.5]},
        train={
            "steps": STEPS,
            "micro_batch_size": 2 // parallel.get("dp", 1),
            "warmup_batch_size": 2,
            "batch_warmup_steps": 4,
        },
        evaluate={"every_steps": 3, "num_sequences": 4},
        model={"dropout": dropout},
        parallel=parallel,
    )


def train_in_parts(configs: list[Config], stops: tuple[int, ...]) -> list[dict[str, Any]]:
    for config, stop in zip(configs, stops, strict=False):
        ended = train(config, stop_after=stop)
        assert [(r["reason"], r["state"]["step"]) for r in ended] == [("file", stop)] * len(ended)
    return train(configs[-1])


@pytest.mark.parametrize(("parallel", "stops"), [({}, STOPS), ({"tp": 2, "sequence_parallel": True}, (5,))], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(folder: Path, parallel: dict[str, Any], stops: tuple[int, ...]) -> None:
    label = "-".join(parallel)
    whole = train(run(folder, f"whole{label}", dropout=0.1, **parallel))
    parts = train_in_parts([run(folder, f"parts{label}", dropout=0.1, **parallel)] * (len(stops) + 1), stops)
    assert record(folder / f"parts{label}") == record(folder / f"whole{label}")
    for one, other in zip(whole, parts, strict=True):
        # a tracker's id is drawn for each run
        del one["state"]["wandb_id"], other["state"]["wandb_id"]
        assert one["state"] == other["state"] and one["state"]["intervals"].keys() == {4, 8, 32}
        assert all(torch.equal(tensor, other["weights"][name]) for name, tensor in one["weights"].items())
        assert one["reason"] == other["reason"] == "finished"


def test_a_run_may_go_on_with_another_grid(folder: Path) -> None:
    train(run(folder, "steady"))
    grids: list[dict[str, Any]] = [{"dp": 2}, {"pp": 2}]
    train_in_parts([run(folder, "moving", **grid) for grid in grids], (5,))
    assert losses(folder / "moving") == pytest.approx(losses(folder / "steady"), rel=tolerances.GRID_LOSSES_LATER)
    intervals = [
        [line["search/interval_beta"] for line in record(folder / n, prefix="search")] for n in ("steady", "moving")
    ]
    assert intervals[0] == intervals[1] and len(intervals[0]) == 3


def test_what_is_learned_may_not_change_unnoticed(folder: Path) -> None:
    config = run(folder, "changed")
    train(config, stop_after=1)
    other = train_config(folder / "data", folder / "changed", diffusion={"block_size": 16}, train={"steps": 2})
    with pytest.raises(AssertionError, match=rf"{ConfigError.__name__}: the checkpoint was made with other settings: "):
        train(other)
    assert [line["step"] for line in record(folder / "changed", prefix="loss/train")] == [1]


def test_another_tokenizer_is_refused_and_what_is_named_is_said(tmp_path: Path) -> None:
    with launched(tmp_path, "train.steps=2") as run:
        assert run.end() == 0, run.said
    shutil.copytree(tmp_path / "data", tmp_path / "other")
    for split in ("train", "valid"):
        header = tmp_path / "other" / split / "header.json"
        header.write_text(header.read_text().replace(BYTES.fingerprint, "ab" * 32))
    config = tmp_path / "config.yaml"
    config.write_text(config.read_text().replace(f"{tmp_path}/data", f"{tmp_path}/other"))
    with launched(tmp_path, "train.steps=3") as run:
        assert run.end() == 2
        assert "numbers would mean something else: tokenizer.fingerprint was " in run.errors()[0]
    with launched(tmp_path, "train.steps=3", "optim.lr=0.002", "run.reinterpret=true") as run:
        assert run.end() == 0, run.said
    said = [line.removeprefix("bd3: since that checkpoint: ") for line in run.said.splitlines() if "since that" in line]
    assert [line.split(" was ")[0] for line in said] == [
        "data.path",
        "train.steps",
        "optim.lr",
        "tokenizer.fingerprint",
    ]
    assert said[1:3] == ["train.steps was 2 and is 3", "optim.lr was 0.001 and is 0.002"]
