"""A head problem and its plain answer: softmax over the ids that may be predicted, one row at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadProblem:
    """Inputs of `weighted_nll` over the whole table."""

    hidden_RD: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    target_R: Tensor
    row_weight_R: Tensor
    vocab_size: int
    never: int | None

    def answer(self) -> tuple[Tensor, list[Tensor]]:
        """(NLL [R], gradients of the weighted sum by hidden, weight and bias)."""
        nll_R, _, grads = self.sharpened(0.0)
        return nll_R, grads

    def sharpened(self, confidence: float) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(NLL [R], entropy [R] where the target is the likeliest id, gradients of the weighted sum with that term)."""
        inputs = [t.detach().requires_grad_() for t in (self.hidden_RD, self.weight_VD, self.bias_V) if t is not None]
        logits = inputs[0] @ inputs[1].t() + (inputs[2] if len(inputs) == 3 else 0.0)
        allowed = torch.arange(logits.shape[1]) < self.vocab_size
        if self.never is not None:
            allowed[self.never] = False
        nll_R = torch.nn.functional.cross_entropy(
            logits.masked_fill(~allowed, -torch.inf), self.target_R, reduction="none"
        )
        law = torch.distributions.Categorical(logits=logits[:, allowed])
        first_R = logits.masked_fill(~allowed, -torch.inf).argmax(1)
        entropy_R = law.entropy() * (first_R == self.target_R)
        total = ((nll_R + confidence * entropy_R) * self.row_weight_R).sum()
        return nll_R.detach(), entropy_R.detach(), list(torch.autograd.grad(total, inputs))


def head_problem(
    *,
    rows: int = 13,
    width: int = 6,
    vocab_size: int = 21,
    table: int = 24,
    bias: bool = True,
    never: int | None = 20,
    right_rows: int = 0,
) -> HeadProblem:
    """Random fp64 inputs; the table has padding rows beyond the vocabulary."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    problem = HeadProblem(
        hidden_RD=draw(rows, width),
        weight_VD=draw(table, width),
        bias_V=draw(table) if bias else None,
        target_R=torch.randint(0, 20, (rows,), generator=generator),
        row_weight_R=draw(rows).exp(),
        vocab_size=vocab_size,
        never=never,
    )
    # the first rows predict what the model finds likeliest
    logits = problem.hidden_RD @ problem.weight_VD.t() + (0.0 if problem.bias_V is None else problem.bias_V)
    problem.target_R[:right_rows] = logits[:right_rows, :20].argmax(1)
    return problem
