"""Every refusal of a mixture of experts names the value, the rule and what to do."""

from __future__ import annotations

from typing import Any

import pytest

from bd3_megatron.config.load import config_from_tree
from bd3_megatron.config.schema import Config
from bd3_megatron.config.validate import validate
from bd3_megatron.errors import ConfigError, GridError

EXPERTS = {"number": 8, "top_k": 2, "width": 16}


def config(model: dict[str, Any], parallel: dict[str, Any] | None = None) -> Config:
    base = {"num_layers": 4, "hidden_size": 32, "num_heads": 4, "vocab_size": 64}
    tree = {
        "run": {"dir": "x"},
        "model": base | model,
        "data": {"path": "d", "seq_len": 32},
        "parallel": parallel or {},
    }
    return config_from_tree(tree | {"train": {"steps": 1, "global_batch_size": 8}})


@pytest.mark.parametrize(
    ("experts", "law"),
    [
        ({"top_k": 9}, r"^top_k=9 exceeds number=8 of experts; use at most 8\.$"),
        (
            {"leading_dense_layers": 4},
            r"^leading_dense_layers=4 leaves no layer of num_layers=4 with experts; use at most 3",
        ),
        ({"group_top_k": 2}, r"^group_top_k=2 with groups=1; set groups above 1 or group_top_k=1\.$"),
        ({"groups": 3}, r"^groups=3 does not divide number of experts=8; use 1, 2, 4 or 8\.$"),
        ({"groups": 8}, r"^groups=8 leaves groups of one expert; use at most 4\.$"),
        ({"groups": 2, "group_top_k": 3}, r"^group_top_k=3 exceeds groups=2; use at most 2\.$"),
        ({"groups": 4, "top_k": 3}, r"^top_k=3 exceeds the 2 experts of group_top_k=1 groups of 2; use at most 2"),
    ],
)
def test_a_router_that_cannot_choose_is_refused(experts: dict[str, Any], law: str) -> None:
    with pytest.raises(ConfigError, match=law):
        validate(config({"experts": EXPERTS | experts}))


def test_the_papers_style_has_no_experts() -> None:
    with pytest.raises(ConfigError, match=r"^model\.experts with style=paper, whose MLP is dense; use style=modern\.$"):
        validate(config({"experts": EXPERTS, "style": "paper"}))


def test_a_fraction_that_leaves_no_pairs_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^rotary_fraction=0\.4 of heads of 8 channels is 3, and positions turn"):
        validate(config({"rotary_fraction": 0.4}))


@pytest.mark.parametrize(
    ("parallel", "law"),
    [
        ({"ep": 3, "dp": 3}, r"^ep=3 does not divide number of experts=8; use 1, 2, 4 or 8\.$"),
        ({"ep": 4, "dp": 2}, r"^ep=4 does not divide tp x cp x dp=2; use 1 or 2\.$"),
        (
            {"tp": 2},
            r"^tp=2 with model\.experts and sequence_parallel=false sends every row 2 times to its experts; set",
        ),
        (
            {"dp": 2, "zero_stage": 2},
            r"^zero_stage=2 with model\.experts is not proved equal on every grid; use zero_stage=1",
        ),
        ({"offload_optimizer": True}, r"^offload_optimizer=true with model\.experts is not proved; leave it off"),
        ({"pp": 2, "vpp": 2}, r"^vpp=2 with model\.experts is not proved equal on every grid; leave vpp unset\.$"),
        (
            {"pp": 4},
            r"^leading_dense_layers=1 fills the first of pp=4 stages \(of 1 layer\), which then holds no expert",
        ),
    ],
)
def test_a_grid_on_which_experts_are_not_exact_is_refused(parallel: dict[str, Any], law: str) -> None:
    with pytest.raises(GridError, match=law):
        validate(config({"experts": EXPERTS | {"leading_dense_layers": 1}}, parallel))


def test_expert_parallel_ranks_without_experts_are_refused() -> None:
    with pytest.raises(
        GridError, match=r"^ep=2 without model\.experts deals out nothing; use ep=1, or give model\.experts\.$"
    ):
        validate(config({}, {"ep": 2, "dp": 2}))


def test_a_shared_expert_is_cut_over_tp() -> None:
    with pytest.raises(GridError, match=r"^tp=2 does not divide shared_width=5; use 1 or 5\.$"):
        validate(config({"experts": EXPERTS | {"shared_width": 5}}, {"tp": 2, "sequence_parallel": True}))
