"""Validation: what a configuration alone can refute is refuted before any rank starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from bd3_megatron.config.load import config_from_tree, load_config
from bd3_megatron.config.objective import block_sizes
from bd3_megatron.config.schema import Config
from bd3_megatron.config.validate import check_grid, data_parallel_size, validate
from bd3_megatron.errors import ConfigError, GridError

TREE = """
run: {dir: runs/x}
model: {num_layers: 4, hidden_size: 64, num_heads: 4}
data: {seq_len: 64}
diffusion: {block_size: 4}
train: {steps: 10, global_batch_size: 16}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(TREE)
    return path


def test_a_valid_config_passes(file: Path) -> None:
    validate(load_config(file))


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.tp=2", "parallel.sequence_parallel=true"],
        ["parallel.pp=2", "parallel.vpp=2"],
        ["parallel.pp=2", "parallel.layers_per_stage=[1, 3]"],
        ["parallel.cp=4"],
        ["parallel.tp=2", "parallel.pp=2", "parallel.cp=2", "parallel.dp=2"],
        ["diffusion.objective=ar"],
        ["diffusion.block_size=64"],
        ["diffusion.block_size=1", "diffusion.interval=[1.0, 1.0]"],
        ["model.style=paper", "model.dropout=0.1"],
        ["model.num_kv_heads=2", "model.qk_norm=true", "model.tie_embeddings=true"],
        ["train.steps=null", "train.tokens=1000000"],
        ["train.warmup_batch_size=4", "train.batch_warmup_steps=10"],
        ["train.recompute=full", "train.recompute_layers=4"],
        ["diffusion.phases=[{block_size: 64, steps: 5}, {block_size: 4}]"],
    ],
)
def test_legal_combinations_pass(file: Path, overrides: list[str]) -> None:
    validate(load_config(file, overrides))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["data.seq_len=65"], r"^seq_len=65 is not a multiple of block_size=4; use 64 or 68\.$"),
        (
            ["train.recompute_layers=2"],
            r"^train\.recompute_layers=2 with recompute=none recomputes nothing; set train\.recompute to selective or full, "
            r"or leave recompute_layers unset\.$",
        ),
        (
            ["train.recompute=full", "train.recompute_layers=5"],
            r"^train\.recompute_layers=5 is outside \[1, 4\], the layers of the model; give how many first layers of each "
            r"stage recompute, or leave it unset for all\.$",
        ),
        (["model.num_heads=5"], r"^num_heads=5 does not divide hidden_size=64; use 1, 2, 4, 8, 16, 32 or 64\.$"),
        (["model.num_kv_heads=3"], r"^num_kv_heads=3 does not divide num_heads=4; use 1, 2 or 4\.$"),
        (
            ["model.hidden_size=60"],
            r"^hidden_size=60 / num_heads=4 makes heads of an odd width 15, and rotary positions turn channels in pairs; set "
            r"model\.head_dim to an even number\.$",
        ),
        (
            ["model.style=paper", "model.num_kv_heads=2"],
            r"^num_kv_heads=2 with style=paper, which has full heads; use 4 or",
        ),
        (["model.style=paper", "model.qk_norm=true"], r"^qk_norm=true with style=paper"),
        (["model.style=paper", "model.tie_embeddings=true"], r"^tie_embeddings=true with style=paper"),
        (
            ["diffusion.interval=[0.9, 0.3]"],
            r"^interval \[0\.9, 0\.3\] is empty; give a smaller first number, for example \[0\.45, 0\.95\]\.$",
        ),
        (["diffusion.interval=[0.5, 0.5]"], r"^interval \[0\.5, 0\.5\] is empty"),
        (
            ["diffusion.objective=ar", "diffusion.views=2"],
            r"^objective=ar has no noise; remove diffusion\.phases, diffusion\.views",
        ),
        (["diffusion.objective=ar", "diffusion.search_every_steps=2"], r"^objective=ar has no noise"),
        (
            ["diffusion.phases=[{block_size: 5, steps: 3}, {block_size: 4}]"],
            r"^seq_len=64 is not a multiple of block_size=5",
        ),
        (
            ["diffusion.phases=[{block_size: 4, steps: 3, tokens: 4}]"],
            r"^phases\[0\] gives both steps=3 and tokens=4; give one\.$",
        ),
        (
            ["diffusion.phases=[{block_size: 4}, {block_size: 4}]"],
            r"^phases\[0\] gives neither steps nor tokens and is not the last",
        ),
        (["diffusion.phases=[{block_size: 4, interval: [0.9, 0.1]}]"], r"^interval \[0\.9, 0\.1\] is empty"),
        (
            ["diffusion.phases=[{block_size: 4, steps: 2}, {block_size: 4, axes: {least_masked: 1}}]"],
            r"^axes\.least_masked=1 with positions=bernoulli",
        ),
        (
            ["diffusion.phases=[{block_size: 4, steps: 2}, {block_size: 4, axes: {pairing: complementary}}]"],
            r"^axes\.pairing=complementary with diffusion\.views=1",
        ),
        (
            ["diffusion.objective=ar", "diffusion.axes.row_weight=flat"],
            r"^objective=ar has no noise; remove .* diffusion\.axes and",
        ),
        (["train.tokens=5"], r"^train\.steps=10 and train\.tokens=5: give exactly one of them\.$"),
        (["train.steps=null"], r"^train\.steps=None and train\.tokens=None: give exactly one"),
        (["train.warmup_batch_size=4"], r"belong together; give both or neither\.$"),
    ],
)
def test_what_cannot_run_is_refused_in_one_sentence(file: Path, overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        validate(load_config(file, overrides))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["parallel.tp=3"], r"^tp=3 does not divide num_heads=4; use 1, 2 or 4\.$"),
        (["parallel.tp=4", "model.num_kv_heads=2"], r"^tp=4 does not divide num_kv_heads=2; use 1 or 2\.$"),
        (["parallel.tp=4", "model.ffn_hidden_size=62"], r"^tp=4 does not divide ffn_hidden_size=62"),
        (["parallel.tp=4", "model.vocab_multiple=2"], r"^vocab_multiple=2 is not a multiple of tp=4; use 4\.$"),
        (["parallel.sequence_parallel=true"], r"^sequence_parallel=true with tp=1 cuts nothing"),
        (["parallel.pp=8"], r"^pp x vpp = 8 exceeds num_layers=4; use at most 4 chunks\.$"),
        (["parallel.vpp=2"], r"^vpp=2 with pp=1 interleaves nothing"),
        (["parallel.pp=3", "parallel.vpp=2", "model.num_layers=8"], r"^pp x vpp=6 does not divide num_layers=8"),
        (
            ["parallel.pp=2", "parallel.vpp=2", "train.global_batch_size=3"],
            r"^micro-batches a step=3 is not a multiple of pp",
        ),
        (
            ["parallel.pp=2", "parallel.layers_per_stage=[1, 2]"],
            r"^layers_per_stage=\[1, 2\] does not split num_layers=4 over 2 stages",
        ),
        (["parallel.pp=2", "parallel.vpp=2", "parallel.layers_per_stage=[2, 2]"], r"^layers_per_stage with vpp"),
        (
            ["parallel.cp=3"],
            r"^cp=3 cuts seq_len=64 into slices of 10\.6667, not a multiple of block_size=4; use cp=1, 2, 4 or 8\.$",
        ),
        (
            ["parallel.cp=2", "model.dropout=0.1"],
            r"^cp=2 with dropout=0\.1 is not proved equal on every grid; use dropout 0\.$",
        ),
        (
            ["parallel.tp=4", "parallel.sequence_parallel=true", "data.seq_len=2", "diffusion.block_size=2"],
            r"^rows a rank \(seq_len / cp\)=2 is not",
        ),
        (
            ["parallel.zero_stage=2", "parallel.grad_reduce_dtype=bf16"],
            r"^grad_reduce_dtype=bf16 with zero_stage=2, .* use zero_stage=1 .*, or grad_reduce_dtype=fp32\.$",
        ),
        (
            ["parallel.pp=2", "parallel.zero_stage=2"],
            r"^zero_stage=2 with pp=2: .* use zero_stage=1, or pp=1 with a larger tp\.$",
        ),
        (["parallel.dp=3"], r"^global_batch_size=16 is not a multiple of dp x micro_batch_size=3; use 15 or 18\.$"),
    ],
)
def test_illegal_grids_are_refused_in_one_sentence(file: Path, overrides: list[str], sentence: str) -> None:
    with pytest.raises(GridError, match=sentence):
        validate(load_config(file, overrides))


@pytest.mark.parametrize(
    ("overrides", "world_size", "sentence"),
    [
        (["parallel.tp=2"], 3, r"^world size 3 is not a multiple of tp=2 x pp=1 x cp=1 = 2; start 2 or 4 ranks\.$"),
        (["parallel.tp=4"], 2, r"^world size 2 is not a multiple of .* = 4; start 4 ranks\.$"),
        (
            ["parallel.tp=2", "parallel.dp=2"],
            8,
            r"^world size 8 does not match tp=2 x pp=1 x cp=1 x dp=2 = 4; start 4 ranks or leave",
        ),
        ([], 3, r"^global_batch_size=16 is not a multiple of dp x micro_batch_size=3"),
    ],
)
def test_a_world_that_does_not_fit_the_grid_is_refused(
    file: Path, overrides: list[str], world_size: int, sentence: str
) -> None:
    with pytest.raises(GridError, match=sentence):
        validate(load_config(file, overrides), world_size=world_size)


@pytest.mark.parametrize(
    ("overrides", "world_size", "expected"),
    [
        ([], None, 1),
        ([], 8, 8),
        (["parallel.tp=2"], 8, 4),
        (["parallel.dp=3"], None, 3),
        (["parallel.tp=2", "parallel.dp=4"], 8, 4),
    ],
)
def test_dp_is_given_or_what_the_other_axes_leave(
    file: Path, overrides: list[str], world_size: int | None, expected: int
) -> None:
    assert data_parallel_size(load_config(file, overrides), world_size) == expected


def test_block_sizes_hold_the_whole_curriculum(file: Path) -> None:
    assert block_sizes(load_config(file)) == [4]
    assert block_sizes(load_config(file, ["diffusion.objective=ar"])) == [1]
    phases = "diffusion.phases=[{block_size: 64, steps: 5}, {block_size: 8}]"
    assert block_sizes(load_config(file, [phases])) == [64, 8]


def test_only_a_searched_phase_must_have_the_axes_that_the_search_measures(file: Path) -> None:
    searched = ["diffusion.search_every_steps=2", "evaluate.every_steps=2"]
    flat = "{block_size: 4, steps: 4, interval: [0.3, 0.8], axes: {row_weight: flat}}"
    validate(load_config(file, [*searched, f"diffusion.phases=[{flat}, {{block_size: 4}}]"]))
    with pytest.raises(ConfigError, match=r"^axes\.row_weight=flat with search_every_steps above 0"):
        validate(load_config(file, [*searched, f"diffusion.phases=[{flat.replace('interval: [0.3, 0.8], ', '')}]"]))


def test_the_grid_alone_can_be_checked(file: Path) -> None:
    config: Config = load_config(file, ["parallel.tp=3"])
    with pytest.raises(GridError, match="does not divide num_heads"):
        check_grid(config, world_size=3)


def test_validation_needs_no_file() -> None:
    validate(
        config_from_tree(
            {
                "run": {"dir": "x"},
                "model": {"num_layers": 1, "hidden_size": 8, "num_heads": 1},
                "data": {"seq_len": 16},
                "train": {"steps": 1},
            }
        )
    )
