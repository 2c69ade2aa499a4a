"""A dense folder becomes a mixture that computes what it did: copies, slices, a shared expert, groups and a scaling factor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bd3_megatron.checkpoint.layout import step_name
from bd3_megatron.checkpoint.read import open_checkpoint
from bd3_megatron.config.schema import Config
from bd3_megatron.convert.from_checkpoint import convert_checkpoint
from bd3_megatron.convert.from_hf import read_folder
from bd3_megatron.convert.start_run import start_run
from bd3_megatron.errors import ConversionError, RangeError
from bd3_megatron.hf.plain_bd3 import plain_model
from tests.tolerances import FOREIGN_LOGITS
from tests.unit.convert.models import MASK, VOCAB, run_config, whole_checkpoint


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """An exported folder whose MLPs are 48 wide."""
    path = whole_checkpoint(tmp_path / "dense" / "checkpoints" / step_name(3), run_config(tmp_path / "dense"))
    convert_checkpoint(path, tmp_path / "dense_hf")
    return tmp_path / "dense_hf"


def run(tmp_path: Path, **experts: Any) -> Config:
    return run_config(tmp_path / "run", model={"experts": experts})


MIXTURES: dict[str, dict[str, Any]] = {
    "copies": {"number": 4, "top_k": 2, "width": 48, "leading_dense_layers": 1},
    # six copies of three slices beside a shared part, as LLaDA2 routes; three divides six, so that slices of one row can differ
    "slices": {
        "number": 18, "top_k": 6, "width": 12, "shared_width": 12, "score": "sigmoid", "bias": True, "groups": 2,
        "group_top_k": 2, "scaling_factor": 2.5,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", MIXTURES)
def test_the_mixture_computes_what_the_dense_model_does(kind: str, dense: Path, tmp_path: Path) -> None:
    report = start_run(dense, run(tmp_path, **MIXTURES[kind]), vocab_size=VOCAB, mask_id=MASK, upcycle_noise=0.0)
    assert report.max_logit_difference < 1e-5
    convert_checkpoint(tmp_path / "run", tmp_path / "mixture")
    noisy_BL, clean_BL = torch.randint(0, MASK, (2, 2, 32), generator=torch.Generator().manual_seed(1)).unbind()
    before, after = (plain_model(*read_folder(folder))(noisy_BL, clean_BL) for folder in (dense, tmp_path / "mixture"))
    assert (before - after).abs().max() <= FOREIGN_LOGITS * before.abs().max()
    router = open_checkpoint(tmp_path / "run" / "checkpoints" / step_name(0)).tensor(
        "decoder.layers.1.mlp.router.weight"
    )
    # copies are told apart by their rows
    assert len(router.unique(dim=0)) == {"copies": 4, "slices": 6}[kind]


def test_noise_sets_copies_apart(dense: Path, tmp_path: Path) -> None:
    start_run(dense, run(tmp_path, **MIXTURES["copies"]), vocab_size=VOCAB, mask_id=MASK, upcycle_noise=0.01)
    found = open_checkpoint(tmp_path / "run" / "checkpoints" / step_name(0))
    first = found.tensor("decoder.layers.1.mlp.experts.linear_fc1.weight")
    apart = (first[0] - first[1]).std() / first[0].std()
    assert 0.01 < apart < 0.02


@pytest.mark.parametrize(
    ("experts", "law"),
    [
        ({"number": 4, "top_k": 2, "width": 20}, r"experts of width=20 and shared_width=0 do not make up .* MLP of 48"),
        ({"number": 4, "top_k": 3, "width": 24}, "top_k=3 is no multiple of the 2 experts"),
        ({"number": 4, "top_k": 2, "width": 48, "normalize_top_k": False}, "normalize_top_k=false leaves the sum"),
    ],
)
def test_what_no_copies_make_up_is_refused(experts: dict[str, Any], law: str, dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=law):
        start_run(dense, run(tmp_path, **experts), vocab_size=VOCAB, mask_id=MASK, upcycle_noise=0.0)
    assert not (tmp_path / "run").exists()


def test_what_is_not_there_to_upcycle_is_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="this folder has 0 experts and the run 0: leave --upcycle out"):
        start_run(dense, run_config(tmp_path / "run"), vocab_size=VOCAB, mask_id=MASK, upcycle_noise=0.0)
    with pytest.raises(RangeError, match=r"--upcycle 2 is outside \[0, 1\]"):
        start_run(dense, run(tmp_path, **MIXTURES["copies"]), vocab_size=VOCAB, mask_id=MASK, upcycle_noise=2.0)
