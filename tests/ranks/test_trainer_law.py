"""The trainer is the plain model with torch's AdamW: loss, gradient norm, learning rate and weights of a whole run.

The run is built as `bd3 train` builds it, from prepared data to metrics.jsonl; the plain side reads the same rows one
batch after another and works out block size, batch size, learning rate and token count of every step by itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bd3_megatron.config.schema import Config
from bd3_megatron.data.mixture import Mixture
from bd3_megatron.train.dataset import ShardRows, open_data
from bd3_megatron.train.mixing import mixture_stages
from bd3_megatron.train.plan import RunPlan
from tests import tolerances
from tests.ranks.parity import Outcome, plain_job, plain_names
from tests.ranks.train_runs import BATCH, record, train, train_config, write_data

STEPS = 5
CASES: dict[str, dict[str, Any]] = {
    "one process": {},
    "dp and batch warm-up": {
        "parallel": {"dp": 2},
        "train": {"micro_batch_size": 1, "warmup_batch_size": 2, "batch_warmup_steps": 3},
        "optim": {"schedule": "cosine", "warmup_steps": 2, "min_lr_ratio": 0.1},
    },
    "tp, sp and isolated documents": {
        "parallel": {"tp": 2, "sequence_parallel": True},
        "data": {"packing": "isolated"},
    },
    "dp and padded documents": {"parallel": {"dp": 2}, "data": {"packing": "pad"}},
    "interleaved pp and a curriculum seam": {
        "parallel": {"pp": 2, "vpp": 2},
        "model": {"num_layers": 4},
        "diffusion": {
            "phases": [
                {"block_size": 8, "steps": 2, "axes": {"row_weight": "flat", "level_per": "sample"}},
                {"block_size": 4, "lr_start": 0.5, "lr_end": 0.25},
            ]
        },
    },
    "cp and views": {"parallel": {"cp": 2}, "diffusion": {"views": 2}},
    "zero 3 and MDLM": {"parallel": {"dp": 2, "zero_stage": 3}, "diffusion": {"block_size": 32}},
    "zero 2 and next token": {"parallel": {"dp": 2, "zero_stage": 2}, "diffusion": {"objective": "ar"}},
    "dp and answers in packed documents": {
        "parallel": {"dp": 2},
        "data": {"packing": "isolated"},
        "diffusion": {"axes": {"denominator": "answer_length"}},
    },
    "tp and padded answers, next token": {
        "parallel": {"tp": 2},
        "data": {"packing": "pad"},
        "diffusion": {"objective": "ar"},
    },
    "tp, pp and the first token kept": {
        "parallel": {"tp": 2, "pp": 2},
        "diffusion": {"never_mask_first": True},
    },
}


def law_config(data: Path, run_dir: Path, case: dict[str, Any]) -> Config:
    """A run of STEPS steps that clips, decays and averages."""
    base: dict[str, Any] = {
        # see parity.job_config: elements that cancel down to fp32 rounding must lie below adam_eps
        "model": {"init_std": 0.01},
        "train": {"steps": STEPS, "global_batch_size": BATCH},
        "optim": {"clip_grad_norm": 0.2},
        "checkpoint": {"every_steps": 0},
        "watch": {"leak_check": False, "preflight": False},
    }
    sections = {name: {**base.get(name, {}), **case.get(name, {})} for name in {*base, *case}}
    return train_config(data, run_dir, **sections)


@pytest.mark.parametrize("name", CASES)
def test_the_trainer_is_the_plain_model(name: str, tmp_path: Path) -> None:
    data_folder = write_documents(tmp_path / "data", of_answers="answers" in name)
    config = law_config(data_folder, tmp_path / "run", CASES[name])
    ranks = train(config)
    found = found_by(config, ranks, tmp_path / "run")
    data = open_data(config)
    assert isinstance(data.train, ShardRows)
    rows = data.train.dataset.mixed(Mixture(mixture_stages(config.data, RunPlan(config))))
    expected = plain_job(config, rows=rows, steps=STEPS, vocab=data.vocab_size, mask_id=data.special.mask)

    assert len(found.losses) == STEPS
    assert found.losses == pytest.approx(expected.losses, rel=tolerances.GRID_LOSSES_LATER)
    assert found.norms == pytest.approx(expected.norms, rel=tolerances.GRID_NORMS_LATER)
    assert found.rates == pytest.approx(expected.rates, rel=tolerances.EXACT_FP64)
    assert min(expected.norms) > config.optim.clip_grad_norm, "a clip that never acts proves nothing"
    for key, parameter in found.parameters.items():
        worst = (parameter - expected.parameters[key]).abs().max()
        assert worst <= tolerances.GRID_PARAMETERS, f"{key}: {worst:.2e}"


def write_documents(folder: Path, *, of_answers: bool = False) -> Path:
    """As write_data, in documents of 5 to 40 tokens, so that isolation and padding have something to do."""
    return write_data(folder, longest_document=40, of_answers=of_answers)


def found_by(config: Config, ranks: list[dict[str, Any]], run_dir: Path) -> Outcome:
    """What the run's record and its ranks' weights say."""
    steps = record(run_dir, prefix="optim/lr")
    pieces: dict[str, dict[int, Any]] = {}
    for rank in ranks:
        tp_rank, cp_rank, dp_rank, _ = rank["place"]
        if cp_rank == dp_rank == 0:
            for name, tensor in rank["weights"].items():
                pieces.setdefault(name, {})[tp_rank] = tensor
    return Outcome(
        losses=[line["loss/train_nats_per_token"] for line in steps],
        norms=[line["optim/grad_norm"] for line in steps],
        rates=[line["optim/lr"] for line in steps],
        parameters=plain_names(config, pieces, vocab=open_data(config).vocab_size),
    )
