"""A run that reads a stream, or a curriculum of mixtures, goes on after a stop, a kill or on another grid as if nothing was.

The checkpoint remembers what the number of samples consumed does not say: the position of every stream shard, which stages began.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import datasets  # noqa: F401 - here once, not in every rank that streams
import pytest
import torch

from bd3_megatron.config.load import config_from_tree, replace_field, to_tree
from bd3_megatron.config.schema import Config
from bd3_megatron.data.tokenizer_open import load_tokenizer
from bd3_megatron.parallel.topology import Topology
from bd3_megatron.train.build import build_trainer
from tests import tolerances
from tests.ranks.harness import run_ranks
from tests.ranks.train_runs import LENGTH, losses, record, train, train_config, write_data
from tests.unit.data.corpora import BYTES, english


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared folders with a byte tokenizer, and a dataset of three files."""
    root = tmp_path_factory.mktemp("data_resume")
    for name in ("data", "other"):
        BYTES.save(write_data(root / name) / "tokenizer")
    (root / "text").mkdir()
    chosen = random.Random(3)
    for number in range(3):
        rows = [{"text": english(chosen.randint(2, 60), seed=i + 100 * number)} for i in range(30)]
        (root / "text" / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def run(root: Path, name: str, kind: str, *, workers: int = 0, **parallel: Any) -> Config:
    sources: dict[str, dict[str, Any]] = {
        "stream": {"stream": {"dataset": str(root / "text"), "shuffle_rows": 4}, "num_workers": workers},
        "stages": {
            "stages": [
                {"mixture": {str(root / "data"): 3.0, str(root / "other"): 1.0}, "steps": 3},
                {"mixture": {str(root / "other"): 1.0}, "steps": 2},
                {"mixture": {str(root / "data"): 1.0, str(root / "other"): 2.0}},
            ]
        },
    }
    tree = to_tree(train_config(root / "data", root / name, checkpoint={"every_steps": 2}, parallel=parallel))
    tree["data"] |= {**sources[kind], "packing": "isolated"}
    return config_from_tree(tree)


def die_after(config: Config, step: int) -> None:
    """The rank ends without a word once it reached this state, as by SIGKILL."""

    def on_rank(topology: Topology) -> None:
        trainer = build_trainer(config, topology)

        def agreed() -> None:
            if trainer.state.step == step:
                os._exit(9)

        trainer.stop.agreed = agreed  # type: ignore[method-assign]
        trainer.run()

    with pytest.raises(AssertionError, match="ended with status"):
        run_ranks(on_rank, config.parallel)


@pytest.mark.parametrize("kind", ["stream", "stages"])
def test_a_run_that_was_stopped_and_killed_is_the_one_that_was_not(folder: Path, kind: str) -> None:
    (whole,) = train(run(folder, f"whole-{kind}", kind))
    config = run(folder, f"parts-{kind}", kind)
    assert train(config, stop_after=3)[0]["reason"] == "file"
    die_after(config, 5)
    (parts,) = train(config)
    assert record(folder / f"parts-{kind}") == record(folder / f"whole-{kind}")
    assert len(losses(folder / f"parts-{kind}")) == 8
    assert parts["state"]["data"] == whole["state"]["data"] and parts["state"]["data"]
    assert all(torch.equal(tensor, parts["weights"][name]) for name, tensor in whole["weights"].items())
    # the run knows its text: a copy of the tokenizer, and what it read, counted
    assert load_tokenizer(folder / f"parts-{kind}" / "tokenizer").fingerprint == BYTES.fingerprint
    rows = parts["state"]["rows"]
    # of a stream nobody has counted anything; one more row holds the document's end
    assert rows["valid"] == {"rows": 41, "documents": 1, "tokens": 40 * LENGTH}
    assert rows["train"] == ([] if kind == "stream" else [{"rows": 201, "documents": 1, "tokens": 200 * LENGTH}] * 2)


def test_a_stream_goes_on_with_other_ranks_and_loader_processes(folder: Path) -> None:
    train(run(folder, "steady", "stream"))
    train(run(folder, "moving", "stream", workers=1, dp=2), stop_after=3)
    (moved,) = train(run(folder, "moving", "stream"))
    assert losses(folder / "moving") == pytest.approx(losses(folder / "steady"), rel=tolerances.GRID_LOSSES_LATER)
    assert len(moved["state"]["data"]["shards"]) == 3


def test_a_stream_is_not_taken_up_in_the_middle_of_prepared_data(folder: Path) -> None:
    train(run(folder, "switched", "stages"), stop_after=1)
    named = ("data.stages", "data.stream.dataset", "data.stream.shuffle_rows")
    switched = replace_field(run(folder, "switched", "stream"), "run.overridden", named)
    with pytest.raises(
        AssertionError, match=r"data\.stream is set and the checkpoint's 8 samples were not read from a"
    ):
        train(switched)
