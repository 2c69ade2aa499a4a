"""An exported folder in the layout of SDAR, Qwen3-shaped block diffusion that other engines serve, also with experts.

Weights pass through but for the two tables of the vocabulary: the rows of the output table that are of no token, and the
mask's, are silent (convert/silent_rows.py). Refused: what Qwen3's layout refuses (convert/qwen3_layout.py), shifted logits.
SDAR's modelling files are not ours to write.
Source: JetAstra/SDAR configuration_sdar.py; SGLang python/sglang/srt/dllm/config.py; LMDeploy pytorch/configurations/sdar.py;
JetEngine's reading of config.json.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bd3_megatron.convert.folder import copy_files, published
from bd3_megatron.convert.from_ar import EMBED_TOKENS, LM_HEAD
from bd3_megatron.convert.moved_mask import move_mask
from bd3_megatron.convert.plain_source import FolderSource, PlainSource
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

Shapes = Mapping[str, tuple[int, ...]]
"""Name -> shape."""
SDAR_MASK_ID = 151669
"""SGLang and LMDeploy take it from their own source, whatever the folder says."""
# Rows of the published SDAR models; the mask's row lies beyond Qwen3's own tokens.
SDAR_VOCAB_SIZE = 151936


class Spelling(Protocol):
    """How a layout names the plain model's tensors."""

    def shapes(self, plain: Shapes) -> Shapes:
        """Of every tensor of the folder."""

    def tensors(self, plain: Shapes, tensor: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
        """What makes a tensor of the folder from `tensor` of the plain model."""

    def opened(self, folder: Path) -> PlainSource:
        """A written folder under plain names."""


class PlainNames:
    """The plain model's own."""

    def shapes(self, plain: Shapes) -> Shapes:
        """As Spelling."""
        return plain

    def tensors(self, plain: Shapes, tensor: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
        """As Spelling."""
        return tensor

    def opened(self, folder: Path) -> PlainSource:
        """As Spelling."""
        return FolderSource(folder)


@dataclass(frozen=True, kw_only=True)
class ServedLayout:
    """What a layout of block diffusion has of its own."""

    mask_id: int
    """That engines assume."""
    vocab_size: int
    """Rows of its published models."""
    describe: Callable[[BD3Config, torch.dtype], dict[str, Any]]
    """Content of config.json."""
    spelling: Spelling


def write_sdar(request: LayoutRequest) -> list[str]:
    """Write the folder; returns what the user must know.

    Raises:
        ConversionError: the layout cannot express the model, or no row keeps unused ids silent.
    """
    check_shape_of_qwen3(request.config, "sdar")
    layout = ServedLayout(
        mask_id=SDAR_MASK_ID, vocab_size=SDAR_VOCAB_SIZE, describe=_sdar_config, spelling=PlainNames()
    )
    return write_served(request, layout)


def write_served(request: LayoutRequest, layout: ServedLayout) -> list[str]:
    """Write a folder of block diffusion; returns what the user must know.

    Args:
        request: what to make of which folder.
        layout: of the folder to write.

    Raises:
        ConversionError: shifted logits, a mask without a place, or no row that keeps unused ids silent.
    """
    config, source, dtype = request.config, request.source, request.dtype
    if not objective_named(config.objective).has_noise:
        raise ConversionError(
            "objective=ar has shifted logits and no mask; engines of block diffusion expect neither: use --layout qwen3."
        )
    # The source's configuration stays as it is: the tables below need both.
    target = copy.copy(config)
    target.mask_token_id, target.vocab_size = _mask_and_rows(config, request.mask, layout)
    # rows of the output table that are silent are rows of the input table too: the two cannot be one
    target.tie_word_embeddings = False
    tables = SdarTables(source, config, target)
    shapes = request.shapes | {name: (target.vocab_size, config.hidden_size) for name in (EMBED_TOKENS, LM_HEAD)}
    # Of the target: mask id and rows are those of the tables as they are written.
    described = layout.describe(target, dtype)
    with published(request.out, model_type=described["model_type"]) as staging:
        write_json(staging / "config.json", described)
        # The model's own distribution; transformers' defaults would cut it.
        sampled = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        write_json(staging / "generation_config.json", special_ids(target) | sampled)
        spelling = layout.spelling
        stream_weights(staging, spelling.shapes(shapes), spelling.tensors(shapes, tables.tensor), dtype=dtype)
        # On the written, rounded weights, before the folder has its name.
        mass = check_silent(spelling.opened(staging), target, tables.probed, tables.silent_ids)
        copied = copy_files(request.folder, staging, is_tokenizer_file)
        moved = target.mask_token_id == config.mask_token_id or _move(staging, config, target)
        file = described["auto_map"]["AutoConfig"].partition(".")[0]
        copy_files(model_files_dir(), staging, lambda path: path.name == f"{file}.py")
    stays = target.mask_token_id != layout.mask_id
    return _remarks(config, target, mass, stays=stays, has_tokenizer=bool(copied), tokenizer_follows=moved)


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


def _sdar_config(config: BD3Config, dtype: torch.dtype) -> dict[str, Any]:
    """Content of config.json."""
    names = ("SDARForCausalLM", "sdar", "SDARConfig")
    if config.num_experts:
        names = ("SDARMoeForCausalLM", "sdar_moe", "SDARMoeConfig")
    theirs: dict[str, Any] = {"architectures": [names[0]], "model_type": names[1], "use_cache": False}
    switches = {"fuse_cross_entropy": False, "attn_implementation": "flex_attention", "ep_size": 1, "debug": False}
    theirs |= switches | served_entries(config, f"configuration_sdar.{names[2]}")
    return qwen3_config(config, dtype=dtype) | theirs


def served_entries(config: BD3Config, configuration: str) -> dict[str, Any]:
    """The entries of config.json that engines of block diffusion ask for.

    Args:
        config: of the folder.
        configuration: file.class for transformers' AutoConfig.
    """
    auto_map = {"AutoConfig": configuration}
    return {"block_size": config.block_size, "mask_token_id": config.mask_token_id, "auto_map": auto_map}


def _mask_and_rows(config: BD3Config, mask: MaskPlace | None, layout: ServedLayout) -> tuple[int | None, int]:
    """Mask id and rows of the tables."""
    if config.mask_token_id == layout.mask_id or mask == "kept":
        return config.mask_token_id, config.vocab_size
    if mask is None:
        raise ConversionError(
            f"mask_token_id={config.mask_token_id}, but SGLang and LMDeploy assume {layout.mask_id} in this layout; give "
            "--remap-mask to move the row there, or --keep-mask for JetEngine and the models' own scripts, which take any id."
        )
    # Overwriting it would take a token of the model's away.
    if config.vocab_size > layout.mask_id:
        raise ConversionError(
            f"row {layout.mask_id} of the vocabulary ({config.vocab_size} rows) belongs to a token of its own; the mask "
            "cannot be moved there: use --keep-mask, and serve the model with JetEngine or the models' own script."
        )
    return layout.mask_id, layout.vocab_size


def _remarks(
    config: BD3Config, target: BD3Config, mass: float, *, stays: bool, has_tokenizer: bool, tokenizer_follows: bool
) -> list[str]:
    remarks = [
        f"ids of no token and the mask have at most {mass:.1g} of the probability at any position of a probe",
        "modelling files are not written: SGLang, LMDeploy and JetEngine bring their own, transformers needs them",
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
    elif stays:
        remarks.append(f"the mask stays at {target.mask_token_id}: tell JetEngine mask_token_id={target.mask_token_id}")
    return remarks if has_tokenizer else [*remarks, NO_TOKENIZER]
