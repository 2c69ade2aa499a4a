"""The leak doctor passes what is right, for every kind of run, and finds every leak that is planted."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bd3_megatron.attention import dense, structured
from bd3_megatron.attention.select import Backend
from bd3_megatron.attention.streams import Attend, Stream
from bd3_megatron.attention.visibility import Visibility
from bd3_megatron.config.load import dump_config
from bd3_megatron.config.objective import block_sizes
from bd3_megatron.config.schema import Config
from bd3_megatron.diffusion.objective import BlockDiffusion
from bd3_megatron.errors import LeakError
from bd3_megatron.parallel.pair_split import pair_layout
from bd3_megatron.train import doctor
from bd3_megatron.train.doctor import diagnose, examine, example_documents, streams_of
from tests.unit.cost.cases import case

CPU = torch.device("cpu")
RUNS: dict[str, dict[str, Any]] = {
    "wrap": {},
    "isolated": {"data": {"packing": "isolated"}},
    "ar": {"kind": "ar"},
    "ar isolated": {"kind": "ar", "data": {"packing": "isolated"}},
    "mdlm": {"kind": "mdlm"},
    "S = 1": {"kind": "s1"},
    "S = 8": {"diffusion": {"block_size": 8}},
    "curriculum": {
        "diffusion": {"phases": [{"block_size": 8, "steps": 1}, {"block_size": 32, "steps": 1}, {"block_size": 2}]}
    },
}


def examined(config: Config, attend: Attend, *, max_blocks: int | None = 4, dtype: torch.dtype = torch.float32) -> str:
    return diagnose(config, Backend("planted", attend, ""), max_blocks=max_blocks, dtype=dtype, device=CPU)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("attend", [dense.attend, structured.attend], ids=["dense", "structured"])
def test_what_is_right_passes_in_one_line(name: str, attend: Attend) -> None:
    config = case(**RUNS[name])
    said = examined(config, attend)
    assert said.startswith("no leak: ") and "\n" not in said
    assert all(f"block_size={size} over" in said for size in block_sizes(config))


def test_whole_sequences_and_bf16_pass_too() -> None:
    assert "over 32 positions" in examined(case(data={"packing": "isolated"}), structured.attend, max_blocks=None)
    assert examined(case(), dense.attend, dtype=torch.bfloat16).endswith("bfloat16")


Change = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(mask, query is noisy, query block, key is noisy, key block) -> another mask."""


def planted(change: Change) -> Attend:
    """Dense attention whose mask over [noisy; clean] rows was tampered with."""

    def attend(
        noisy: Stream | None, clean: Stream | None, visibility: Visibility, *, scale: float
    ) -> tuple[Tensor | None, Tensor | None]:
        streams = [s for s in (noisy, clean) if s is not None]
        split = 0 if noisy is None else noisy.q_BLNH.shape[1]
        q, k, v = (torch.cat([getattr(s, name) for s in streams], 1) for name in ("q_BLNH", "k_BLGH", "v_BLGH"))
        row_P = torch.arange(q.shape[1])
        block_P = torch.where(row_P < split, row_P, row_P - split) // visibility.block_size
        mask = visibility.pair_mask("cpu")[0]
        is_noisy_P = row_P < split
        mask = change(mask, is_noisy_P[:, None], block_P[:, None], is_noisy_P[None], block_P[None])
        scores = torch.einsum("bqnh,bknh->bnqk", q, k) * scale
        out = torch.einsum("bnqk,bknh->bqnh", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)
        return (out[:, :split] if noisy is not None else None), (out[:, split:] if clean is not None else None)

    return attend


def test_the_planting_itself_is_right() -> None:
    assert examined(case(), planted(lambda mask, *_: mask)).startswith("no leak")


LEAKS: dict[str, tuple[Change, str]] = {
    "own clean block": (
        lambda mask, qn, q, kn, k: mask | (qn & ~kn & (k == q)),
        "noisy block 1: clean block 1 influences it and must not",
    ),
    "all clean blocks": (
        lambda mask, qn, q, kn, k: mask | (qn & ~kn),
        "noisy block 0: clean block 2 influences it and must not",
    ),
    "the noisy block before": (
        lambda mask, qn, q, kn, k: mask | (qn & kn & (k == q - 1)),
        "noisy block 2: noisy block 1 influences it and must not",
    ),
    "clean rows that look ahead": (
        # only through the second layer: a clean row carries what it saw into a later block's context
        lambda mask, qn, q, kn, k: mask | (~qn & ~kn & (k == q + 1)),
        "noisy block 1: clean block 1 influences it and must not",
    ),
    "clean rows that see noise": (
        lambda mask, qn, q, kn, k: mask | (~qn & kn & (k == q)),
        "noisy block 1: noisy block 0 influences it and must not",
    ),
    "a blind block": (
        lambda mask, qn, q, kn, k: mask & ~(qn & ~kn & (q == 3)),
        "noisy block 3: clean block 0 must influence it and does not",
    ),
    "a context cut short": (
        lambda mask, qn, q, kn, k: mask & ~((q == 3) & (k == 0)) & ~((q != k) & (k == 0)),
        "noisy block 3: clean block 0 must influence it and does not",
    ),
}


@pytest.mark.parametrize("name", LEAKS)
def test_every_planted_leak_is_found(name: str) -> None:
    change, sentence = LEAKS[name]
    with pytest.raises(
        LeakError, match=r"^visibility is wrong under attention backend planted, block_size=4:\n"
    ) as caught:
        examined(case(), planted(change))
    assert sentence in str(caught.value)
    assert str(caught.value).endswith("use attention.backend=dense and report this.")


def forgets_documents(
    noisy: Stream | None, clean: Stream | None, visibility: Visibility, *, scale: float
) -> tuple[Tensor | None, Tensor | None]:
    return dense.attend(noisy, clean, replace(visibility, document_id_BL=None), scale=scale)


@pytest.mark.parametrize("kind", ["s4", "ar"])
def test_sight_across_documents_is_found(kind: str) -> None:
    assert examined(case(kind=kind), forgets_documents).startswith("no leak"), "without documents nothing is forgotten"
    with pytest.raises(LeakError, match="influences it and must not"):
        examined(case(kind=kind, data={"packing": "isolated"}), forgets_documents)


def looks_ahead(
    noisy: Stream | None, clean: Stream | None, visibility: Visibility, *, scale: float
) -> tuple[Tensor | None, Tensor | None]:
    wide = replace(visibility, block_size=visibility.block_size * 2)
    return dense.attend(noisy, clean, wide, scale=scale)


def test_the_ar_baseline_that_looks_ahead_is_found() -> None:
    with pytest.raises(LeakError, match="noisy block 0: clean block 1 influences it and must not"):
        examined(case(kind="ar"), looks_ahead)


def test_a_long_table_of_offenders_is_cut() -> None:
    def everything(mask: Tensor, *_: Tensor) -> Tensor:
        return torch.ones_like(mask)

    with pytest.raises(LeakError, match=r"\n  and \d+ more\n"):
        examined(case(), planted(everything), max_blocks=None)


def test_violations_are_per_pair_of_blocks() -> None:
    change, _ = LEAKS["the noisy block before"]
    layout = pair_layout(BlockDiffusion(block_size=4), length=16)
    found = examine(planted(change), layout, None, dtype=torch.float32, device=CPU)
    # in two layers what block k - 2 is reaches block k through block k - 1
    assert {(o.query_block, o.source_block) for o in found if o.source == "noisy"} == {
        (1, 0),
        (2, 1),
        (2, 0),
        (3, 2),
        (3, 1),
    }


def test_example_documents_are_whole_blocks() -> None:
    for length, size in ((32, 4), (16, 4), (8, 4), (4, 4), (3, 1)):
        document_L = example_documents(length, size)
        assert document_L.shape == (length,) and (document_L.diff() >= 0).all()
        assert all(len(block.unique()) == 1 for block in document_L.split(size))
    assert len(example_documents(16, 4).unique()) == 3


def test_streams_follow_the_objective() -> None:
    assert [streams_of(case(**RUNS[name])) for name in ("wrap", "ar", "mdlm", "S = 1", "curriculum")] == [
        "pair",
        "clean",
        "noisy",
        "pair",
        "pair",
    ]


def options(tmp_path: Path, config: Config, *overrides: str) -> argparse.Namespace:
    dump_config(config, tmp_path / "config.yaml")
    return argparse.Namespace(config=tmp_path / "config.yaml", overrides=list(overrides))


def test_the_command_answers_0_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = case(data={"packing": "isolated"})
    assert doctor.run(options(tmp_path, config, "data.seq_len=16", "train.precision=fp32")) == 0
    assert capsys.readouterr().out.startswith("no leak: block_size=4 over 16 positions, attention backend structured")


def test_the_command_answers_3_with_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Backend("planted", planted(LEAKS["own clean block"][0]), "")
    monkeypatch.setattr(doctor, "choose", lambda name, request: broken)
    assert doctor.run(options(tmp_path, case())) == 3
    said = capsys.readouterr()
    assert said.out == "" and "noisy block 7: clean block" not in said.err
    assert "\n  noisy block 6: clean block 6 influences it and must not\n" in said.err
