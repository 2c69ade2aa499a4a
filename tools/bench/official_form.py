"""A step-by-step decoder that works as the official BD3-LM sampler does, for comparison only.

Written from the description of that sampler, on our plain model's weights, with its costs kept: the cache holds
unrotated queries, keys and values; every forward clones it, rotates all rows anew and lets all of them be queries, of
which the block's are kept; the output table runs on the whole block, also when a finished block is committed by a forward
of its own; probabilities and Gumbel noise are float64 over the whole block and vocabulary, and one position is kept.
Source: kuleshov-group/bd3lms diffusion.py (_semi_ar_sampler, _ddpm_caching_update), models/dit.py (DDiTBlock).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bd3_megatron.hf.attention_bd3 import block_causal_sees, blocks_of, grouped_attention
from bd3_megatron.hf.plain_bd3 import Layer, PlainBD3, Rotary, rotary_table


class OfficialForm:
    """One sequence decoded the official way.

    Args:
        model: plain model in the paper's style, full heads.
        mask_id: the mask token.
        generator: source of this decoder's random numbers.
    """

    def __init__(self, model: PlainBD3, mask_id: int, generator: torch.Generator) -> None:
        self._model, self._mask_id, self._generator = model, mask_id, generator
        self._shape = model.model.shape
        self._layers = [layer for layer in model.model.layers if isinstance(layer, Layer)]
        self._cache: list[Tensor | None] = [None] * self._shape.num_hidden_layers

    @torch.inference_mode()
    def prefill(self, ids_1R: Tensor) -> None:
        """Keep a prompt's queries, keys and values, in one pass (not timed: the official one goes block by block)."""
        shape, length = self._shape, ids_1R.shape[1]
        sees_1RR = block_causal_sees(blocks_of(torch.arange(length, device=ids_1R.device)[None], shape.block_size))
        x_1RD = self._model.model.embed_tokens(ids_1R)
        position_1R = torch.arange(length)[None]
        rotary = rotary_table(position_1R, head_dim=shape.rotary_dim, theta=shape.rope_theta, dtype=x_1RD.dtype)

        def attend(queries: Tensor, keys: Tensor, values: Tensor, layer: int) -> Tensor:
            return grouped_attention(queries, keys.transpose(1, 2), values.transpose(1, 2), sees_1RR)

        for layer in self._layers:
            self._cache[layer.index] = self._projected(layer, x_1RD)
            x_1RD = layer(x_1RD, rotary, attend)

    @staticmethod
    def _projected(layer: Layer, x_1RD: Tensor) -> Tensor:
        """Unrotated queries, keys and values of some rows, side by side."""
        attention, u_1RD = layer.self_attn, layer.input_layernorm(x_1RD)
        return torch.cat([attention.q_proj(u_1RD), attention.k_proj(u_1RD), attention.v_proj(u_1RD)], dim=-1)

    @torch.inference_mode()
    def logits(self, ids_1S: Tensor) -> Tensor:
        """Logits [1, S, V] of a block behind the committed ones."""
        return self._forward(ids_1S, store=False)

    @torch.inference_mode()
    def next_block(self) -> Tensor:
        """Decode one block by first-hitting and commit it: int64 [1, S]."""
        ids_1S = torch.full((1, self._shape.block_size), self._mask_id)
        while (ids_1S == self._mask_id).any():
            logits_1SV = self.logits(ids_1S)
            logits_1SV[..., self._mask_id] = -torch.inf
            probability_1SV = logits_1SV.double().softmax(dim=-1)
            uniform_1SV = torch.rand(probability_1SV.shape, dtype=torch.float64, generator=self._generator)
            # Gumbel-max in its exponential form, float64 over block and vocabulary as there.
            candidate_1S = (probability_1SV / (1e-10 - (uniform_1SV + 1e-10).log())).argmax(dim=-1)
            masked = (ids_1S[0] == self._mask_id).nonzero()[:, 0]
            # First hitting: which position is unmasked next is uniform over the masked ones.
            chosen = masked[torch.randint(len(masked), (1,), generator=self._generator)]
            ids_1S[0, chosen] = candidate_1S[0, chosen]
        # A finished block is committed by a forward of its own.
        self._forward(ids_1S, store=True)
        return ids_1S

    def _forward(self, ids_1R: Tensor, *, store: bool) -> Tensor:
        x_1RD = self._model.model.embed_tokens(ids_1R)
        rows = ids_1R.shape[1]
        rotary: Rotary | None = None
        for layer in self._layers:
            attention, heads = layer.self_attn, (1, -1, self._shape.num_attention_heads, self._shape.head_dim)
            fresh_1RE = self._projected(layer, x_1RD)
            kept = self._cache[layer.index]
            # The cache is cloned by every forward, and holds unrotated rows.
            all_1TE = fresh_1RE if kept is None else torch.cat([kept.clone(), fresh_1RE], dim=1)
            if store:
                self._cache[layer.index] = all_1TE
            # Made once a forward for all rows, those of the cache too.
            if rotary is None:
                position_1T = torch.arange(all_1TE.shape[1])[None]
                rotary = rotary_table(
                    position_1T, head_dim=self._shape.head_dim, theta=self._shape.rope_theta, dtype=x_1RD.dtype
                )
            # All rows are queries, of which only the block's are kept below: its cost is kept on purpose.
            queries, keys, values = (part.reshape(heads) for part in all_1TE.chunk(3, dim=-1))
            mixed = F.scaled_dot_product_attention(
                rotary.rotate(queries).transpose(1, 2), rotary.rotate(keys).transpose(1, 2), values.transpose(1, 2)
            )
            x_1RD = x_1RD + attention.output(mixed.transpose(1, 2)[:, -rows:])
            x_1RD = x_1RD + layer.mlp(layer.post_attention_layernorm(x_1RD))
        logits_1RV: Tensor = self._model.lm_head(self._model.model.norm(x_1RD))
        return logits_1RV
