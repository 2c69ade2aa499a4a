"""Sizes read off a configuration: streams, rows, masked fractions, stages."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from bd3_megatron.config.objective import objective_of
from bd3_megatron.cost.shape import expected_masked_fraction, layers_per_stage, pipeline_rows, shape_of
from bd3_megatron.diffusion.axes import ObjectiveAxes
from bd3_megatron.diffusion.corrupt import corrupt
from bd3_megatron.diffusion.noise_level import Interval, noise_levels
from bd3_megatron.diffusion.noise_schedule import noise_schedule
from bd3_megatron.diffusion.objective import BlockDiffusion
from bd3_megatron.errors import ConfigError
from bd3_megatron.parallel.pair_split import pair_layout
from tests.unit.cost.cases import case


def test_the_package_imports_no_torch() -> None:
    code = "import sys, bd3_megatron.cost.step, bd3_megatron.train.throughput; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["loglinear", "cosine", "square", "sqrt", "log"])
@pytest.mark.parametrize("interval", [(1e-3, 1.0), (0.45, 0.95), (0.3, 0.8), (1.0, 1.0)])
def test_the_expected_masked_fraction_is_the_schedules_mean(name: str, interval: tuple[float, float]) -> None:
    config = case(diffusion={"noise_schedule": name, "interval": list(interval)})
    # midpoint rule: error below (omega - beta)^2 / (24 n^2) times the second derivative, infinite only at t = 0
    n = 20_000
    t = interval[0] + (torch.arange(n, dtype=torch.float64) + 0.5) / n * (interval[1] - interval[0])
    mean = noise_schedule(name).mask_probability(t).mean().item()
    assert expected_masked_fraction(config) == pytest.approx(mean, abs=1e-7)


def test_a_first_token_that_is_never_masked_lowers_the_mean() -> None:
    config = case(diffusion={"interval": [0.3, 0.8], "never_mask_first": True})
    assert expected_masked_fraction(config) == pytest.approx(0.55 * 31 / 32)
    assert expected_masked_fraction(config, interval=(0.5, 1.0)) == pytest.approx(0.75 * 31 / 32)


@pytest.mark.parametrize(("axes", "wanted"), [({}, None), ({"pairing": "complementary"}, 0.5)], ids=str)
def test_a_pair_of_views_masks_half(axes: dict[str, Any], wanted: float | None) -> None:
    config = case(diffusion={"interval": [0.2, 0.4], "views": 2, "axes": axes})
    assert expected_masked_fraction(config) == pytest.approx(0.3 if wanted is None else wanted)


@pytest.mark.parametrize("least", [0, 1])
def test_exact_counts_of_a_phase_have_the_mean_of_what_is_drawn(least: int) -> None:
    """n = 400 samples of 16 levels in 6,400 strata: the counts leave the mean of their law by less than one stratum a count."""
    axes = ObjectiveAxes(positions="exact", least_masked=least)
    index = torch.arange(400)
    t = noise_levels(1, index, num_blocks=16, interval=Interval(0.001, 0.3), group_size=400)
    drawn = corrupt(
        torch.zeros(400, 32, dtype=torch.int64), t, index_B=index, seed=1, mask_id=5,
        schedule=noise_schedule("cosine"), axes=axes,
    )  # fmt: skip
    config = case(diffusion={"noise_schedule": "cosine", "block_size": 8})
    found = expected_masked_fraction(config, interval=(0.001, 0.3), block_size=2, axes=axes)
    assert found == pytest.approx(drawn.is_masked_BL.double().mean().item(), abs=1e-3)
    assert found != pytest.approx(expected_masked_fraction(config, interval=(0.001, 0.3)), abs=1e-2)


def test_the_baseline_predicts_every_row() -> None:
    assert expected_masked_fraction(case(kind="ar")) == 1.0


def test_a_vocabulary_still_to_be_read_is_refused() -> None:
    config = case(model={"vocab_size": None})
    with pytest.raises(ConfigError, match=r"model.vocab_size is not set.*\(for example model.vocab_size=50258\)"):
        shape_of(config)


def test_a_phase_decides_block_size_and_interval() -> None:
    phases = [{"block_size": 32, "steps": 5}, {"block_size": 4}]
    config = case(diffusion={"phases": phases})
    assert shape_of(config).clean_rows == 0
    assert shape_of(config, block_size=4).clean_rows == shape_of(config).length
    config = case(diffusion={"phases": [{"block_size": 4, "interval": [0.4, 0.6]}]})
    assert expected_masked_fraction(config) == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["s1", "s4", "s16", "mdlm", "ar"])
@pytest.mark.parametrize("skip", [True, False])
def test_pipeline_rows_are_the_rows_of_the_layout(kind: str, skip: bool) -> None:
    config = case(kind=kind, train={"steps": 1, "skip_dead_rows": skip})
    shape = shape_of(config)
    layout = pair_layout(objective_of(config, block_size=shape.block), length=32, drop_last_clean=skip)
    assert pipeline_rows(config, shape) == layout.num_rows


def test_context_parallel_rows_are_the_rows_of_the_layout() -> None:
    config = case(parallel={"cp": 2})
    layout = pair_layout(BlockDiffusion(block_size=4), length=32, cp=2, cp_rank=1)
    assert pipeline_rows(config, shape_of(config)) == layout.num_rows == 32


def test_stages_hold_all_layers() -> None:
    assert layers_per_stage(case()) == (3,)
    assert layers_per_stage(case(parallel={"pp": 2, "layers_per_stage": [1, 2]})) == (1, 2)
    model = {"num_layers": 8, "hidden_size": 32, "num_heads": 4, "vocab_size": 60, "vocab_multiple": 64}
    assert layers_per_stage(case(model=model, parallel={"pp": 2, "vpp": 2})) == (4, 4)
    wide = model | {"vocab_size": 4000}
    assert layers_per_stage(case(model=wide, parallel={"pp": 2})) == (6, 2)
