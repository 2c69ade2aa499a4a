"""Whole training runs in forked ranks: the trainer as `bd3 train` builds it, on a small model and random tokens.

A run is asked for by its config; what it wrote is read back from its record. Times are left out: they alone may differ.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import deepspeed

from bd3_megatron.config.load import config_from_tree
from bd3_megatron.config.schema import Config
from bd3_megatron.parallel.topology import Topology
from bd3_megatron.train.build import build_trainer
from tests.ranks.harness import run_ranks
from tests.unit.data.corpora import answers, write_split

LENGTH, BATCH, VOCAB = 32, 8, 64
STABLE = ("step", "tokens", "loss/", "optim/", "noise/", "search/", "eval/")
"""What a record may be compared by."""


def write_data(folder: Path, *, longest_document: int | None = None, of_answers: bool = False) -> Path:
    """Random tokens as prepare would leave them: 200 training rows and 40 held-out ones, with pairs that can be learnt.

    Args:
        folder: to write to.
        of_answers: only spans of the documents are predicted.
        longest_document: cut the text into documents of 5 to so many tokens; None: one document.
    """
    chosen = random.Random(1)
    for split, rows in (("train", 200), ("valid", 40)):
        tokens = [chosen.randrange(VOCAB // 2) for _ in range(rows * LENGTH // 2)]
        text = [t for token in tokens for t in (token, token + VOCAB // 2)]
        documents = [text]
        if longest_document is not None:
            documents = []
            while text:
                size = chosen.randint(5, longest_document)
                documents.append(text[:size])
                text = text[size:]
        write_split(folder / split, [documents], supervised=[answers(documents, rows)] if of_answers else None)
    return folder


def train_config(data: Path, run_dir: Path, /, **sections: Any) -> Config:
    """A run of 8 steps; `sections` holds overrides by section, e.g. train={...}."""
    tree: dict[str, Any] = {
        "run": {"dir": str(run_dir)},
        "model": {
            "style": "modern",
            "num_layers": 2,
            "hidden_size": 32,
            "num_heads": 4,
            "num_kv_heads": 2,
            "ffn_hidden_size": 48,
            "tie_embeddings": True,
            "init_std": 0.1,
        },
        "data": {"path": str(data), "seq_len": LENGTH},
        "diffusion": {"block_size": 4},
        "train": {"steps": 8, "global_batch_size": BATCH, "micro_batch_size": 2},
        "optim": {"lr": 1e-3, "ema_decay": 0.9, "weight_decay": 0.1},
        "checkpoint": {"every_steps": 0},
        "log": {"every_steps": 1},
        "throughput": {"peak_tflops": 1.0},
        "watch": {"leak_check": False},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return config_from_tree(tree)


def train(config: Config, *, stop_after: int | None = None) -> list[dict[str, Any]]:
    """Train on the config's grid, from the run folder's newest checkpoint if it has one.

    Args:
        config: the run.
        stop_after: ask every rank to stop once this state is reached, as a time limit would.

    Returns:
        One dict a rank: how it ended, the train state, and the weights by global name (this rank's pieces) with
        the rank's coordinates (tp, cp, dp, pp).
    """

    def on_rank(topology: Topology) -> dict[str, Any]:
        trainer = build_trainer(config, topology)
        if stop_after is not None:
            step_of, agreed = trainer.state, trainer.stop.agreed

            def stop() -> str | None:
                return "file" if step_of.step >= stop_after else agreed()

            trainer.stop.agreed = stop  # type: ignore[method-assign]
        reason = trainer.run()
        root = trainer.engine.model.root
        with deepspeed.zero.GatheredParameters(list(root.parameters()), enabled=trainer.engine.stage == 3):
            weights = {name: p.detach().clone() for name, p in root.named_parameters()}
        place = (topology.tp_rank, topology.cp_rank, topology.dp_rank, topology.pp_rank)
        return {"reason": reason, "state": trainer.state.to_json(), "weights": weights, "place": place}

    return run_ranks(on_rank, config.parallel)


def record(run_dir: Path, *, prefix: str = "") -> list[dict[str, Any]]:
    """The run's record without times and events, or only the lines that have an entry beginning with `prefix`."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()]
    kept = [{k: v for k, v in line.items() if k.startswith(STABLE)} for line in lines if "event" not in line]
    return [line for line in kept if any(k.startswith(prefix) for k in line)]


def losses(run_dir: Path) -> dict[int, float]:
    """Step -> training loss."""
    key = "loss/train_nats_per_token"
    return {line["step"]: line[key] for line in record(run_dir, prefix=key)}
