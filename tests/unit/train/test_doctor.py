"""The leak doctor passes what is right, for every kind of run; planted leaks are in test_planted_leaks."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bd3_megatron.attention import flex, sdpa
from bd3_megatron.attention.probe import calls_of, sample_streams
from bd3_megatron.attention.select import named
from bd3_megatron.attention.visibility import Visibility
from bd3_megatron.config.load import dump_config, load_config
from bd3_megatron.config.objective import block_sizes
from bd3_megatron.config.schema import Config
from bd3_megatron.errors import LeakError
from bd3_megatron.train import doctor
from bd3_megatron.train.backends import attention_request, choose_backends, phase_layout
from bd3_megatron.train.doctor import diagnose
from tests.unit.cost.cases import case
from tests.unit.train.leaks import planted

CPU = torch.device("cpu")
# heads of 32: one window of codes holds all pieces of 32 positions
WIDE = {"hidden_size": 128}
RUNS: dict[str, dict[str, Any]] = {
    "wrap": {},
    "isolated": {"data": {"packing": "isolated"}},
    "ar": {"kind": "ar"},
    "ar isolated": {"kind": "ar", "data": {"packing": "isolated"}},
    "mdlm": {"kind": "mdlm"},
    "S = 1": {"kind": "s1"},
    "S = 8": {"diffusion": {"block_size": 8}},
    "S = 2, two views, cp 2": {"diffusion": {"block_size": 2, "views": 2}, "parallel": {"cp": 2}},
    "every row": {"train": {"skip_dead_rows": False}},
    "curriculum": {
        "diffusion": {"phases": [{"block_size": 8, "steps": 1}, {"block_size": 32, "steps": 1}, {"block_size": 2}]}
    },
}


def examined(config: Config, name: str, dtype: torch.dtype = torch.float32) -> str:
    return diagnose(config, dict.fromkeys(block_sizes(config), named(name)), dtype=dtype, device=CPU)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", ["dense", "dense/sdpa", "structured"])
def test_what_is_right_passes_in_one_line(run: str, name: str) -> None:
    config = case(model=WIDE, **RUNS[run])
    said = examined(config, name)
    assert said.startswith("no leak: ") and "\n" not in said
    assert all(f"block_size={size} by {name}" in said for size in block_sizes(config))
    assert ("packed documents" in said) == (config.data.packing == "isolated")


def test_a_leak_of_rows_that_are_not_cut_is_found() -> None:
    """Layers hand such a backend all rows at once, so that is what the doctor examines."""

    def leaky(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, *, scale: float) -> Tensor:
        return sdpa.masked_rows(q, k, v, replace(visibility, block_size=8), scale=scale)

    backend = replace(named("dense/sdpa"), attend_rows=leaky)
    with pytest.raises(LeakError, match="influences it and must not"):
        diagnose(case(model=WIDE, train={"skip_dead_rows": False}), {4: backend}, dtype=torch.float32, device=CPU)


def test_bf16_passes_too() -> None:
    assert examined(case(model=WIDE), "dense", torch.bfloat16).endswith("bfloat16")
    assert examined(case(model=WIDE, data={"packing": "isolated"}), "structured", torch.bfloat16).endswith("bfloat16")


@pytest.mark.parametrize("run", ["mdlm", "ar"])
def test_one_whole_stream_passes_as_plain_attention(run: str) -> None:
    assert "by plain" in examined(case(**RUNS[run]), "plain")


def test_a_backend_is_chosen_for_every_phase_on_its_own_rows() -> None:
    config = case(**RUNS["curriculum"])
    chosen = choose_backends(config, dtype=torch.float32, device=CPU)
    assert {size: backend.label for size, backend in chosen.items()} == dict.fromkeys((8, 32, 2), "dense/sdpa")
    requests = [
        attention_request(config, phase_layout(config, size, views=1, cp_rank=0), dtype=torch.float32, device=CPU)
        for size in (8, 32)
    ]
    assert [(r.rows.block_size, r.rows.clean_rows) for r in requests] == [(8, ((0, 24),)), (32, ())]


def test_the_request_is_what_a_rank_asks() -> None:
    config = case(parallel={"tp": 2, "cp": 2}, data={"packing": "isolated"}, train={"micro_batch_size": 2})
    layout = phase_layout(config, 4, views=1, cp_rank=1)
    request = attention_request(config, layout, dtype=torch.bfloat16, device=CPU)
    assert request.num_heads == config.model.num_heads // 2 and request.head_dim == config.model.head_width
    assert request.num_kv_heads == config.model.kv_heads // 2 and request.batch == 2 and request.documents
    assert request.rows.noisy_rows == ((8, 16), (16, 24)) and request.rows.clean_key_rows == ((0, 32),)


def options(tmp_path: Path, config: Config, *overrides: str) -> argparse.Namespace:
    dump_config(config, tmp_path / "config.yaml")
    return argparse.Namespace(config=tmp_path / "config.yaml", overrides=list(overrides))


def test_the_command_answers_0_and_names_the_kernels_on_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = case(data={"packing": "isolated"})
    assert doctor.run(options(tmp_path, config, "data.seq_len=16", "train.precision=fp32")) == 0
    said = capsys.readouterr().out
    leaks, rows = said.splitlines()
    assert leaks == "no leak: block_size=4 by dense/sdpa, over 16 positions, packed documents, float32"
    assert rows.startswith("rows: RMSNorm by torch (written out), rotary turn by torch, SwiGLU by torch (written out)")


def test_the_command_answers_3_with_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = planted("noisy rows see their own clean block", "dense")
    monkeypatch.setattr(doctor, "choose_backends", lambda config, **_: {4: broken})
    assert doctor.run(options(tmp_path, case())) == 3
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(
        "visibility is wrong under attention backend planted, block_size=4:\n"
    )
    assert "\n  noisy block 6: clean block 6 influences it and must not (outputs)\n" in said.err
    # the last clean block is not there
    assert "noisy block 7: clean block" not in said.err
    assert said.err.endswith("use another attention.backend (dense is the reference) and report this.\n")


def test_a_long_table_of_violations_is_cut() -> None:
    with pytest.raises(LeakError, match=r"\n  and \d+ more\n"):
        diagnose(case(), {4: planted("noisy rows see every clean row", "dense")}, dtype=torch.float32, device=CPU)


class Graphs:
    """A compiler for torch.compile that counts the fused calls of every graph, and computes nothing."""

    def __init__(self) -> None:
        self.fused_calls: list[int] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., list[Tensor]]:
        nodes = list(module.graph.nodes)
        self.fused_calls.append(sum("FlexAttentionHOP" in type(node.target).__name__ for node in nodes))
        shapes = [output.meta["example_value"] for output in nodes[-1].args[0]]
        return lambda *_: [shape.new_zeros(shape.shape) for shape in shapes]


def small(config: Config) -> Config:
    """The same phases and calls over few positions: S = L stays so, other block sizes stay what they are."""
    sizes, length = block_sizes(config), config.data.seq_len
    least = 2 * max([size for size in sizes if size < length], default=16)
    phases = [{"block_size": least if size == length else size, "steps": 1} for size in sizes]
    tree = (
        {"phases": phases, "views": config.diffusion.views}
        if len(phases) > 1
        else {"block_size": phases[0]["block_size"]}
    )
    return case(model=WIDE, data={"seq_len": least, "packing": config.data.packing}, diffusion=tree)


def test_no_shipped_curriculum_runs_flex_attention_unfused(root: Path) -> None:
    shipped = [load_config(path, ["model.vocab_size=64"]) for path in sorted((root / "configs").glob("*.yaml"))]
    curricula = [small(config) for config in shipped if len(block_sizes(config)) > 1]
    assert len(curricula) > 5
    # curricula with the same kinds of phases need the same graphs; of each kind one is run
    runs = {(tuple(s == c.data.seq_len for s in block_sizes(c)), c.data.packing): c for c in curricula}
    for config in runs.values():
        graphs = Graphs()
        call = flex.compiled(graphs)
        calls = set()
        with torch.no_grad(), warnings.catch_warnings():
            # torch warns when it runs the unfused form
            warnings.simplefilter("error")
            for size in block_sizes(config):
                layout = phase_layout(config, size, views=config.diffusion.views, cp_rank=0)
                request = attention_request(config, layout, dtype=torch.float32, device=CPU)
                for packed in (0, 1):
                    for visibility in calls_of(request.visibility(packed)):
                        streams = sample_streams(replace(request, needs_grad=False), visibility)
                        flex.attend(*streams, visibility, scale=1.0, call=call)
                        calls.add((size, visibility.clean_rows))
        # one graph a call, whatever the documents; training, evaluation and another batch size need no more than four each
        assert graphs.fused_calls == [1] * len(calls)
        assert 4 * len(calls) <= flex.MAX_GRAPHS
