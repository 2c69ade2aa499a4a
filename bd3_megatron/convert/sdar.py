"""An exported folder in the layout of SDAR, Qwen3-shaped block diffusion that other engines serve.

Weights pass through but for the two tables of the vocabulary: the rows of the output table that are of no token, and the
mask's, are silent (convert/silent_rows.py). Refused: what Qwen3's layout refuses (convert/qwen3_layout.py), any experts,
shifted logits. SDAR's modelling files are not ours to write.
Source: JetAstra/SDAR configuration_sdar.py; SGLang python/sglang/srt/dllm/config.py; LMDeploy pytorch/configurations/sdar.py;
JetEngine's reading of config.json.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bd3_megatron.convert.folder import copy_files, published
from bd3_megatron.convert.from_ar import EMBED_TOKENS, LM_HEAD
from bd3_megatron.convert.moved_mask import move_mask
from bd3_megatron.convert.plain_source import FolderSource
from bd3_megatron.convert.qwen3_layout import (
    NO_TOKENIZER,
    LayoutRequest,
    MaskPlace,
    check_shape_of_qwen3,
    qwen3_config,
    special_ids,
)
from bd3_megatron.convert.silent_rows import check_silent, probe, silent_row
from bd3_megatron.convert.stream import stream_weights
from bd3_megatron.convert.to_hf import is_tokenizer_file, model_files_dir
from bd3_megatron.diffusion.objective import objective_named
from bd3_megatron.errors import ConversionError
from bd3_megatron.files import write_json
from bd3_megatron.hf.configuration_bd3 import BD3Config

SDAR_MASK_ID = 151669
"""SGLang and LMDeploy take it from their own source, whatever the folder says."""
# Rows of the published SDAR models; the mask's row lies beyond Qwen3's own tokens.
SDAR_VOCAB_SIZE = 151936
CONFIGURATION_FILE = "configuration_sdar.py"


def write_sdar(request: LayoutRequest) -> list[str]:
    """Write the folder; returns what the user must know.

    Raises:
        ConversionError: the layout cannot express the model, or no row keeps unused ids silent.
    """
    config, source, dtype = request.config, request.source, request.dtype
    _check_expressible(config)
    # The source's configuration stays as it is: the tables below need both.
    target = copy.copy(config)
    target.mask_token_id, target.vocab_size = _mask_and_rows(config, request.mask)
    # rows of the output table that are silent are rows of the input table too: the two cannot be one
    target.tie_word_embeddings = False
    tables = SdarTables(source, config, target)
    shapes = request.shapes | {name: (target.vocab_size, config.hidden_size) for name in (EMBED_TOKENS, LM_HEAD)}
    with published(request.out, model_type="sdar") as staging:
        write_json(staging / "config.json", _sdar_config(target, dtype=dtype))
        # The model's own distribution; transformers' defaults would cut it.
        sampled = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        write_json(staging / "generation_config.json", special_ids(target) | sampled)
        stream_weights(staging, shapes, tables.tensor, dtype=dtype)
        # On the written, rounded weights, before the folder has its name.
        mass = check_silent(FolderSource(staging), target, tables.probed, tables.silent_ids)
        copied = copy_files(request.folder, staging, is_tokenizer_file)
        moved = target.mask_token_id == config.mask_token_id or _move(staging, config, target)
        copy_files(model_files_dir(), staging, lambda path: path.name == CONFIGURATION_FILE)
    return _remarks(config, target, mass, has_tokenizer=bool(copied), tokenizer_follows=moved)


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


def _move(staging: Path, config: BD3Config, target: BD3Config) -> bool:
    assert config.mask_token_id is not None and target.mask_token_id is not None
    return move_mask(staging, config.mask_token_id, target.mask_token_id)


def _sdar_config(config: BD3Config, *, dtype: torch.dtype) -> dict[str, Any]:
    """Content of config.json."""
    theirs = {"architectures": ["SDARForCausalLM"], "model_type": "sdar", "use_cache": False}
    switches = {"fuse_cross_entropy": False, "attn_implementation": "flex_attention", "ep_size": 1, "debug": False}
    auto_map = {"AutoConfig": f"{CONFIGURATION_FILE.removesuffix('.py')}.SDARConfig"}
    ours = {"block_size": config.block_size, "mask_token_id": config.mask_token_id, "auto_map": auto_map}
    return qwen3_config(config, dtype=dtype) | theirs | switches | ours


def _check_expressible(config: BD3Config) -> None:
    check_shape_of_qwen3(config, "sdar")
    if config.num_experts:
        raise ConversionError(
            f"num_experts={config.num_experts} cannot be written as sdar, whose engines take the dense model; use the exported "
            "folder itself, or --layout qwen3 for objective=ar."
        )
    if not objective_named(config.objective).has_noise:
        raise ConversionError(
            "objective=ar has shifted logits and no mask; SDAR's engines expect neither: use --layout qwen3."
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
