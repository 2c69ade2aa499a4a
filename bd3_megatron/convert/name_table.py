"""The one table between megatron's parameter names and the plain model's, used in both directions.

Decides: how a fused tensor splits; the plain model (named as Qwen3 names them) keeps q, k, v, gate and up apart. Every key
is mapped or the translation is refused; nothing is dropped.
Tensors are whole here (tensor-parallel pieces are joined before).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bd3_megatron.config.schema import ModelConfig
from bd3_megatron.errors import ConversionError
from bd3_megatron.model.partition import EMBEDDING, EXPERT_BIAS, HEAD_BIAS, HEAD_WEIGHT, is_expert, padded_vocab

_ONE_TO_ONE = {
    "input_layernorm.weight": "input_layernorm.weight",
    "input_layernorm.bias": "input_layernorm.bias",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "pre_mlp_layernorm.bias": "post_attention_layernorm.bias",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.linear_fc2.bias": "mlp.down_proj.bias",
    # Only the paper's style has it, whose first matrix has no gate.
    "mlp.linear_fc1.bias": "mlp.up_proj.bias",
}
_MLP = ("mlp.linear_fc2.weight", "mlp.linear_fc2.bias", "mlp.linear_fc1.bias")
_EXPERT_ONE_TO_ONE = {
    "mlp.router.weight": "mlp.gate.weight",
    EXPERT_BIAS: "mlp.gate.expert_bias",
    "mlp.shared_experts.linear_fc2.weight": "mlp.shared_experts.down_proj.weight",
}
_EXPERT_FC1, _EXPERT_FC2 = "mlp.experts.linear_fc1.weight", "mlp.experts.linear_fc2.weight"
_SHARED_FC1 = "mlp.shared_experts.linear_fc1.weight"
_QKV = "self_attention.linear_qkv.weight"
_FC1 = "mlp.linear_fc1.weight"
_OUTER = {
    EMBEDDING: "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "decoder.final_layernorm.bias": "model.norm.bias",
    HEAD_WEIGHT: "lm_head.weight",
    HEAD_BIAS: "lm_head.bias",
}
_VOCABULARY = (EMBEDDING, HEAD_WEIGHT, HEAD_BIAS)


@dataclass(frozen=True)
class NameTable:
    """Translation for one model shape.

    Args:
        model: shapes and style.
        vocab_size: V, rows that mean something; the parallel tables are padded beyond it.
    """

    model: ModelConfig
    vocab_size: int

    def parallel_names(self) -> Iterator[str]:
        """Every parameter of the parallel model, in order of depth."""
        model = self.model
        biased = model.style == "paper"
        yield EMBEDDING
        for layer in range(model.num_layers):
            sparse = model.has_experts(layer)
            for short in (*_ONE_TO_ONE, _QKV, _FC1):
                if (short.endswith("bias") and not biased) or ("_layernorm" in short and _is_absent(short, model)):
                    continue
                if not (sparse and short in (*_MLP, _FC1)):
                    yield f"decoder.layers.{layer}.{short}"
            if sparse:
                yield from (f"decoder.layers.{layer}.{short}" for short in _expert_names(model))
        yield "decoder.final_layernorm.weight"
        if biased:
            yield "decoder.final_layernorm.bias"
        if not model.tie_embeddings:
            yield HEAD_WEIGHT
        if biased:
            yield HEAD_BIAS

    def to_plain(self, name: str, whole: Tensor) -> dict[str, Tensor]:
        """The plain tensors that one whole parallel tensor holds.

        Raises:
            ConversionError: a name outside the table.
        """
        if name in _OUTER:
            # Padding rows of the vocabulary are cut on the way out and are zero on the way in.
            rows = whole[: self.vocab_size] if name in _VOCABULARY else whole
            return {_OUTER[name]: rows}
        layer, short = _split_name(name)
        prefix = f"model.layers.{layer}."
        if short == _QKV:
            return {prefix + k: v for k, v in self._split_qkv(whole).items()}
        if self._is_sparse(layer) and short in (_EXPERT_FC1, _EXPERT_FC2, _SHARED_FC1):
            wanted = self.plain_names(name)
            matrices = whole.chunk(2) if short == _SHARED_FC1 else _matrices(whole, len(wanted))
            return dict(zip(wanted, matrices, strict=True))
        if self._is_sparse(layer) and short in _EXPERT_ONE_TO_ONE:
            return {prefix + _EXPERT_ONE_TO_ONE[short]: whole}
        if short == _FC1 and self.model.style == "modern":
            # megatron stacks the SwiGLU matrices, gate first.
            gate, up = whole.chunk(2)
            return {f"{prefix}mlp.gate_proj.weight": gate, f"{prefix}mlp.up_proj.weight": up}
        if short == _FC1:
            return {f"{prefix}mlp.up_proj.weight": whole}
        if short not in _ONE_TO_ONE:
            raise _unknown(name)
        return {prefix + _ONE_TO_ONE[short]: whole}

    def plain_names(self, name: str) -> list[str]:
        """The plain names that make up the parallel parameter `name`.

        Raises:
            ConversionError: a name outside the table.
        """
        if name in _OUTER:
            return [_OUTER[name]]
        layer, short = _split_name(name)
        prefix = f"model.layers.{layer}."
        if short == _QKV:
            return [f"{prefix}self_attn.{x}_proj.weight" for x in "qkv"]
        if short == _FC1:
            parts = ("gate", "up") if self.model.style == "modern" else ("up",)
            return [f"{prefix}mlp.{part}_proj.weight" for part in parts]
        if self._is_sparse(layer) and short in (_EXPERT_FC1, _EXPERT_FC2, _SHARED_FC1):
            return [prefix + inner for inner in self._expert_parts(short)]
        if self._is_sparse(layer) and short in _EXPERT_ONE_TO_ONE:
            return [prefix + _EXPERT_ONE_TO_ONE[short]]
        if short not in _ONE_TO_ONE:
            raise _unknown(name)
        return [prefix + _ONE_TO_ONE[short]]

    def to_parallel(self, name: str, plain: Mapping[str, Tensor]) -> Tensor:
        """The whole parallel tensor `name` from plain tensors.

        Raises:
            ConversionError: a plain tensor is missing.
        """
        wanted = self.plain_names(name)
        missing = [key for key in wanted if key not in plain]
        if missing:
            raise ConversionError(f"tensor '{missing[0]}' is missing in the source; it is needed for '{name}'.")
        parts = [plain[key] for key in wanted]
        if name in _VOCABULARY:
            return self._pad(parts[0])
        if name.endswith(_QKV):
            return self._join_qkv(*parts)
        if is_expert(name):
            per_expert = len(parts) // self._num_experts
            return torch.stack(parts).unflatten(0, (self._num_experts, per_expert)).flatten(1, 2)
        # Gate, then up.
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _is_sparse(self, layer: str) -> bool:
        return layer.isdecimal() and self.model.has_experts(int(layer))

    @property
    def _num_experts(self) -> int:
        assert self.model.experts is not None
        return self.model.experts.number

    def _expert_parts(self, short: str) -> list[str]:
        """Plain names inside a layer: gate and up of each expert in turn, or its down matrix."""
        if short == _SHARED_FC1:
            return [f"mlp.shared_experts.{part}_proj.weight" for part in ("gate", "up")]
        parts = ("gate", "up") if short == _EXPERT_FC1 else ("down",)
        return [f"mlp.experts.{e}.{part}_proj.weight" for e in range(self._num_experts) for part in parts]

    def _pad(self, rows: Tensor) -> Tensor:
        padding = padded_vocab(self.vocab_size, self.model.vocab_multiple) - rows.shape[0]
        return torch.cat([rows, rows.new_zeros(padding, *rows.shape[1:])])

    def _split_qkv(self, whole: Tensor) -> dict[str, Tensor]:
        model = self.model
        share = model.num_heads // model.kv_heads
        # megatron interleaves q, k, v by key/value group: [G, N/G + 2, H] rows.
        grouped = whole.view(model.kv_heads, share + 2, model.head_width, -1)
        q, k, v = grouped.split([share, 1, 1], dim=1)
        names = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
        return {name: part.flatten(0, 2) for name, part in zip(names, (q, k, v), strict=True)}

    def _join_qkv(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        model = self.model
        groups, width = model.kv_heads, model.head_width
        share = model.num_heads // groups
        parts = (q.view(groups, share, width, -1), k.view(groups, 1, width, -1), v.view(groups, 1, width, -1))
        return torch.cat(parts, dim=1).flatten(0, 2)


def _unknown(name: str) -> ConversionError:
    return ConversionError(f"parameter '{name}' has no place in the plain model; add it to convert/name_table.py.")


def _split_name(name: str) -> tuple[str, str]:
    # decoder, layers, number, the rest.
    parts = name.split(".", 3)
    if len(parts) < 4 or parts[:2] != ["decoder", "layers"]:
        raise _unknown(name)
    return parts[2], parts[3]


def _is_absent(short: str, model: ModelConfig) -> bool:
    return ("q_layernorm" in short or "k_layernorm" in short) and not model.qk_norm


def _expert_names(model: ModelConfig) -> Iterator[str]:
    assert model.experts is not None
    yield "mlp.router.weight"
    if model.experts.bias:
        yield EXPERT_BIAS
    yield from (_EXPERT_FC1, _EXPERT_FC2)
    if model.experts.shared_width is not None:
        yield from (_SHARED_FC1, "mlp.shared_experts.linear_fc2.weight")


def _matrices(whole: Tensor, parts: int) -> list[Tensor]:
    """The plain matrices of a stack [E, ...], gate before up."""
    return list(whole.unflatten(1, (parts // whole.shape[0], -1)).flatten(0, 1))
