"""Every file in configs/ is a complete run: it loads, validates, and says what its name says."""

from __future__ import annotations

from pathlib import Path

import pytest

from bd3_megatron.config.load import config_from_tree, load_config, to_tree
from bd3_megatron.config.objective import block_sizes
from bd3_megatron.config.validate import validate
from bd3_megatron.config.yaml_file import parse_yaml

FOLDER = Path(__file__).resolve().parents[3] / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
RECIPES = sorted((FOLDER / "recipes").glob("*.yaml"))
NAMES = [path.stem for path in CONFIGS]
SHIPPED = {"quickstart", "debug_cpu", "debug_moe_cpu", "1b3", "7b"} | {
    f"{corpus}_110m_{kind}" for corpus in ("owt", "lm1b") for kind in ("b4", "b8", "b16", "mdlm", "ar")
}


@pytest.mark.parametrize("path", CONFIGS + RECIPES, ids=lambda p: p.stem)
def test_config_loads_validates_and_survives_its_own_dump(path: Path) -> None:
    config = load_config(path)
    validate(config)
    assert config_from_tree(to_tree(config)) == config


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_only_the_papers_ten_runs_share_a_base(path: Path) -> None:
    base = parse_yaml(path.read_text(encoding="utf-8"), path.name).get("base")
    corpus = path.stem.partition("_")[0]
    assert base == (f"base/{corpus}_110m.yaml" if "_110m_" in path.stem else None)


def test_recipes_are_their_authors_numbers_on_one_base() -> None:
    assert all("base: ../ar_to_bd_qwen3_0b6.yaml" in path.read_text("utf-8") for path in RECIPES)
    found = {path.stem: load_config(path) for path in RECIPES}
    assert set(found) == {"sdar_cpt", "efficient_dlm", "dfactory_flat", "llada2_cap", "sdar_sft"}
    cap = found["llada2_cap"].diffusion
    assert (cap.block_size, cap.views, cap.axes.pairing, cap.axes.confidence) == (32, 2, "complementary", 2.0)
    sdar, efficient, flat = (found[name].diffusion for name in ("sdar_cpt", "efficient_dlm", "dfactory_flat"))
    assert (sdar.block_size, sdar.axes.level_per, sdar.interval_at(4)) == (4, "sample", (1e-3, 1.0))
    assert (found["sdar_cpt"].train.tokens, found["sdar_cpt"].optim.lr) == (50_000_000_000, 1e-5)
    stage = found["sdar_sft"]
    assert (block_sizes(stage), stage.diffusion.axes.denominator) == ([4, 16, 64], "answer_length")
    assert (stage.diffusion.axes.level_per, stage.data.packing) == ("sample", "isolated")
    assert (efficient.axes.positions, efficient.axes.position_half_life) == ("exact", 0.25)
    assert (flat.axes.row_weight, flat.axes.denominator, flat.interval_at(32)) == ("flat", "loss_rows", (0.3, 0.8))


def test_all_shipped_names_are_there() -> None:
    assert set(NAMES) >= SHIPPED


@pytest.mark.parametrize("path", [p for p in CONFIGS if "_110m_" in p.stem], ids=lambda p: p.stem)
def test_paper_configs_hold_the_papers_recipe(path: Path) -> None:
    config = load_config(path)
    model, optim, train = config.model, config.optim, config.train
    assert (model.style, model.num_layers, model.hidden_size, model.num_heads) == ("paper", 12, 768, 12)
    assert (model.dropout, model.tie_embeddings, model.ffn_width) == (0.1, False, 3072)
    assert (optim.lr, optim.schedule, optim.warmup_steps, optim.betas) == (3e-4, "constant", 2500, (0.9, 0.999))
    assert (optim.weight_decay, optim.clip_grad_norm, optim.ema_decay, optim.adam_eps) == (0.0, 1.0, 0.9999, 1e-8)
    assert (train.global_batch_size, train.steps, train.precision) == (512, 1_000_000, "bf16")
    assert config.data.seq_len == (1024 if path.stem.startswith("owt") else 128)
    kind = path.stem.rsplit("_", 1)[1]
    expected = {"mdlm": [config.data.seq_len], "ar": [1]}
    assert block_sizes(config) == expected.get(kind, [config.data.seq_len, int(kind[1:]) if kind[0] == "b" else 0])


@pytest.mark.parametrize(
    ("name", "world_size"),
    [
        *(("1b3", 8), ("1b3", 64), ("7b", 64), ("7b", 512)),
        *(("llada2_mini_16b", 64), ("llada2_mini_16b", 512), ("sdar_30b_a3b", 64), ("sdar_30b_a3b", 512)),
        *(("llada2_flash_100b", 64), ("llada2_flash_100b", 512)),
    ],
)
def test_large_configs_fit_the_grids_they_name(name: str, world_size: int) -> None:
    config = load_config(CONFIGS[NAMES.index(name)])
    validate(config, world_size=world_size)


@pytest.mark.parametrize(
    "override", ["parallel.tp=2", "parallel.tp=4", "parallel.pp=2", "parallel.pp=4", "parallel.cp=2", "parallel.dp=2"]
)
def test_any_axis_of_debug_cpu_may_be_overridden_alone(override: str) -> None:
    config = load_config(CONFIGS[NAMES.index("debug_cpu")], [override])
    validate(config)
    assert config.parallel.world_size() == int(override[-1])
