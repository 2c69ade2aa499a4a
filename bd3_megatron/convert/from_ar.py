"""Autoregressive folders as Hugging Face users have them, read under plain names: Qwen3 (also MoE), Qwen2.5, Llama, SDAR, LLaDA2.

Decides: which configurations the modern style expresses exactly. Names are the plain model's own (Qwen3's), so weights
pass through; only the vocabulary changes: rows are cut or added to reach V, and the mask's row, which no autoregressive
model has trained, is made from the others (mean), drawn like them (noise) or kept. An autoregressive model's logits
predict the next token; that is recorded as the origin's alignment, because block diffusion trains without the shift.
Refuses: attention or MLP biases that are not zero, scaled rotary positions, sliding windows, other activations.
Source: transformers' configuration_qwen3.py, configuration_qwen2.py, configuration_llama.py (4.5x and 5.x spellings).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bd3_megatron.convert.expert_stacks import SplitExperts
from bd3_megatron.convert.plain_source import FolderSource
from bd3_megatron.errors import ConversionError
from bd3_megatron.hf.configuration_bd3 import BD3Config
from bd3_megatron.rng import Purpose, generator_seed
from bd3_megatron.sampling.folder import read_export_json

MaskInit = Literal["mean", "noise", "keep"]
# Qwen2.5 folders say qwen2.
LLADA2_TYPES = ("llada2_moe", "llada2_moe_veomni")
MIXTURE_TYPES = ("qwen3_moe", "sdar_moe", *LLADA2_TYPES)
MODEL_TYPES = ("qwen3", "qwen2", "llama", "sdar", *MIXTURE_TYPES)
BLOCK_DIFFUSION_TYPES = ("sdar", "sdar_moe", *LLADA2_TYPES)
EMBED_TOKENS = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class ArFolder:
    """What a foreign folder says about its model, in our words."""

    folder: Path
    model_type: str
    shape: dict[str, Any]
    """Fields of BD3Config that describe the layers."""
    vocab_size: int
    """Rows of its tables."""
    max_length: int
    ids: dict[str, int | None]
    block_size: int | None
    mask_id: int | None

    @property
    def logit_alignment(self) -> str:
        """Whether logits of a position predict it (none) or its successor (shifted)."""
        return "none" if self.model_type in BLOCK_DIFFUSION_TYPES else "shifted"


def read_ar_folder(folder: Path) -> ArFolder:
    """Read config.json and refuse what cannot be carried over.

    Raises:
        CheckpointError: no readable config.json.
        ConversionError: a model that the modern style does not express exactly.
    """
    tree = read_export_json(folder / "config.json")
    model_type = str(tree.get("model_type"))
    if model_type not in MODEL_TYPES:
        raise ConversionError(f"{folder} holds model_type={model_type!r}; this reads {', '.join(MODEL_TYPES)}.")
    # Before anything is read of the weights: what is refused here would change logits silently.
    _refuse_what_we_lack(tree, folder)
    heads, hidden = int(tree["num_attention_heads"]), int(tree["hidden_size"])
    eos = tree.get("eos_token_id")
    return ArFolder(
        folder=folder,
        model_type=model_type,
        shape={
            "style": "modern",
            "num_hidden_layers": int(tree["num_hidden_layers"]),
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": int(tree.get("num_key_value_heads") or heads),
            # Llama's older configurations leave it out.
            "head_dim": int(tree.get("head_dim") or hidden // heads),
            "intermediate_size": int(tree["intermediate_size"]),
            # Not a field of these configurations: the class has the norms or has not.
            "qk_norm": model_type in ("qwen3", "sdar", *MIXTURE_TYPES),
            "tie_word_embeddings": bool(tree.get("tie_word_embeddings", False)),
            # The default of all these classes.
            "layer_norm_eps": float(tree.get("rms_norm_eps", 1e-6)),
            "rope_theta": _rope_theta(tree, folder),
            **_mixture(tree, folder, model_type),
        },
        vocab_size=int(tree["vocab_size"]),
        max_length=int(tree.get("max_position_embeddings", 2048)),
        ids={
            "bos_token_id": tree.get("bos_token_id"),
            # Llama 3 lists several; the first ends a text.
            "eos_token_id": eos[0] if isinstance(eos, list) else eos,
            "pad_token_id": tree.get("pad_token_id"),
        },
        block_size=tree.get("block_size"),
        mask_id=tree.get("mask_token_id"),
    )


def _refuse_what_we_lack(tree: dict[str, Any], folder: Path) -> None:
    plain = {
        "hidden_act": ("silu", "an activation other than SwiGLU's silu"),
        "mlp_bias": (False, "biased MLP matrices"),
        "use_sliding_window": (False, "sliding-window attention"),
    }
    for field, (wanted, what) in plain.items():
        if tree.get(field, wanted) not in (wanted, None):
            raise ConversionError(
                f"{folder} has {field}={tree[field]!r}: {what} cannot be expressed; use another model."
            )
    # Newer configurations name the attention of each layer.
    windows = [name for name in tree.get("layer_types") or [] if name != "full_attention"]
    if windows:
        raise ConversionError(
            f"{folder} has {windows[0]} layers, which cannot be expressed; use a model with full attention."
        )
    is_mixture = str(tree.get("model_type")) in MIXTURE_TYPES
    if not is_mixture and (tree.get("num_experts") or tree.get("num_local_experts")):
        raise ConversionError(f"{folder} is a mixture of experts, which cannot be expressed; use a dense model.")


def _mixture(tree: dict[str, Any], folder: Path, model_type: str) -> dict[str, Any]:
    """BD3Config's fields on experts of a folder; of a dense model none."""
    if model_type in LLADA2_TYPES:
        return _llada2_mixture(tree, folder)
    return _qwen3_mixture(tree, folder) if model_type in MIXTURE_TYPES else {}


def _llada2_mixture(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    unknown = {"use_bias": False, "use_qkv_bias": False, "use_qk_norm": True, "score_function": "sigmoid"}
    for field, wanted in unknown.items():
        if tree.get(field, wanted) != wanted:
            raise ConversionError(
                f"{folder} has {field}={tree[field]!r}, LLaDA2's models have {wanted}; use one of those."
            )
    width = int(tree["moe_intermediate_size"])
    return {
        "num_experts": int(tree["num_experts"]),
        "num_experts_per_tok": int(tree["num_experts_per_tok"]),
        "moe_intermediate_size": width,
        # they are computed as one MLP of their widths together
        "shared_expert_intermediate_size": width * int(tree.get("num_shared_experts") or 0),
        "first_k_dense_replace": int(tree.get("first_k_dense_replace", 0)),
        "score_function": "sigmoid",
        "norm_topk_prob": bool(tree.get("norm_topk_prob", True)),
        "n_group": int(tree.get("n_group") or 1),
        "topk_group": int(tree.get("topk_group") or 1),
        "routed_scaling_factor": float(tree.get("routed_scaling_factor", 1.0)),
        "router_bias": bool(tree.get("moe_router_enable_expert_bias", True)),
        "partial_rotary_factor": float(tree.get("partial_rotary_factor", 1.0)),
    }


def _qwen3_mixture(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    dense = tree.get("mlp_only_layers") or []
    # layers without experts must come first: the training model deals layers out by that rule
    if tree.get("decoder_sparse_step", 1) != 1 or list(dense) != list(range(len(dense))):
        raise ConversionError(
            f"{folder} has decoder_sparse_step={tree.get('decoder_sparse_step', 1)}, mlp_only_layers={dense!s:.100}: only "
            "leading layers can be dense here; use another model."
        )
    return {
        # transformers 5 names it as other models do
        "num_experts": int(tree.get("num_experts") or tree["num_local_experts"]),
        "num_experts_per_tok": int(tree["num_experts_per_tok"]),
        "moe_intermediate_size": int(tree["moe_intermediate_size"]),
        "first_k_dense_replace": len(dense),
        "norm_topk_prob": bool(tree.get("norm_topk_prob", False)),
    }


def _rope_theta(tree: dict[str, Any], folder: Path) -> float:
    # transformers 5.x says rope_parameters, 4.5x rope_scaling beside rope_theta.
    scaling = tree.get("rope_parameters") or tree.get("rope_scaling") or {}
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type != "default":
        raise ConversionError(
            f"{folder} has rotary positions of type {rope_type!r}; only unscaled ones can be expressed, use a model without."
        )
    return float(scaling.get("rope_theta", tree.get("rope_theta", 10000.0)))


def describe_as_bd3(
    source: ArFolder, *, vocab_size: int, mask_id: int | None, block_size: int, length: int, objective: str = "block"
) -> BD3Config:
    """BD3Config of the imported model.

    Args:
        source: what was read.
        vocab_size: V of the result, mask id included.
        mask_id: of the result; None only for objective ar.
        block_size: diffusion block of the training to come.
        length: its trained length.
        objective: "block", or "ar" to keep the model autoregressive.
    """
    fields: dict[str, Any] = {**source.shape, **source.ids}
    return BD3Config(
        **fields,
        vocab_size=vocab_size,
        mask_token_id=mask_id,
        block_size=block_size,
        max_position_embeddings=length,
        objective=objective,
    )


class ArSource:
    """The plain tensors of a foreign folder, with the vocabulary it shall have.

    Args:
        source: what was read.
        config: the result's configuration.
        mask_init: how the mask's row is made.
        seed: of the noise.

    Raises:
        ConversionError: biases that are not zero, or tensors that the plain model has no place for.
    """

    def __init__(self, source: ArFolder, config: BD3Config, *, mask_init: MaskInit = "mean", seed: int = 1) -> None:
        self._source = source
        self._config = config
        self._mask_init = mask_init
        self._seed = seed
        qkv_rows = None
        if source.model_type in LLADA2_TYPES:
            keys = config.num_key_value_heads * config.head_dim
            qkv_rows = (config.num_attention_heads * config.head_dim, keys, keys)
        self._folder = SplitExperts(FolderSource(source.folder), qkv_rows=qkv_rows)
        self._names = self._usable_names()
        self._last = ("", torch.empty(0))

    def names(self) -> list[str]:
        """As PlainSource."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """As PlainSource."""
        stored = self._folder.shape(name)
        return (self._config.vocab_size, *stored[1:]) if name in (EMBED_TOKENS, LM_HEAD) else stored

    def tensor(self, name: str) -> Tensor:
        """As PlainSource."""
        if name not in (EMBED_TOKENS, LM_HEAD):
            return self._folder.tensor(name)
        if self._last[0] != name:
            # Let go before the next is made: two tables of a large vocabulary need not fit.
            self._last = ("", torch.empty(0))
            self._last = (name, self._resized(self._folder.tensor(name), name))
        return self._last[1]

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """As PlainSource; a table is kept until the other one is asked for."""
        return self.tensor(name)[start:end]

    def _usable_names(self) -> list[str]:
        tied = self._config.tie_word_embeddings
        kept = []
        for name in self._folder.names():
            if name.endswith("_proj.bias"):
                # Qwen2.5 has biases on q, k and v; zero ones change nothing and are left out.
                if self._folder.tensor(name).count_nonzero():
                    raise ConversionError(
                        f"{self._source.folder}: {name} is not zero; attention here has no biases, as in Qwen3 and Llama "
                        f"(model_type={self._source.model_type} was given): use a model without them."
                    )
                continue
            # written by some exporters although tied, or recomputed from the configuration
            if (name == LM_HEAD and tied) or name.endswith("rotary_emb.inv_freq"):
                continue
            # Everything else must be a parameter of the plain model; checked_shapes refuses what is not.
            kept.append(name)
        return kept

    def _resized(self, rows_VD: Tensor, name: str) -> Tensor:
        """The table with V rows: those of the source, the mean where it has none, and one for the mask."""
        wanted, mask_id = self._config.vocab_size, self._config.mask_token_id
        # The source's vocab_size may be smaller than its table, which is padded.
        trained = min(rows_VD.shape[0], wanted, self._source.vocab_size)
        table = torch.empty(wanted, rows_VD.shape[1], dtype=rows_VD.dtype)
        table[:trained] = rows_VD[:trained]
        mean_D = rows_VD[: self._source.vocab_size].float().mean(0)
        # Rows without a token get the mean: their logits are ordinary, not extreme.
        table[trained:] = mean_D.to(table.dtype)
        if mask_id is None or self._mask_init == "keep":
            return table
        row_D = mean_D
        if self._mask_init == "noise":
            # Keyed by the table's name: input and output row differ, and the import can be repeated.
            generator = torch.Generator().manual_seed(generator_seed(self._seed, Purpose.INIT, f"mask row of {name}"))
            spread_D = rows_VD[: self._source.vocab_size].float().std(0)
            row_D = mean_D + spread_D * torch.randn(mean_D.shape, generator=generator)
        table[mask_id] = row_D.to(table.dtype)
        return table
