"""A backend asked for is the backend given or an error that says why; auto takes what is right and fastest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bd3_megatron.attention import dense, machine, plain, probe, sdpa, select, structured
from bd3_megatron.attention.request import AttentionRequest, ragged_documents
from bd3_megatron.attention.select import choose, named
from bd3_megatron.attention.streams import Attend, Stream
from bd3_megatron.attention.visibility import Visibility
from bd3_megatron.errors import BackendError
from tests.tolerances import FAST_PATH_FP64
from tests.unit.attention.problems import (
    outputs,
    outputs_and_gradients,
    problem,
    visibilities,
    worst_difference,
    zigzag,
)

CPU = AttentionRequest(
    device_type="cpu",
    dtype=torch.float32,
    batch=2,
    rows=Visibility.pair(64, 4),
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)
DROPPED = Visibility(4, 64, ((0, 64),), ((0, 60),), ((0, 60),))
"""The last clean block is not there, as in training."""
CUDA = replace(CPU, device_type="cuda", dtype=torch.bfloat16)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers of a machine with a Hopper GPU and every optional package; no kernel runs."""
    monkeypatch.setattr(machine, "capability", lambda: (9, 0))
    monkeypatch.setattr(machine, "has", lambda package: True)


def label_of(attend: Attend) -> str:
    return next(c.label for c in select._CANDIDATES if c.attend is attend)


@pytest.mark.parametrize(
    ("length", "label", "attend"),
    [(sdpa.LONGEST, "dense/sdpa", sdpa.attend), (sdpa.LONGEST + 4, "structured/cpu", structured.attend)],
)
def test_auto_on_cpu_goes_by_the_length_alone(length: int, label: str, attend: Attend) -> None:
    for batch in (1, 64):
        chosen = choose("auto", replace(CPU, rows=Visibility.pair(length, 4), batch=batch))
        assert chosen.label == label
    p = problem(next(visibilities(24, 4)))
    assert worst_difference(outputs(chosen.attend, p), outputs(attend, p)) == 0


@pytest.mark.parametrize("name", ["dense", "structured"])
def test_a_backend_asked_for_is_given(name: str) -> None:
    assert choose(name, CPU).label.startswith(name)
    assert choose("flex", replace(CPU, needs_grad=False)).label == "flex/TRITON"


def test_a_refused_backend_is_an_error_with_the_reason() -> None:
    with pytest.raises(BackendError, match="flex attention has no backward on CPU"):
        choose("flex", CPU)
    with pytest.raises(BackendError, match="structured attention has no stock kernel for cuda, torch.float64"):
        choose("structured", replace(CUDA, dtype=torch.float64))


def test_an_unknown_backend_names_the_known_ones() -> None:
    with pytest.raises(BackendError, match="'flash3' does not exist; use auto, dense, structured"):
        choose("flash3", CPU)


def test_auto_falls_back_on_the_reference_and_says_why() -> None:
    chosen = choose("auto", replace(CPU, device_type="mps"))
    assert chosen.label == "dense" and "no kernel for device 'mps'" in chosen.why


@pytest.mark.usefixtures("hopper")
def test_auto_on_cuda_is_the_fastest_of_those_that_are_right() -> None:
    seconds = {"structured/cudnn": 3.0, "structured/flash": 2.0, "flex/TRITON": 1.0, "flex/FLASH": 0.5}

    def measure(attend: Attend, request: AttentionRequest) -> float:
        return seconds.get(label_of(attend), 9.0)

    def compare(attend: Attend, request: AttentionRequest) -> float:
        if label_of(attend) == "flex/TRITON":
            raise RuntimeError("out of resource: shared memory\nRequired: 300000")
        return 40.0 if label_of(attend) == "flex/FLASH" else 0.5

    chosen = choose("auto", CUDA, measure=measure, compare=compare)
    assert chosen.label == "structured/flash" and "structured/cudnn 3e+03 ms" in chosen.why
    with pytest.raises(
        BackendError, match="fails on this machine: out of resource: shared memory.*differs.*by 40 times"
    ):
        choose("flex", CUDA, measure=measure, compare=compare)
    assert choose("structured/cudnn", CUDA, measure=measure, compare=compare).label == "structured/cudnn"


@pytest.mark.usefixtures("hopper")
def test_a_deterministic_run_gets_no_kernel_that_is_not() -> None:
    able = {"measure": lambda *_: 1.0, "compare": lambda *_: 0.0}
    with pytest.raises(BackendError, match="no kernel 'cudnn'"):
        choose("structured/cudnn", replace(CUDA, deterministic=True), **able)
    assert choose("structured", replace(CUDA, deterministic=True), **able).label == "structured/flash"


@pytest.mark.usefixtures("hopper")
def test_a_kernel_that_fails_on_the_real_shape_is_passed_over() -> None:
    def measure(attend: Attend, request: AttentionRequest) -> float:
        if label_of(attend) != "flex/TRITON":
            raise ValueError("no plan for this shape")
        return 1.0

    assert choose("auto", CUDA, measure=measure, compare=lambda *_: 0.0).label == "flex/TRITON"
    with pytest.raises(BackendError, match="structured/cudnn fails on this machine: no plan for this shape"):
        choose("structured", CUDA, measure=measure, compare=lambda *_: 0.0)


@pytest.mark.usefixtures("hopper")
def test_not_a_number_is_wrong() -> None:
    with pytest.raises(BackendError, match="differs from the dense reference by nan"):
        choose("flex", CUDA, measure=lambda *_: 1.0, compare=lambda *_: float("nan"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"documents": True},
        {"documents": True, "batch": 1},
        {"rows": Visibility.clean_only(64, 1)},
        {"rows": Visibility.noisy_only(64)},
        {"rows": zigzag(64, 4, 1, 2), "documents": True},
        {"rows": DROPPED, "needs_grad": False},
    ],
)
def test_the_probe_finds_structured_right_and_a_wrong_backend_wrong(changes: dict[str, Any]) -> None:
    request = replace(CPU, **changes)
    assert probe.error_against_reference(structured.attend, request) < 1

    def shrunk(noisy: Stream | None, clean: Stream | None, visibility: Visibility, *, scale: float) -> Any:
        return dense.attend(noisy, clean, visibility, scale=0.9 * scale)

    assert probe.error_against_reference(shrunk, request) > 1


def test_the_probe_times_forward_and_backward() -> None:
    assert probe.measure_seconds(structured.attend, replace(CPU, rows=Visibility.pair(32, 4))) > 0
    assert probe.measure_seconds(structured.attend, replace(CPU, rows=Visibility.pair(32, 4), needs_grad=False)) > 0


@pytest.mark.usefixtures("hopper")
def test_kernels_of_our_own_are_taken_only_if_right() -> None:
    fast = {"measure": lambda attend, _: 0.5 if label_of(attend) == "triton" else 1.0}
    assert choose("auto", CUDA, **fast, compare=lambda *_: 0.5).label == "triton"
    assert (
        choose("auto", CUDA, **fast, compare=lambda attend, _: 2.0 * (label_of(attend) == "triton")).label != "triton"
    )


def test_a_label_finds_its_backend_again() -> None:
    assert [named(name).label for name in ("dense", "structured", "flex", "flex/FLASH", "triton", "plain")] == [
        "dense", "structured/cpu", "flex/TRITON", "flex/FLASH", "triton", "plain",
    ]  # fmt: skip
    with pytest.raises(BackendError, match="'cudnn' does not exist"):
        named("cudnn")


def test_tables_are_prepared_with_the_visibility() -> None:
    visibility = Visibility.pair(64, 4)
    for name in ("flex", "triton"):
        made = named(name).prepare(visibility, torch.device("cpu"))
        assert made is named(name).prepare(visibility, torch.device("cpu")) is not None
    assert named("structured").prepare(visibility, torch.device("cpu")) is None


@pytest.mark.parametrize(
    "rows", [Visibility.noisy_only(24), Visibility.clean_only(24, 1)], ids=["masked diffusion", "autoregressive"]
)
def test_one_whole_stream_is_plain_attention(rows: Visibility) -> None:
    assert choose("plain", replace(CPU, rows=rows)).label == "plain"
    p = problem(rows)
    found, expected = outputs_and_gradients(plain.attend, p), outputs_and_gradients(dense.attend, p)
    assert worst_difference(found, expected) < FAST_PATH_FP64


def test_plain_attention_refuses_every_other_layout() -> None:
    for rows in (Visibility.pair(24, 4), Visibility.clean_only(24, 4), Visibility.pair(24, 24), zigzag(24, 3, 0, 2)):
        with pytest.raises(BackendError, match="plain attention serves one whole stream without documents"):
            choose("plain", replace(CPU, rows=rows))
        p = problem(rows)
        with pytest.raises(BackendError, match=f"not block_size={rows.block_size} of length=24; use structured"):
            plain.attend(p.noisy, p.clean, rows, scale=1.0)
    assert "without documents" in str(plain.refuse(replace(CPU, rows=Visibility.noisy_only(24), documents=True)))


def test_documents_are_packed_anew_for_every_repeat_and_borders_fall_inside_blocks() -> None:
    documents_BL = ragged_documents(3, 64, 0)
    assert not torch.equal(documents_BL, ragged_documents(3, 64, 1)) and torch.equal(
        documents_BL, ragged_documents(3, 64, 0)
    )
    borders_BL = documents_BL.diff(dim=1)
    assert (borders_BL >= 0).all() and not borders_BL[-1].any() and not torch.equal(borders_BL[0], borders_BL[1])
    assert any((row.nonzero() + 1).remainder(4).any() for row in borders_BL[:2])
    assert all(row.bincount().min() == 1 for row in documents_BL[:2])


@pytest.mark.usefixtures("hopper")
def test_structured_attention_leaves_packed_documents_on_a_gpu_to_others() -> None:
    able = {"measure": lambda *_: 1.0, "compare": lambda *_: 0.0}
    with pytest.raises(
        BackendError, match="thousands of small kernels a layer for packed documents.*use flex or triton"
    ):
        choose("structured", replace(CUDA, documents=True), **able)
    assert not choose("auto", replace(CUDA, documents=True), **able).label.startswith("structured")
    assert structured.refuse(replace(CPU, documents=True)) is None
