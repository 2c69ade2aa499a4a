"""Every planted leak is found before the first step, on the backend that would train, in rows and calls of the run's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bd3_megatron.attention.request import AttentionRequest
from bd3_megatron.attention.select import named
from bd3_megatron.config.objective import block_sizes
from bd3_megatron.config.schema import Config
from bd3_megatron.errors import LeakError
from bd3_megatron.model.attention_context import AttentionContext
from bd3_megatron.train.backends import attention_request, phase_layout
from bd3_megatron.train.doctor import diagnose, examine_layout
from tests.unit.cost.cases import case
from tests.unit.train.leaks import LEAKS, planted

CPU = torch.device("cpu")
TWO = {"micro_batch_size": 2}
# heads of 32: one window of codes holds all pieces of 32 positions
WIDE = {"hidden_size": 128}
# 640 positions: the pair has ten tiles of 128 rows; heads of 128, grouped
LONG = {"model": {"hidden_size": 256, "num_heads": 2, "num_kv_heads": 1}, "data": {"seq_len": 640}}
SETTINGS: dict[str, dict[str, Any]] = {
    "a row of the last tile sees its own clean block": {**LONG, "kind": "s16"},
    "a row of the last tile sees the last clean row": {**LONG, "kind": "s16"},
    "the last noisy row sees the one of a block before": {**LONG, "kind": "s16"},
    "a clean row of the last tile looks ahead": {**LONG, "kind": "s16"},
    "rows from 64 on leak where the last clean block is dropped": {"data": {"seq_len": 96}},
    "only the second view leaks": {"diffusion": {"views": 2}, "train": {"skip_dead_rows": False}},
    "a view sees the view before": {"diffusion": {"views": 2}},
    "the second chunk of a context-parallel rank leaks": {"parallel": {"cp": 2}},
    "clean rows of a context-parallel rank look ahead": {"parallel": {"cp": 2}},
    "documents are forgotten": {"data": {"packing": "isolated"}},
    "documents end with their block": {"data": {"packing": "isolated"}},
    "all sequences have the documents of the first": {"data": {"packing": "isolated"}, "train": TWO},
    "only the second sequence leaks": {"train": TWO},
    "blocks are twice as large": {"train": {"skip_dead_rows": False}},
}
"""What a run must have for the leak to show; others show in the smallest one."""
IN_GRADIENTS = [name for name in LEAKS if name.startswith("the gradient")]


def run_with(leak: str) -> Config:
    return case(**{"model": WIDE} | SETTINGS.get(leak, {}))


def refuse(config: Config, leak: str, name: str, dtype: torch.dtype = torch.float32) -> str:
    backends = dict.fromkeys(block_sizes(config), planted(leak, name))
    with pytest.raises(LeakError, match=r"^visibility is wrong under attention backend planted, block_size=") as caught:
        diagnose(config, backends, dtype=dtype, device=CPU)
    return str(caught.value)


def test_there_are_enough_of_them() -> None:
    assert len(LEAKS) >= 25 and set(SETTINGS) <= set(LEAKS)


@pytest.mark.parametrize("leak", LEAKS)
@pytest.mark.parametrize("name", ["dense", "structured"])
def test_a_planted_leak_is_found(leak: str, name: str) -> None:
    said = refuse(run_with(leak), leak, name)
    assert ("(gradients of " in said) == (leak in IN_GRADIENTS) or "(outputs)" in said


@pytest.mark.parametrize("leak", ["noisy rows see their own clean block", "the gradient of a value"])
def test_a_leak_in_bf16_is_found(leak: str) -> None:
    refuse(case(model=WIDE), leak, "structured", torch.bfloat16)


def test_a_leak_in_one_phase_of_a_curriculum_is_found() -> None:
    phases = [{"block_size": 8, "steps": 1}, {"block_size": 32, "steps": 1}, {"block_size": 2}]
    config = case(model=WIDE, diffusion={"phases": phases})
    leaky = planted("only the last layer's call leaks", "structured")
    backends = {8: named("structured"), 32: named("structured"), 2: leaky}
    with pytest.raises(LeakError, match="block_size=2:\n  noisy block 0: clean block 0 influences it and must not"):
        diagnose(config, backends, dtype=torch.float32, device=CPU)


def test_a_leak_in_one_whole_stream_is_found() -> None:
    refuse(case(kind="ar"), "clean rows see the next clean block", "plain")
    # with one block there is nothing that must not be seen, but every weight is known
    said = refuse(case(kind="mdlm"), "the gradient of a value", "plain")
    assert "noisy block 0: noisy block 0 must influence it as the rule says and does not" in said


def forward_only(config: Config, dtype: torch.dtype = torch.float32) -> tuple[AttentionRequest, Any]:
    layout = phase_layout(config, block_sizes(config)[0], views=config.diffusion.views, cp_rank=0)
    request = attention_request(config, layout, dtype=dtype, device=CPU)
    return AttentionRequest(**{**vars(request), "needs_grad": False}), layout


@pytest.mark.parametrize("leak", [name for name in LEAKS if name not in IN_GRADIENTS and name not in SETTINGS])
def test_a_leak_in_flex_attention_is_found(leak: str) -> None:
    request, layout = forward_only(case(model=WIDE))
    size = layout.block_size
    assert not examine_layout(AttentionContext(layout, {size: named("flex")}), request, None)
    found = examine_layout(AttentionContext(layout, {size: planted(leak, "flex")}), request, None)
    assert found and all(violation.where == "outputs" for violation in found)
