"""What the experts of a plain model do in a training job: counts of their choices, moves of their biases, terms of their routers.

Every rule is written out here anew, on the forwards of the exported model's own gates.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bd3_megatron.config.experts import ExpertsConfig
from bd3_megatron.config.schema import DiffusionConfig
from bd3_megatron.data.batch import CleanBatch
from bd3_megatron.hf.mlp_bd3 import ExpertMlp, Gate, choose_experts
from bd3_megatron.hf.plain_bd3 import PlainBD3
from bd3_megatron.train.batches import Noise


@dataclass
class ChoiceWatch:
    """Counts the choices of experts that a plain model makes, and moves its biases: by rules written out here anew."""

    model: PlainBD3
    smallest_gap: float = math.inf
    num_samples: int = 0
    length: int = 0
    """L of the step's samples."""
    loads: dict[int, list[int]] = field(default_factory=dict)
    """Of the step."""
    masked_loads: dict[int, list[list[int]]] = field(default_factory=dict)
    """Of the step, rows that carry loss, by tenths of noise levels."""
    _rows: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = field(default_factory=dict)
    """Layer -> of each view's forward (logits, choices, whether a row counts)."""
    _levels: list[list[int]] = field(default_factory=list)
    """Of each view: the tenth of every row's noise level, -1 where it carries no loss."""
    _counted: dict[bool, list[Tensor]] = field(default_factory=dict)
    """Whether it is the last layer -> rows that count in the forward of each view, which comes to the layer in this order."""
    _passes: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for layer, mlp in self._mixtures():
            mlp.gate.register_forward_hook(functools.partial(self._note, layer=layer, rule=mlp.shape))

    def _mixtures(self) -> list[tuple[int, ExpertMlp]]:
        return [(n, layer.mlp) for n, layer in enumerate(self.model.model.layers) if isinstance(layer.mlp, ExpertMlp)]

    def begin(self, noise: Noise, diffusion: DiffusionConfig, clean: CleanBatch) -> None:
        """Before the forward of a step: rows [noisy; clean] count that no grid skips."""
        self.num_samples, self.length = clean.tokens_BL.shape
        self._counted, self._passes, self.loads = {False: [], True: []}, {}, {}
        self.masked_loads, self._rows, self._levels = {}, {}, []
        for view in range(diffusion.views):
            noisy = noise.of_view(view).corrupt(clean, diffusion)
            is_text_BL = noisy.text_BL
            # views share their clean rows, which count once
            clean_BL = is_text_BL & (torch.arange(self.length) < self.length - noise.block_size) & (view == 0)
            nothing_BL = torch.zeros_like(is_text_BL)
            self._counted[False].append(torch.cat([is_text_BL, clean_BL], dim=1).flatten())
            self._counted[True].append(torch.cat([noisy.is_masked_BL, nothing_BL], dim=1).flatten())
            tenths_BL = (noisy.level_BL * 10).floor().clamp_max(9).long().where(noisy.is_masked_BL, -1)
            self._levels.append(torch.cat([tenths_BL, torch.full_like(tenths_BL, -1)], dim=1).flatten().tolist())

    def _note(self, gate: Gate, _: Any, logits_RE: Tensor, *, layer: int, rule: Any) -> None:
        choice = choose_experts(logits_RE.detach(), rule, gate.expert_bias)
        best_RK = choice.score_RE.topk(rule.num_experts_per_tok + 1, dim=-1).values
        gaps = [(best_RK[:, -2] - best_RK[:, -1]).min().item()]
        if rule.n_group > 1:
            score_RE = logits_RE.detach().sigmoid() + (0.0 if gate.expert_bias is None else gate.expert_bias)
            pairs_RG = score_RE.unflatten(1, (rule.n_group, -1)).topk(2, dim=-1).values.sum(-1)
            best_RG = pairs_RG.topk(rule.topk_group + 1, dim=-1).values
            gaps.append((best_RG[:, -2] - best_RG[:, -1]).min().item())
        self.smallest_gap = min(self.smallest_gap, *gaps)
        number = self._passes.get(layer, 0)
        counted_R = self._counted[layer == len(self.model.model.layers) - 1][number]
        self._passes[layer] = number + 1
        chosen = choice.expert_RK[counted_R].flatten().tolist()
        before = self.loads.get(layer, [0] * logits_RE.shape[1])
        self.loads[layer] = [count + chosen.count(expert) for expert, count in enumerate(before)]
        table = self.masked_loads.setdefault(layer, [[0] * logits_RE.shape[1] for _ in range(10)])
        for tenth, experts in zip(self._levels[number], choice.expert_RK.tolist(), strict=True):
            for expert in experts if tenth >= 0 else ():
                table[tenth][expert] += 1
        self._rows.setdefault(layer, []).append((logits_RE, choice.expert_RK, counted_R))

    def terms(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Of every layer, the means over samples of the balance term and of the z term."""
        found = {}
        for layer, passes in self._rows.items():
            sigmoid = dict(self._mixtures())[layer].shape.score_function == "sigmoid"
            balances, squares = [], []
            for sample in range(self.num_samples):
                rows = slice(sample * 2 * self.length, (sample + 1) * 2 * self.length)
                logits_TE = torch.cat([logits_RE[rows][counted_R[rows]] for logits_RE, _, counted_R in passes])
                chosen_n = torch.cat([expert_RK[rows][counted_R[rows]].flatten() for _, expert_RK, counted_R in passes])
                if not len(chosen_n):
                    continue
                score_TE = logits_TE.sigmoid() if sigmoid else logits_TE.softmax(-1)
                score_TE = score_TE / score_TE.sum(-1, keepdim=True)
                share_E = torch.stack([(chosen_n == e).double().mean() for e in range(logits_TE.shape[1])])
                balances.append(len(share_E) * (share_E * score_TE.double().mean(0)).sum())
                squares.append(logits_TE.exp().sum(-1).log().square().mean())
            found[layer] = (
                torch.stack(balances).sum() / self.num_samples,
                torch.stack(squares).sum() / self.num_samples,
            )
        return found

    def loss(self, experts: ExpertsConfig | None) -> Tensor | float:
        """What the router's terms add to the loss of a step."""
        if experts is None or not (experts.balance_loss or experts.z_loss):
            return 0.0
        terms = self.terms().values()
        return sum(experts.balance_loss * balance + experts.z_loss * square for balance, square in terms)

    def finish(self, rate: float) -> None:
        """After the update: biases of experts below the mean load rise, of those above it fall."""
        for layer, mlp in self._mixtures():
            if mlp.gate.expert_bias is not None:
                counts = torch.tensor(self.loads[layer], dtype=torch.float64)
                mlp.gate.expert_bias += rate * (counts.mean() - counts).sign().float()
