"""A tiny model in float64, held-out rows given as a tensor, and the truth about both by enumeration and quadrature."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from bd3_megatron.data.batch import CleanBatch
from bd3_megatron.diffusion.noise_level import Interval
from bd3_megatron.diffusion.token_nll import masked_token_nll
from bd3_megatron.evaluate.perplexity import Estimate, ScoreSettings, ScoreSums, estimate, score_table
from bd3_megatron.hf.configuration_bd3 import BD3Config
from bd3_megatron.hf.plain_bd3 import PlainBD3
from tests.unit.diffusion.laws import all_masks, mask_law, quadrature

VOCAB = 4
MASK_ID = 3
LENGTH = 8


def tiny_model(
    block_size: int = 4, *, objective: str = "block", length: int = LENGTH, vocab: int = VOCAB, layers: int = 1
) -> PlainBD3:
    """Weights large enough that tokens, masks and order matter."""
    model = PlainBD3(
        BD3Config(
            vocab_size=vocab,
            num_hidden_layers=layers,
            hidden_size=8,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=length,
            block_size=block_size,
            objective=objective,
            mask_token_id=vocab - 1,
        )
    ).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model.eval()


@dataclass(frozen=True)
class Rows:
    """Held-out rows."""

    tokens_NL: Tensor
    is_padding_NL: Tensor | None = None

    @property
    def num_rows(self) -> int:
        return len(self.tokens_NL)

    def batch_for(self, index_B: Tensor) -> CleanBatch:
        padding_NL = self.is_padding_NL
        return CleanBatch(
            tokens_BL=self.tokens_NL[index_B],
            index_B=index_B,
            is_padding_BL=None if padding_NL is None else padding_NL[index_B],
        )


def random_rows(count: int, *, seed: int = 0, length: int = LENGTH) -> Rows:
    """Uniform tokens."""
    generator = torch.Generator().manual_seed(seed)
    return Rows(torch.randint(0, MASK_ID, (count, length), generator=generator))


def every_row(length: int) -> Tensor:
    """int64 [3^length, length]: all sequences of real tokens."""
    return torch.tensor(list(itertools.product(range(MASK_ID), repeat=length)))


@torch.no_grad()
def all_nll(model: PlainBD3, tokens_NL: Tensor, block_size: int) -> Tensor:
    """NLL of every token under every mask pattern of its block: float64 [N, 2^S, L], patterns as in `all_masks`."""
    tables = []
    for mask_S in all_masks(block_size):
        noisy_NL = tokens_NL.masked_fill(mask_S.repeat(tokens_NL.shape[1] // block_size), MASK_ID)
        tables.append(masked_token_nll(model(noisy_NL, tokens_NL), tokens_NL, mask_id=MASK_ID))
    return torch.stack(tables, dim=1)


def true_bound(nll_NML: Tensor, block_size: int) -> Tensor:
    """The bound on each sequence's NLL, float64 [N]: quadrature over t in [1e-3, 1] of the sum over masks of
    P(mask | t) (1 / t) sum of NLL over masked tokens."""
    masks = all_masks(block_size)
    t, weight = quadrature(Interval(), num_nodes=40)
    factor_M = (weight[:, None] * mask_law(t, masks) / t[:, None]).sum(dim=0)
    is_masked_ML = masks.repeat(1, nll_NML.shape[2] // block_size)
    return (nll_NML * is_masked_ML * factor_M[:, None]).sum(dim=(1, 2))


def estimate_from_table(nll_NML: Tensor, rows: Rows, settings: ScoreSettings, block_size: int) -> Estimate:
    """The estimate whose forwards are looked up: the same numbers as the model's, thousands of times faster."""
    plan = settings.plan(objective="block", block_size=block_size, mask_id=MASK_ID)
    table = score_table(plan, num_rows=rows.num_rows, num_sequences=settings.num_sequences)
    row_id_R = table.row_id_N[table.sequence_R]
    clean = rows.batch_for(row_id_R)
    noisy = plan.noisy(clean, table.draw_R)
    assert noisy is not None
    digit_S = 2 ** torch.arange(block_size - 1, -1, -1)
    pattern_RK = (noisy.is_masked_BL.unflatten(1, (-1, block_size)) * digit_S).sum(dim=2)
    pattern_RL = pattern_RK.repeat_interleave(block_size, dim=1)
    nll_RL = nll_NML[row_id_R[:, None], pattern_RL, torch.arange(pattern_RL.shape[1])]
    sums = ScoreSums(table, torch.device("cpu"))
    sums.both_2R[0], sums.both_2R[1] = (nll_RL * noisy.weight_BL).sum(dim=1), plan.counted(clean)
    return estimate(plan, sums)
