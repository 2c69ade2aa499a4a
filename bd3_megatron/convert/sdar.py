"""An exported folder in the layouts other engines serve: SDAR (Qwen3-shaped block diffusion), or plain Qwen3.

Weights pass through, since the plain model has Qwen3's names. In SDAR's layout the rows of the output table that are of no
token, and the mask's, are silent (convert/silent_rows.py). Refused: the paper's style, no norms on queries and keys,
shifted logits as SDAR, block diffusion as Qwen3. SDAR's modelling files are not ours to write.
Source: JetAstra/SDAR configuration_sdar.py; SGLang python/sglang/srt/dllm/config.py; LMDeploy pytorch/configurations/sdar.py;
JetEngine's reading of config.json.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bd3_megatron.convert.folder import copy_files, published
from bd3_megatron.convert.from_ar import EMBED_TOKENS, LM_HEAD
from bd3_megatron.convert.moved_mask import move_mask
from bd3_megatron.convert.plain_source import FolderSource
from bd3_megatron.convert.silent_rows import check_silent, probe, silent_row
from bd3_megatron.convert.stream import stream_weights
from bd3_megatron.convert.to_hf import (
    DTYPE_NAMES,
    check_ids,
    checked_shapes,
    is_tokenizer_file,
    model_files_dir,
)
from bd3_megatron.diffusion.objective import objective_named
from bd3_megatron.errors import ConversionError
from bd3_megatron.files import write_json
from bd3_megatron.hf.configuration_bd3 import BD3Config
from bd3_megatron.sampling.folder import read_config

ExportLayout = Literal["sdar", "qwen3"]
MaskPlace = Literal["moved", "kept"]
SDAR_MASK_ID = 151669
"""SGLang and LMDeploy take it from their own source, whatever the folder says."""
# Rows of the published SDAR models; the mask's row lies beyond Qwen3's own tokens.
SDAR_VOCAB_SIZE = 151936
CONFIGURATION_FILE = "configuration_sdar.py"


def export_layout(
    folder: Path,
    out: Path,
    layout: ExportLayout,
    *,
    mask: MaskPlace | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> list[str]:
    """Write an exported folder in another engine's layout.

    Args:
        folder: an exported folder of ours.
        out: the folder to write.
        layout: "sdar" or "qwen3".
        mask: "moved" to the id that SGLang and LMDeploy assume, or "kept" for engines that take any; None: refuse where
            the two differ.
        dtype: of the stored weights.

    Returns:
        What the user must know.

    Raises:
        ConversionError: the layout cannot express the model, or no row keeps unused ids silent.
    """
    config, source = read_config(folder), FolderSource(folder)
    check_ids(config, str(folder))
    shapes = checked_shapes(source, config)
    _check_expressible(config, layout)
    if layout == "qwen3":
        with published(out, model_type=layout) as staging:
            _write_descriptions(staging, config, layout, dtype)
            stream_weights(staging, shapes, source.tensor, dtype=dtype)
            copied = copy_files(folder, staging, is_tokenizer_file)
        return [] if copied else [NO_TOKENIZER]
    # The source's configuration stays as it is: the tables below need both.
    target = copy.copy(config)
    target.mask_token_id, target.vocab_size = _mask_and_rows(config, mask)
    # rows of the output table that are silent are rows of the input table too: the two cannot be one
    target.tie_word_embeddings = False
    tables = SdarTables(source, config, target)
    shapes |= {name: (target.vocab_size, config.hidden_size) for name in (EMBED_TOKENS, LM_HEAD)}
    with published(out, model_type=layout) as staging:
        _write_descriptions(staging, target, layout, dtype)
        stream_weights(staging, shapes, tables.tensor, dtype=dtype)
        # On the written, rounded weights, before the folder has its name.
        mass = check_silent(FolderSource(staging), target, tables.probed, tables.silent_ids)
        copied = copy_files(folder, staging, is_tokenizer_file)
        moved = target.mask_token_id == config.mask_token_id or _move(staging, config, target)
        copy_files(model_files_dir(), staging, lambda path: path.name == CONFIGURATION_FILE)
    return _remarks(config, target, mass, has_tokenizer=bool(copied), tokenizer_follows=moved)


NO_TOKENIZER = "no tokenizer files were there; copy the tokenizer into the folder"


class SdarTables:
    """Tensors of the SDAR folder: those of the source, but for the two tables of the vocabulary.

    Args:
        source: of our folder.
        config: of our folder.
        target: of the SDAR folder: mask id, rows.
    """

    def __init__(self, source: FolderSource, config: BD3Config, target: BD3Config) -> None:
        self._source, self._config, self._target = source, config, target
        self.probed = probe(source, config)
        self._silent_D = silent_row(self.probed.states_ND)
        unused = {*range(config.vocab_size, target.vocab_size), config.mask_token_id, target.mask_token_id}
        self.silent_ids = sorted(i for i in unused if i is not None)

    def tensor(self, name: str) -> Tensor:
        """One tensor, whole."""
        if name not in (EMBED_TOKENS, LM_HEAD):
            return self._source.tensor(name)
        rows_VD = self._source.tensor(EMBED_TOKENS if self._config.tie_word_embeddings else name)
        # Rows beyond the source's are of no token; in the input table they are never looked up.
        table_VD = rows_VD.new_zeros(self._target.vocab_size, rows_VD.shape[1])
        table_VD[: len(rows_VD)] = rows_VD
        if name == LM_HEAD:
            table_VD[torch.tensor(self.silent_ids)] = self._silent_D.to(rows_VD.dtype)
        elif self._target.mask_token_id != self._config.mask_token_id:
            table_VD[self._target.mask_token_id] = rows_VD[self._config.mask_token_id]
            table_VD[self._config.mask_token_id] = 0
        return table_VD


def _write_descriptions(staging: Path, config: BD3Config, layout: ExportLayout, dtype: torch.dtype) -> None:
    write_json(staging / "config.json", layout_config(config, layout, dtype=dtype))
    write_json(staging / "generation_config.json", generation_config(config, layout))


def _move(staging: Path, config: BD3Config, target: BD3Config) -> bool:
    assert config.mask_token_id is not None and target.mask_token_id is not None
    return move_mask(staging, config.mask_token_id, target.mask_token_id)


def layout_config(config: BD3Config, layout: ExportLayout, *, dtype: torch.dtype) -> dict[str, Any]:
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
        # Spelt out, for readers whose own default is another.
        "rope_scaling": None,
        "max_position_embeddings": config.max_position_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "vocab_size": config.vocab_size,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": config.num_hidden_layers,
        "use_cache": layout == "qwen3",
        "torch_dtype": DTYPE_NAMES[dtype],
    }
    # Qwen3 has no fields of ours, and its readers refuse or ignore unknown ones.
    if layout == "qwen3":
        return described | (_mixture_config(config) if config.num_experts else {})
    switches = {"fuse_cross_entropy": False, "attn_implementation": "flex_attention", "ep_size": 1, "debug": False}
    auto_map = {"AutoConfig": f"{CONFIGURATION_FILE.removesuffix('.py')}.SDARConfig"}
    ours = {"block_size": config.block_size, "mask_token_id": config.mask_token_id, "auto_map": auto_map}
    return described | switches | ours


def _mixture_config(config: BD3Config) -> dict[str, Any]:
    """The entries in which Qwen3-MoE's config.json differs from Qwen3's."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size,
        "norm_topk_prob": config.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(config.first_k_dense_replace)),
        # the load is balanced in training here, by no loss of theirs
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
    }


def generation_config(config: BD3Config, layout: ExportLayout) -> dict[str, Any]:
    """Content of generation_config.json."""
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    described: dict[str, Any] = {name: value for name, value in ids.items() if value is not None}
    if layout == "sdar":
        # The model's own distribution; transformers' defaults would cut it.
        described |= {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return described


def _check_mixture(config: BD3Config, layout: ExportLayout) -> None:
    """Refuse experts that Qwen3-MoE's modelling file does not compute."""
    if layout == "sdar":
        raise ConversionError(
            f"num_experts={config.num_experts} cannot be written as sdar, whose engines take the dense model; use the exported "
            "folder itself, or --layout qwen3 for objective=ar."
        )
    plain = {"score_function": "softmax", "router_bias": False, "shared_expert_intermediate_size": 0, "n_group": 1}
    plain |= {"routed_scaling_factor": 1.0}
    for field, wanted in plain.items():
        if getattr(config, field) != wanted:
            raise ConversionError(
                f"{field}={getattr(config, field)} cannot be written as {layout}, whose experts have {wanted}; use the exported "
                "folder itself."
            )


def _check_expressible(config: BD3Config, layout: ExportLayout) -> None:
    if config.style != "modern":
        raise ConversionError(f"style={config.style} cannot be written as {layout}; it needs RMSNorm and SwiGLU.")
    if config.partial_rotary_factor != 1.0:
        raise ConversionError(
            f"partial_rotary_factor={config.partial_rotary_factor} cannot be written as {layout}, which turns whole heads; use "
            "the exported folder itself."
        )
    if config.num_experts:
        _check_mixture(config, layout)
    if not config.qk_norm:
        raise ConversionError(f"qk_norm=false cannot be written as {layout}, whose queries and keys are normed.")
    if layout == "sdar" and not objective_named(config.objective).has_noise:
        raise ConversionError(
            "objective=ar has shifted logits and no mask; SDAR's engines expect neither: use --layout qwen3."
        )
    if layout == "qwen3" and objective_named(config.objective).has_noise:
        raise ConversionError(
            "objective=block cannot be written as qwen3: readers of Qwen3 take a position's logits for the next token's; "
            "use --layout sdar."
        )


def _mask_and_rows(config: BD3Config, mask: MaskPlace | None) -> tuple[int | None, int]:
    """Mask id and rows of the tables in SDAR's layout."""
    if config.mask_token_id == SDAR_MASK_ID or mask == "kept":
        return config.mask_token_id, config.vocab_size
    if mask is None:
        raise ConversionError(
            f"mask_token_id={config.mask_token_id}, but SGLang and LMDeploy assume {SDAR_MASK_ID} for SDAR; give "
            "--remap-mask to move the row there, or --keep-mask for JetEngine and SDAR's own script, which take any id."
        )
    # Overwriting it would take a token of the model's away.
    if config.vocab_size > SDAR_MASK_ID:
        raise ConversionError(
            f"row {SDAR_MASK_ID} of the vocabulary ({config.vocab_size} rows) belongs to a token of its own; the mask "
            "cannot be moved there: use --keep-mask, and serve the model with JetEngine or SDAR's own script."
        )
    return SDAR_MASK_ID, SDAR_VOCAB_SIZE


def _remarks(
    config: BD3Config, target: BD3Config, mass: float, *, has_tokenizer: bool, tokenizer_follows: bool
) -> list[str]:
    remarks = [
        f"ids of no token and the mask have at most {mass:.1g} of the probability at any position of a probe",
        "SDAR's modelling files are not written: SGLang, LMDeploy and JetEngine bring their own, transformers needs them",
    ]
    if config.tie_word_embeddings:
        remarks.append("the output table is stored apart from the input table, because its unused rows are silent")
    if target.mask_token_id != config.mask_token_id:
        remarks.append(f"the mask moved from {config.mask_token_id} to {target.mask_token_id}, in the tables")
        if has_tokenizer:
            remarks.append(
                "and in the tokenizer"
                if tokenizer_follows
                else f"the tokenizer cannot hold id {target.mask_token_id} and still says {config.mask_token_id}"
            )
    elif target.mask_token_id != SDAR_MASK_ID:
        remarks.append(f"the mask stays at {target.mask_token_id}: tell JetEngine mask_token_id={target.mask_token_id}")
    return remarks if has_tokenizer else [*remarks, NO_TOKENIZER]
