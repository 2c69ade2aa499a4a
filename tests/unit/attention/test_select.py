"""A backend asked for is the backend given or an error that says why; auto takes what is right and fastest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bd3_megatron.attention import dense, probe, select, structured
from bd3_megatron.attention.request import AttentionRequest
from bd3_megatron.attention.select import BACKENDS, choose
from bd3_megatron.attention.streams import Attend, Stream
from bd3_megatron.attention.visibility import Visibility
from bd3_megatron.errors import BackendError
from tests.unit.attention.problems import outputs, problem, visibilities, worst_difference

CPU = AttentionRequest(
    device_type="cpu", dtype=torch.float32, batch=2, length=64, block_size=4, num_heads=4, num_kv_heads=2, head_dim=16
)
CUDA = replace(CPU, device_type="cuda", dtype=torch.bfloat16)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers of a machine with a Hopper GPU and every optional package; no kernel runs."""
    monkeypatch.setattr("bd3_megatron.attention.partial.capability", lambda: (9, 0))
    monkeypatch.setattr("bd3_megatron.attention.flex.capability", lambda: (9, 0))
    for room in ("flex", "triton_pair"):
        monkeypatch.setattr(f"bd3_megatron.attention.{room}.find_spec", lambda name: object())


def label_of(attend: Attend) -> str:
    return next(c.label for c in select._CANDIDATES if c.attend is attend)


def test_auto_on_cpu_is_structured() -> None:
    chosen = choose("auto", CPU)
    assert chosen.label == "structured/cpu"
    p = problem(next(visibilities(24, 4)))
    assert worst_difference(outputs(chosen.attend, p), outputs(structured.attend, p)) == 0


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


def test_auto_falls_back_on_the_judge_and_says_why() -> None:
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
    "changes", [{}, {"documents": True}, {"streams": "clean"}, {"streams": "noisy"}, {"block_size": 64}]
)
def test_the_probe_finds_structured_right_and_a_wrong_backend_wrong(changes: dict[str, Any]) -> None:
    request = replace(CPU, **changes)
    assert probe.error_against_reference(structured.attend, request) < 1

    def shrunk(noisy: Stream | None, clean: Stream | None, visibility: Visibility, *, scale: float) -> Any:
        return dense.attend(noisy, clean, visibility, scale=0.9 * scale)

    assert probe.error_against_reference(shrunk, request) > 1


def test_the_probe_times_forward_and_backward() -> None:
    assert probe.measure_seconds(structured.attend, replace(CPU, length=32)) > 0
    assert probe.measure_seconds(structured.attend, replace(CPU, length=32, needs_grad=False)) > 0


@pytest.mark.usefixtures("hopper")
def test_kernels_of_our_own_are_taken_only_if_right() -> None:
    fast = {"measure": lambda attend, _: 0.5 if label_of(attend) == "triton" else 1.0}
    assert choose("auto", CUDA, **fast, compare=lambda *_: 0.5).label == "triton"
    assert (
        choose("auto", CUDA, **fast, compare=lambda attend, _: 2.0 * (label_of(attend) == "triton")).label != "triton"
    )


def test_every_backend_of_the_table_can_be_asked_for() -> None:
    for name, (_, refuse) in BACKENDS.items():
        assert refuse(replace(CPU, needs_grad=False)) is None or name == "triton"


def test_optional_packages_are_detected_not_required() -> None:
    found = select.optional_packages()
    assert set(found) == {"triton", "flash-attn", "flash-attn-4", "transformer-engine"}
    assert all(version is None or isinstance(version, str) for version in found.values())


@pytest.mark.usefixtures("hopper")
def test_structured_attention_leaves_packed_documents_on_a_gpu_to_others() -> None:
    able = {"measure": lambda *_: 1.0, "compare": lambda *_: 0.0}
    with pytest.raises(
        BackendError, match="thousands of small kernels a layer for packed documents.*use flex or triton"
    ):
        choose("structured", replace(CUDA, documents=True), **able)
    assert not choose("auto", replace(CUDA, documents=True), **able).label.startswith("structured")
    assert structured.refuse(replace(CPU, documents=True)) is None
