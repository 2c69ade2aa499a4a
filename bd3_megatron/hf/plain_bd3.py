"""The plain block-diffusion transformer: torch only, reference of equivalence tests, and the model inside the wrapper.

Decides the parameter names of every converter, the two layer styles and the rotary table. The plain forward attends
densely (a boolean matrix of 2L x 2L, `attention_bd3.py`); other callers hand their own `attend` to the same layers. Knows
no losses, noise, caches or tokenizers.
Source: BD3-LM (arXiv 2503.09573) section 3; rotate-half rotary positions, the same 0..L-1 for both halves of the pair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention_bd3 import attention_weights, block_causal_sees, blocks_of, grouped_attention, pair_sees
from .mlp_bd3 import ExpertMlp, ExpertShape, ModernMlp, PaperMlp

# (queries_BQNH, keys_BRGH, values_BRGH, layer) -> mixed_BQNH
LayerAttention = Callable[[Tensor, Tensor, Tensor, int], Tensor]

NEXT_TOKEN = "ar"
"""The objective of an autoregressive model; the other is "block"."""


class ModelShape(ExpertShape, Protocol):
    """What the plain model reads of a configuration; `BD3Config` is one."""

    vocab_size: int
    style: str
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    intermediate_size: int
    qk_norm: bool
    tie_word_embeddings: bool
    layer_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    block_size: int
    objective: str
    residual_dropout: float


@dataclass(frozen=True)
class Rotary:
    """Cosines and sines of one set of positions, each [B or 1, R, 1, r/2] for the r first channels of a head; float64 for a
    float64 model, else float32."""

    cosine: Tensor
    sine: Tensor

    def rotate(self, x_BRNH: Tensor) -> Tensor:
        """Rotate each head by its position (rotate-half pairing), in the dtype of the table, returned in x's dtype."""
        width = 2 * self.cosine.shape[-1]
        first, second = x_BRNH[..., :width].to(self.cosine.dtype).chunk(2, dim=-1)
        turned = (first * self.cosine - second * self.sine, second * self.cosine + first * self.sine)
        # channels beyond the turned ones carry no position
        return torch.cat([*(half.to(x_BRNH.dtype) for half in turned), x_BRNH[..., width:]], dim=-1)

    def take(self, rows_BR: Tensor) -> Rotary:
        """The table of some rows of each sequence."""
        batch = rows_BR.shape[0]
        index = rows_BR[:, :, None, None].expand(-1, -1, 1, self.cosine.shape[-1])
        tables = (table.expand(batch, -1, -1, -1).gather(1, index) for table in (self.cosine, self.sine))
        return Rotary(*tables)


def rotary_table(position_BR: Tensor, *, head_dim: int, theta: float, dtype: torch.dtype) -> Rotary:
    """Rotary table of positions, computed at every call: a stored fp32 table would cost a float64 model 2.5e-7.

    Args:
        position_BR: int64 [B or 1, R], >= 0.
        head_dim: even number of a head's channels that are turned.
        theta: base of the frequencies theta^(-2i/H).
        dtype: the model's dtype; float64 gives float64, every other float32.

    Returns:
        The table. Frequencies are rounded to the table's dtype (as training does); angles are taken in float64, so
        positions far beyond the trained length keep exact differences.
    """
    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    # Frequencies are rounded as training rounds them; angles in float64 keep differences exact at any position.
    even = torch.arange(0, head_dim, 2, dtype=table_dtype, device=position_BR.device)
    frequency = 1.0 / (theta ** (even / head_dim))
    angle_BRh = position_BR[..., None].to(torch.float64) * frequency.to(torch.float64)
    return Rotary(angle_BRh.cos().to(table_dtype)[:, :, None], angle_BRh.sin().to(table_dtype)[:, :, None])


def predicts_next(objective: str) -> bool:
    """Whether rows predict the token after them (autoregressive), or their own (block diffusion)."""
    return objective == NEXT_TOKEN


class SelfAttention(nn.Module):
    """Projections of one layer; who sees whom is the caller's `attend`."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        hidden, width = shape.hidden_size, shape.head_dim
        self.head_dim = width
        self.q_proj = nn.Linear(hidden, shape.num_attention_heads * width, bias=False)
        self.k_proj = nn.Linear(hidden, shape.num_key_value_heads * width, bias=False)
        self.v_proj = nn.Linear(hidden, shape.num_key_value_heads * width, bias=False)
        # no biases in either style: as in the official DiT and in Qwen3
        self.o_proj = nn.Linear(shape.num_attention_heads * width, hidden, bias=False)
        self.q_norm = nn.RMSNorm(width, eps=shape.layer_norm_eps) if shape.qk_norm else None
        self.k_norm = nn.RMSNorm(width, eps=shape.layer_norm_eps) if shape.qk_norm else None

    def queries(self, u_BQD: Tensor, rotary: Rotary) -> Tensor:
        """Rotated queries [B, Q, N, H]."""
        q_BQNH = self.q_proj(u_BQD).unflatten(-1, (-1, self.head_dim))
        return rotary.rotate(q_BQNH if self.q_norm is None else self.q_norm(q_BQNH))

    def keys_values(self, u_BRD: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Rotated keys and values, each [B, R, G, H]."""
        k_BRGH = self.k_proj(u_BRD).unflatten(-1, (-1, self.head_dim))
        v_BRGH = self.v_proj(u_BRD).unflatten(-1, (-1, self.head_dim))
        return rotary.rotate(k_BRGH if self.k_norm is None else self.k_norm(k_BRGH)), v_BRGH

    def output(self, mixed_BQNH: Tensor) -> Tensor:
        """Back to the hidden size [B, Q, D]."""
        return self.o_proj(mixed_BQNH.flatten(-2))


def new_mlp(shape: ModelShape, index: int) -> nn.Module:
    """The MLP of layer `index`, of the style, or its mixture of experts."""
    if shape.num_experts and index >= shape.first_k_dense_replace:
        return ExpertMlp(shape)
    kind = PaperMlp if shape.style == "paper" else ModernMlp
    return kind(shape.hidden_size, shape.intermediate_size)


def new_norm(shape: ModelShape) -> nn.Module:
    """The style's norm over the hidden size; statistics are fp32 or better inside torch's kernels."""
    if shape.style == "paper":
        return nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)
    return nn.RMSNorm(shape.hidden_size, eps=shape.layer_norm_eps)


class Layer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, shape: ModelShape, index: int) -> None:
        super().__init__()
        self.index = index
        self.input_layernorm = new_norm(shape)
        self.self_attn = SelfAttention(shape)
        self.post_attention_layernorm = new_norm(shape)
        self.mlp = new_mlp(shape, index)
        self.dropout = nn.Dropout(shape.residual_dropout)

    def forward(self, x_BRD: Tensor, rotary: Rotary, attend: LayerAttention, keep_BQ: Tensor | None = None) -> Tensor:
        """One layer. `keep_BQ` [B, Q] names the rows whose output is wanted; the others give keys and values only."""
        u_BRD = self.input_layernorm(x_BRD)
        keys_BRGH, values_BRGH = self.self_attn.keys_values(u_BRD, rotary)
        if keep_BQ is not None:
            # the other rows are done: only their keys are looked at
            x_BRD, u_BRD, rotary = take_rows(x_BRD, keep_BQ), take_rows(u_BRD, keep_BQ), rotary.take(keep_BQ)
        queries_BQNH = self.self_attn.queries(u_BRD, rotary)
        mixed_BQNH = attend(queries_BQNH, keys_BRGH, values_BRGH, self.index)
        x_BQD = x_BRD + self.dropout(self.self_attn.output(mixed_BQNH))
        return x_BQD + self.dropout(self.mlp(self.post_attention_layernorm(x_BQD)))


def take_rows(x_BRD: Tensor, rows_BQ: Tensor) -> Tensor:
    """[B, R, D] -> [B, Q, D]: some rows of each sequence."""
    return x_BRD.gather(1, rows_BQ[:, :, None].expand(-1, -1, x_BRD.shape[-1]))


CHECKPOINT = partial(checkpoint, use_reentrant=False)
"""Runs a layer again in the backward."""


@dataclass
class Trace:
    """What a forward keeps for its caller besides its result."""

    hidden_states: list[Tensor] | None = None
    """The embeddings, the result of every layer but the last, and the normed result: each [B, Q, D]; None: not kept."""
    attentions: dict[int, Tensor] | None = None
    """By layer, [B, N, Q, K]; None: not kept. Kept weights are computed in the open, which costs their memory."""


class LayerStack(Protocol):
    """Embedding, layers and final norm of a model, whatever holds them: what the decoding engine runs."""

    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module
    training: bool
    # transformers sets both, under these names, on every module that has the first
    gradient_checkpointing: bool
    _gradient_checkpointing_func: Callable[..., Tensor]

    @property
    def shape(self) -> ModelShape:
        """The model's shape."""


def run_layers(
    stack: LayerStack,
    ids_BR: Tensor,
    position_BR: Tensor,
    attend: LayerAttention,
    *,
    keep_BQ: Tensor | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """Normed hidden states [B, Q, D] of the rows in `keep_BQ` [B, Q] (None = all R rows) under the caller's `attend`.

    Args:
        stack: the layers.
        ids_BR: int64 token ids [B, R].
        position_BR: int64 rotary positions [B or 1, R].
        attend: decides who sees whom; called once a layer.
        keep_BQ: int64 rows of the last layer that are wanted.
        trace: filled, where given.
    """
    shape = stack.shape
    x_BRD = stack.embed_tokens(ids_BR)
    rotary = rotary_table(position_BR, head_dim=shape.rotary_dim, theta=shape.rope_theta, dtype=x_BRD.dtype)
    for index, layer in enumerate(stack.layers):
        if trace is not None and trace.hidden_states is not None:
            trace.hidden_states.append(x_BRD)
        # Every row must give keys to the layers before the last.
        kept = keep_BQ if index == len(stack.layers) - 1 else None
        if stack.gradient_checkpointing and stack.training:
            # only the layer's input is kept; dropout draws the same numbers when the layer runs again
            x_BRD = stack._gradient_checkpointing_func(layer, x_BRD, rotary, attend, kept)
        else:
            x_BRD = layer(x_BRD, rotary, attend, kept)
    x_BRD = stack.norm(x_BRD)
    if trace is not None and trace.hidden_states is not None:
        trace.hidden_states.append(x_BRD)
    return x_BRD


def pair_hidden(
    stack: LayerStack,
    input_ids_BL: Tensor,
    context_ids_BL: Tensor | None = None,
    document_id_BL: Tensor | None = None,
    *,
    position_BL: Tensor | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """Normed hidden states [B, L, D] of `input_ids_BL`.

    Args:
        stack: the layers.
        input_ids_BL: int64 [B, L]; noisy tokens when `context_ids_BL` is given, else one block-causal sequence.
        context_ids_BL: int64 [B, L] clean tokens.
        document_id_BL: int [B, L]; positions of different documents never see each other.
        position_BL: int64 [B, L], positions in the text, which also decide the blocks; None: 0..L-1.
        trace: filled, where given; with the rows of `input_ids_BL` only.

    Raises:
        ValueError: a context of another shape, or a context for the autoregressive objective.
    """
    shape, length = stack.shape, input_ids_BL.shape[1]
    # A block of one token makes the block-causal rule the causal one.
    span = 1 if predicts_next(shape.objective) else shape.block_size
    check_context(input_ids_BL, context_ids_BL, shape.objective)
    if position_BL is None:
        position_BL = torch.arange(length, device=input_ids_BL.device)[None]
    # One block fills the sequence (MDLM): no noisy row sees a clean one, so the clean half is dead work.
    # (the comparison is with the columns, so padding never turns a pair into one block)
    if span >= length:
        context_ids_BL = None
    halves = 1 if context_ids_BL is None else 2
    ids_BR = input_ids_BL if context_ids_BL is None else torch.cat([input_ids_BL, context_ids_BL], dim=1)
    block_BL = blocks_of(position_BL, span)
    sees_BRR = block_causal_sees(block_BL) if halves == 1 else pair_sees(block_BL)
    if document_id_BL is not None:
        document_BR = document_id_BL.repeat(1, halves)
        # A noisy row and the clean row of one position are of one document.
        sees_BRR = sees_BRR & (document_BR[:, :, None] == document_BR[:, None, :])

    def attend(queries_BQNH: Tensor, keys_BRGH: Tensor, values_BRGH: Tensor, layer: int) -> Tensor:
        keys_BGRH, values_BGRH = keys_BRGH.transpose(1, 2), values_BRGH.transpose(1, 2)
        if trace is None or trace.attentions is None:
            return grouped_attention(queries_BQNH, keys_BGRH, values_BGRH, sees_BRR)
        # torch's kernel does not hand its weights out
        weights_BNQR = attention_weights(queries_BQNH, keys_BGRH, sees_BRR)
        trace.attentions[layer] = weights_BNQR[:, :, :length] if halves == 2 else weights_BNQR
        values_BNRH = values_BGRH.repeat_interleave(queries_BQNH.shape[2] // values_BGRH.shape[1], dim=1)
        return (weights_BNQR @ values_BNRH).transpose(1, 2)

    hidden_BRD = run_layers(stack, ids_BR, position_BL.repeat(1, halves), attend, trace=trace)
    if trace is not None and trace.hidden_states is not None and halves == 2:
        trace.hidden_states = [x_BRD[:, :length] for x_BRD in trace.hidden_states]
    return hidden_BRD[:, :length]


class Stack(nn.Module):
    """Embedding, layers, final norm: everything under the prefix `model.`."""

    gradient_checkpointing: bool = False
    _gradient_checkpointing_func: Callable[..., Tensor] = CHECKPOINT
    shape: ModelShape

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape, index) for index in range(shape.num_hidden_layers))
        self.norm = new_norm(shape)

    def forward(
        self, input_ids_BL: Tensor, context_ids_BL: Tensor | None = None, document_id_BL: Tensor | None = None
    ) -> Tensor:
        """Normed hidden states [B, L, D]; see `pair_hidden`."""
        return pair_hidden(self, input_ids_BL, context_ids_BL, document_id_BL)


def check_context(input_ids_BL: Tensor, context_ids_BL: Tensor | None, objective: str) -> None:
    """Refuse a clean half that cannot belong to the noisy one."""
    if context_ids_BL is None:
        return
    if predicts_next(objective):
        raise ValueError("context_ids were given to an autoregressive model, which has no noisy half; leave them out.")
    if context_ids_BL.shape != input_ids_BL.shape:
        raise ValueError(
            f"context_ids have shape {list(context_ids_BL.shape)} and input_ids {list(input_ids_BL.shape)}; "
            "the clean half must have the shape of the noisy one."
        )


def new_head(shape: ModelShape) -> nn.Linear:
    """The output table [V, D]; with a bias in the paper's style."""
    return nn.Linear(shape.hidden_size, shape.vocab_size, bias=shape.style == "paper")


class PlainBD3(nn.Module):
    """The model without transformers: `forward(noisy, clean)` gives the raw logits of the noisy half."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.model = Stack(shape)
        self.lm_head = new_head(shape)
        if shape.tie_word_embeddings:
            # One tensor under two names, as transformers ties them.
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, input_ids_BL: Tensor, context_ids_BL: Tensor | None = None, document_id_BL: Tensor | None = None
    ) -> Tensor:
        """Raw logits [B, L, V] in the model's dtype; arguments as in `pair_hidden`."""
        return self.lm_head(self.model(input_ids_BL, context_ids_BL, document_id_BL))


def plain_model(shape: ModelShape, state: dict[str, Tensor]) -> PlainBD3:
    """A plain model holding `state` (names without prefix; a tied model has no `lm_head.weight`), in its dtype.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape.
    """
    # folders store a tied table once
    if shape.tie_word_embeddings and "lm_head.weight" not in state and "model.embed_tokens.weight" in state:
        state = {**state, "lm_head.weight": state["model.embed_tokens.weight"]}
    # without memory: a wrong size in a configuration must not allocate it
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in PlainBD3(shape).state_dict().items()}
    for name in sorted(expected.keys() | state.keys()):
        stored = list(state[name].shape) if name in state else "missing"
        wanted = list(expected[name]) if name in expected else "unknown"
        if stored != wanted:
            raise ValueError(f"{name:.80} is {stored} in the file and {wanted} by the configuration")
    # In the dtype of the weights: loading would round them to the model's own.
    model = PlainBD3(shape).to(next(iter(state.values())).dtype)
    model.load_state_dict(state)
    return model.eval()
