"""The structured backend equals the reference, gradients included, on every kind of visibility; it computes no pair in vain."""

from __future__ import annotations

import pytest
import torch

from bd3_megatron.attention import dense, structured
from bd3_megatron.attention.partial import KERNELS, kernels_for, merge_, statistics_dtype
from bd3_megatron.attention.request import AttentionRequest
from bd3_megatron.attention.streams import Stream
from bd3_megatron.attention.visibility import Visibility
from bd3_megatron.errors import BackendError, ShapeError
from tests.tolerances import FAST_PATH_BF16, FAST_PATH_FP32, FAST_PATH_FP64
from tests.unit.attention.problems import (
    outputs_and_gradients,
    problem,
    random_documents,
    visibilities,
    worst_difference,
)

SHAPES = [(1, 1), (24, 1), (24, 3), (24, 24), (60, 4), (96, 16), (56, 8)]


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize(("length", "block_size"), SHAPES)
def test_structured_equals_the_reference_in_fp64(length: int, block_size: int, heads: tuple[int, int]) -> None:
    for visibility in visibilities(length, block_size):
        p = problem(visibility, heads=heads)
        expected, actual = outputs_and_gradients(dense.attend, p), outputs_and_gradients(structured.attend, p)
        assert worst_difference(actual, expected) < FAST_PATH_FP64


@pytest.mark.parametrize(("length", "block_size"), [(320, 16), (300, 4), (128, 1), (192, 64)])
def test_structured_equals_the_reference_in_fp32(length: int, block_size: int) -> None:
    for visibility in visibilities(length, block_size):
        p = problem(visibility, head_dim=64, dtype=torch.float32)
        expected, actual = outputs_and_gradients(dense.attend, p), outputs_and_gradients(structured.attend, p)
        assert worst_difference(actual, expected, relative=True) < FAST_PATH_FP32


def test_structured_equals_the_reference_in_bf16() -> None:
    p = problem(Visibility.pair(96, 8), head_dim=16, dtype=torch.bfloat16)
    expected, actual = outputs_and_gradients(dense.attend, p), outputs_and_gradients(structured.attend, p)
    assert worst_difference(actual, expected, relative=True) < FAST_PATH_BF16


def test_sequences_done_apart_and_together_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(Visibility.pair(48, 4, random_documents(48, 3, batch=5)), batch=5)
    together = outputs_and_gradients(structured.attend, p)
    monkeypatch.setattr(structured, "_CACHED_ELEMENTS", 1)
    assert worst_difference(outputs_and_gradients(structured.attend, p), together) == 0


def test_rows_outermost_in_memory_give_the_same() -> None:
    p = problem(Visibility.pair(48, 4))
    assert p.noisy is not None and p.clean is not None
    expected = outputs_and_gradients(structured.attend, p)

    def rows_outermost(stream: Stream) -> Stream:
        return Stream(
            *(t.transpose(0, 1).contiguous().transpose(0, 1) for t in (stream.q_BLNH, stream.k_BLGH, stream.v_BLGH))
        )

    outs = structured.attend(rows_outermost(p.noisy), rows_outermost(p.clean), p.visibility, scale=0.3)
    assert worst_difference([o for o in outs if o is not None], expected[:2]) < FAST_PATH_FP64


def test_a_stream_whose_output_is_unused_still_gets_its_gradient() -> None:
    p = problem(Visibility.pair(24, 4))
    assert p.noisy is not None and p.clean is not None
    gradients = []
    for attend in (dense.attend, structured.attend):
        out, _ = attend(p.noisy, p.clean, p.visibility, scale=0.3)
        assert out is not None
        gradients.append(list(torch.autograd.grad(out, [p.clean.k_BLGH, p.clean.v_BLGH], p.weights[0])))
    assert worst_difference(gradients[1], gradients[0]) < FAST_PATH_FP64


def test_the_backward_cannot_be_differentiated_again() -> None:
    p = problem(Visibility.pair(8, 4))
    assert p.noisy is not None
    out, _ = structured.attend(p.noisy, p.clean, p.visibility, scale=0.3)
    assert out is not None
    (grad,) = torch.autograd.grad(out, p.noisy.q_BLNH, torch.ones_like(out).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize(("length", "block_size"), [(24, 3), (60, 4), (64, 1)])
def test_executed_pairs_are_the_allowed_pairs(length: int, block_size: int) -> None:
    for visibility in visibilities(length, block_size):
        repeats = 2 if visibility.document_id_BL is None else 1
        assert structured.executed_pairs(visibility, batch=2) == repeats * int(visibility.pair_mask().sum())


def test_executed_pairs_of_the_pair_have_a_closed_form() -> None:
    assert structured.executed_pairs(Visibility.pair(8192, 16)) == 8192 * (8192 + 16)


def test_merging_two_halves_of_the_keys_is_attention_over_all() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 3, 10, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    forward = KERNELS["cpu"].forward
    (out, lse), (late_out, late_lse) = (
        forward(q, k[:, :, part], v[:, :, part], 0.5, False) for part in (slice(0, 4), slice(4, 10))
    )
    merge_(out, lse, late_out, late_lse)
    whole_out, whole_lse = forward(q, k, v, 0.5, False)
    assert worst_difference([out, lse], [whole_out, whole_lse]) < FAST_PATH_FP64


@pytest.mark.parametrize("name", ["flash", "cudnn", "efficient"])
def test_cuda_kernels_are_called_as_their_operators_want(name: str) -> None:
    """Shapes only (meta device): what these kernels compute is checked on a GPU at start-up."""
    dtype = torch.float32 if name == "efficient" else torch.bfloat16
    q, k = (torch.empty(2, 5, rows, 64, dtype=dtype, device="meta") for rows in (160, 80))
    out, lse = KERNELS[name].forward(q, k, k, 0.1, False)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    grads = KERNELS[name].backward(q, q, k, k, out, lse.to(statistics_dtype(dtype)), 0.1, False)
    assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]


def test_kernels_name_what_they_serve() -> None:
    assert kernels_for("cpu", torch.float64, 7) == ["cpu"]
    assert kernels_for("cpu", torch.int8, 64) == []
    assert kernels_for("cuda", torch.float32, 64) == ["efficient"]
    assert kernels_for("cuda", torch.bfloat16, 60) == []
    assert kernels_for("cuda", torch.float64, 64) == []
    assert kernels_for("cuda", torch.float16, 512) == []
    assert kernels_for("mps", torch.float32, 64) == []


def test_dtypes_without_a_kernel_are_refused() -> None:
    request = AttentionRequest(
        device_type="cuda",
        dtype=torch.float64,
        batch=1,
        rows=Visibility.pair(64, 4),
        num_heads=2,
        num_kv_heads=2,
        head_dim=64,
    )
    assert "no stock kernel for cuda, torch.float64" in str(structured.refuse(request))
    p = problem(Visibility.pair(8, 4))
    with pytest.raises(BackendError, match="no stock kernel named 'flash' for cpu"):
        structured.attend(p.noisy, p.clean, p.visibility, scale=1.0, kernel="flash")


def test_a_document_in_two_places_is_refused() -> None:
    p = problem(Visibility.pair(8, 4, torch.tensor([[0, 0, 1, 1, 0, 0, 1, 1]] * 2)))
    with pytest.raises(ShapeError, match="two separate places"):
        structured.attend(p.noisy, p.clean, p.visibility, scale=1.0)


def test_streams_must_fit_the_visibility() -> None:
    p = problem(Visibility.pair(8, 4))
    with pytest.raises(ShapeError, match="clean stream is given"):
        structured.attend(p.noisy, p.clean, Visibility.noisy_only(8), scale=1.0)
