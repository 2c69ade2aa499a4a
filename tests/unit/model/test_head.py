"""The head equals plain cross entropy, loss and gradients, whatever the chunks; tensor-parallel shards are in tests/ranks."""

from __future__ import annotations

import pytest
import torch

from bd3_megatron.model import head
from bd3_megatron.model.head import VocabShard, weighted_nll
from tests import tolerances
from tests.unit.model.heads import HeadProblem, head_problem


def solved(
    problem: HeadProblem, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    tensors = (problem.hidden_RD, problem.weight_VD, problem.bias_V)
    inputs = [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]
    shard = VocabShard(0, problem.vocab_size, problem.never, None)
    total, nll_R, _ = weighted_nll(*inputs, problem.target_R, problem.row_weight_R.to(dtype), shard=shard)
    (3.0 * total).backward()
    return total.detach(), nll_R, [t.grad.double() / 3.0 for t in inputs if t is not None]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("vocab_size", "never"), [(21, 20), (24, 3), (24, None), (21, None)])
@pytest.mark.parametrize("chunk_rows", [1, 5, 100])
def test_loss_and_gradients_are_those_of_cross_entropy(
    bias: bool, vocab_size: int, never: int | None, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "head_chunk_bytes", lambda *_, **__: 4 * 24 * chunk_rows)
    problem = head_problem(bias=bias, vocab_size=vocab_size, never=never)
    if never == 3:
        problem.target_R[problem.target_R == 3] = 4
    expected_nll_R, expected_grads = problem.answer()
    total, nll_R, grads = solved(problem)
    assert torch.allclose(nll_R, expected_nll_R, rtol=0, atol=tolerances.EXACT_FP64)
    assert total.item() == pytest.approx(
        (expected_nll_R * problem.row_weight_R).sum().item(), abs=tolerances.EXACT_FP64 * 100
    )
    for found, expected in zip(grads, expected_grads, strict=True):
        assert torch.allclose(found, expected, rtol=0, atol=tolerances.EXACT_FP64 * 10)


@pytest.mark.parametrize("chunk_rows", [5, 100])
def test_the_confidence_term_is_the_entropy_of_right_rows(chunk_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "head_chunk_bytes", lambda *_, **__: 4 * 24 * chunk_rows)
    problem = head_problem(right_rows=6)
    inputs = [t.detach().requires_grad_() for t in (problem.hidden_RD, problem.weight_VD, problem.bias_V)]
    shard = VocabShard(0, problem.vocab_size, problem.never, None)
    total, nll_R, entropy_R = weighted_nll(*inputs, problem.target_R, problem.row_weight_R, shard=shard, confidence=2.0)
    expected_R, expected_entropy_R, grads = problem.sharpened(2.0)
    assert (expected_entropy_R > 0).sum() >= 6 and (expected_entropy_R == 0).any()
    assert torch.allclose(nll_R, expected_R, rtol=0, atol=tolerances.EXACT_FP64)
    assert torch.allclose(entropy_R, expected_entropy_R, rtol=0, atol=tolerances.EXACT_FP64)
    wanted = ((expected_R + 2.0 * expected_entropy_R) * problem.row_weight_R).sum().item()
    assert total.item() == pytest.approx(wanted, abs=tolerances.EXACT_FP64 * 100)
    total.backward()
    for tensor, expected in zip(inputs, grads, strict=True):
        assert torch.allclose(tensor.grad, expected, rtol=0, atol=tolerances.EXACT_FP64 * 10)


def test_what_may_not_be_predicted_gets_no_gradient() -> None:
    _, _, grads = solved(head_problem(vocab_size=21, never=20))
    for grad in grads[1:]:
        assert not grad[20:].any() and grad[:20].any(dim=-1).all()


def test_bf16_inputs_give_fp32_losses_and_rounded_gradients() -> None:
    problem = head_problem(rows=512, width=64, vocab_size=96, table=96, never=95)
    rounded = HeadProblem(
        *(t.bfloat16().double() for t in (problem.hidden_RD * 0.3, problem.weight_VD)),
        None,
        problem.target_R,
        problem.row_weight_R.bfloat16().double(),
        96,
        95,
    )
    expected_nll_R, expected_grads = rounded.answer()
    _, nll_R, grads = solved(rounded, torch.bfloat16)
    assert nll_R.dtype == torch.float32
    # bf16 logits would be off by 0.024 nats in the mean here
    assert (nll_R - expected_nll_R).abs().max() < tolerances.HEAD_BF16_NLL
    for grad, expected in zip(grads, expected_grads, strict=True):
        worst = (grad - expected).abs().max() / expected.abs().max()
        assert worst < tolerances.HEAD_BF16_GRADIENT
        # rounding has no direction: over all entries it averages out
        assert (grad - expected).mean().abs() / expected.abs().mean() < tolerances.HEAD_BF16_GRADIENT / 8


def test_the_table_gradient_of_bf16_inputs_is_summed_in_fp32() -> None:
    problem = head_problem(rows=512, width=64, table=96, bias=False)
    hidden, table = problem.hidden_RD.bfloat16(), problem.weight_VD.bfloat16()
    d_RV = torch.rand(512, 96, generator=torch.Generator().manual_seed(2)).bfloat16().float()
    grads = head._Gradients(hidden, table, None, torch.float32)
    for start in range(0, 512, 16):
        part = slice(start, start + 16)
        grads.add(part, d_RV[part].clone(), hidden[part].float(), table.float())
    exact = d_RV.double().t() @ hidden.double()
    assert (grads.weight - exact).abs().max() / exact.abs().max() < tolerances.HEAD_BF16_SUM


def test_evaluation_computes_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*_: object) -> None:
        raise AssertionError("gradients were prepared although none is asked for")

    monkeypatch.setattr(head, "_Gradients", unexpected)
    problem = head_problem()
    weight = problem.weight_VD.requires_grad_()
    shard = VocabShard(0, 21, 20, None)
    with torch.no_grad():
        total, _, _ = weighted_nll(
            problem.hidden_RD, weight, problem.bias_V, problem.target_R, problem.row_weight_R, shard=shard
        )
    assert not total.requires_grad


def test_no_rows_cost_nothing() -> None:
    problem = head_problem(rows=0)
    total, nll_R, grads = solved(problem)
    assert total == 0 and nll_R.shape == (0,) and not any(grad.any() for grad in grads)


def test_far_logits_do_not_overflow() -> None:
    problem = head_problem()
    problem.hidden_RD.mul_(1e4)
    _, nll_R, grads = solved(problem)
    assert nll_R.isfinite().all() and all(grad.isfinite().all() for grad in grads)
    assert torch.allclose(nll_R, problem.answer()[0], rtol=1e-12)
