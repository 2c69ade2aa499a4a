"""An exported folder in the layouts other engines serve: SDAR (Qwen3-shaped block diffusion), or plain Qwen3.

Decides: config.json and generation_config.json as those engines read them; weights pass through, since the plain model
has Qwen3's names. SGLang and LMDeploy take the mask id 151669 for SDAR from their own source, not from the folder: with
another mask id the export is refused, or (remap) the mask's rows move there, the vocabulary grows to 151936 and the rows
in between, which no token uses, are named in generation_config's suppress_tokens.
Refuses: the paper's style, models without norms on queries and keys (SDAR), shifted logits (SDAR).
Does not write SDAR's modelling files: they are not ours. SGLang, LMDeploy and JetEngine need none.
Source: JetAstra/SDAR configuration_sdar.py; SGLang python/sglang/srt/dllm/config.py; LMDeploy pytorch/configurations/sdar.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bd3_megatron.convert.folder import copy_files, published
from bd3_megatron.convert.from_ar import EMBED_TOKENS, LM_HEAD
from bd3_megatron.convert.plain_source import FolderSource
from bd3_megatron.convert.stream import stream_weights
from bd3_megatron.convert.to_hf import DTYPE_NAMES, checked_shapes, is_tokenizer_file
from bd3_megatron.diffusion.objective import objective_named
from bd3_megatron.errors import ConversionError
from bd3_megatron.files import write_json
from bd3_megatron.hf.configuration_bd3 import BD3Config
from bd3_megatron.sampling.folder import read_config

ExportLayout = Literal["sdar", "qwen3"]
SDAR_MASK_ID = 151669
SDAR_VOCAB_SIZE = 151936
TABLES = (EMBED_TOKENS, LM_HEAD)


def export_layout(
    folder: Path, out: Path, layout: ExportLayout, *, remap_mask: bool = False, dtype: torch.dtype = torch.bfloat16
) -> list[str]:
    """Write an exported folder in another engine's layout.

    Args:
        folder: an exported folder of ours.
        out: the folder to write.
        layout: "sdar" or "qwen3".
        remap_mask: move the mask to the id that SDAR's engines assume.
        dtype: of the stored weights.

    Returns:
        What the user must know.

    Raises:
        ConversionError: the layout cannot express the model.
    """
    config, source = read_config(folder), FolderSource(folder)
    shapes = checked_shapes(source, config)
    _check_expressible(config, layout)
    target_mask, vocab_size = config.mask_token_id, config.vocab_size
    if layout == "sdar" and config.mask_token_id != SDAR_MASK_ID:
        target_mask, vocab_size = _remapped(config, remap_mask=remap_mask), max(vocab_size, SDAR_VOCAB_SIZE)
    produce = _with_moved_mask(source, config, vocab_size, target_mask)
    shapes = {name: (vocab_size, *shape[1:]) if name in TABLES else shape for name, shape in shapes.items()}
    with published(out, model_type=layout) as staging:
        described = layout_config(config, layout, vocab_size=vocab_size, mask_id=target_mask, dtype=dtype)
        write_json(staging / "config.json", described)
        unused = [i for i in range(config.vocab_size, vocab_size) if i != target_mask]
        if target_mask != config.mask_token_id and config.mask_token_id is not None:
            unused.insert(0, config.mask_token_id)
        write_json(staging / "generation_config.json", generation_config(config, layout, unused))
        stream_weights(staging, shapes, produce, dtype=dtype)
        copied = copy_files(folder, staging, is_tokenizer_file)
    return _remarks(config, layout, target_mask, copied)


def layout_config(
    config: BD3Config, layout: ExportLayout, *, vocab_size: int, mask_id: int | None, dtype: torch.dtype
) -> dict[str, Any]:
    """Content of config.json in the other layout."""
    described = {
        "architectures": ["SDARForCausalLM" if layout == "sdar" else "Qwen3ForCausalLM"],
        "model_type": layout,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.layer_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": config.max_position_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "vocab_size": vocab_size,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": config.num_hidden_layers,
        "use_cache": layout == "qwen3",
        "torch_dtype": DTYPE_NAMES[dtype],
    }
    if layout == "qwen3":
        return described
    switches = {"fuse_cross_entropy": False, "attn_implementation": "flex_attention", "ep_size": 1, "debug": False}
    return described | switches | {"block_size": config.block_size, "mask_token_id": mask_id}


def generation_config(config: BD3Config, layout: ExportLayout, unused: list[int]) -> dict[str, Any]:
    """Content of generation_config.json; `unused` rows must never be sampled."""
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    described: dict[str, Any] = {name: value for name, value in ids.items() if value is not None}
    if layout == "sdar":
        described |= {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return described | ({"suppress_tokens": unused} if unused else {})


def _check_expressible(config: BD3Config, layout: ExportLayout) -> None:
    if config.style != "modern":
        raise ConversionError(f"style={config.style} cannot be written as {layout}; it needs RMSNorm and SwiGLU.")
    if not config.qk_norm:
        raise ConversionError(f"qk_norm=false cannot be written as {layout}, whose queries and keys are normed.")
    if layout == "sdar" and not objective_named(config.objective).has_noise:
        raise ConversionError(
            "objective=ar has shifted logits and no mask; SDAR's engines expect neither: use --layout qwen3."
        )


def _remapped(config: BD3Config, *, remap_mask: bool) -> int:
    if not remap_mask:
        raise ConversionError(
            f"mask_token_id={config.mask_token_id}, but SGLang and LMDeploy assume {SDAR_MASK_ID} for SDAR; "
            "give --remap-mask to move the row there, or train with a tokenizer whose mask has that id."
        )
    if config.vocab_size > SDAR_MASK_ID:
        raise ConversionError(
            f"row {SDAR_MASK_ID} of the vocabulary ({config.vocab_size} rows) belongs to a token of its own; "
            "the mask cannot be moved there, serve this model with JetEngine, which takes the mask id as an argument."
        )
    return SDAR_MASK_ID


def _with_moved_mask(
    source: FolderSource, config: BD3Config, vocab_size: int, mask_id: int | None
) -> Callable[[str], Tensor]:
    def produce(name: str) -> Tensor:
        tensor = source.tensor(name)
        if name not in TABLES or (vocab_size == tensor.shape[0] and mask_id == config.mask_token_id):
            return tensor
        table = tensor.new_zeros(vocab_size, *tensor.shape[1:])
        table[: tensor.shape[0]] = tensor
        if mask_id is not None and mask_id != config.mask_token_id:
            table[mask_id] = tensor[config.mask_token_id]
            table[config.mask_token_id] = 0
        return table

    return produce


def _remarks(config: BD3Config, layout: ExportLayout, mask_id: int | None, copied: list[str]) -> list[str]:
    remarks = [] if copied else ["no tokenizer files were there; copy the tokenizer into the folder"]
    if layout == "sdar":
        remarks.append(
            "no modelling files are written: SGLang, LMDeploy and JetEngine need none, transformers needs SDAR's own"
        )
    if mask_id != config.mask_token_id:
        remarks.append(
            f"the mask moved from {config.mask_token_id} to {mask_id}: tell the tokenizer too, and forbid the unused rows, "
            "which are zero (generation_config.json names them; SGLang does not read that list)"
        )
    return remarks
