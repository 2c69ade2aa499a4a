"""Official BD3-LM weights -> our exported folder, and back.

Decides the configuration of an imported model: what the caller says, then what the source says, then its tokenizer;
the mask token is the last row of the table (the official rule for tokenizers without one) unless either says otherwise.
Folding runs in float64 and is stored as fp32. Both directions publish a folder whole or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from bd3_megatron.checkpoint.files import write_safetensors
from bd3_megatron.convert.folder import copy_files, published
from bd3_megatron.convert.from_hf import read_folder
from bd3_megatron.convert.official import (
    OFFICIAL_LAYER_NORM_EPS,
    OFFICIAL_MLP_RATIO,
    OFFICIAL_ROPE_THETA,
    fold,
    num_layers,
    unfold,
)
from bd3_megatron.convert.official_source import OfficialSource, read_source
from bd3_megatron.convert.to_hf import is_tokenizer_file, write_folder
from bd3_megatron.diffusion.objective import objective_named
from bd3_megatron.errors import ConversionError, TokenizerError, check_multiple
from bd3_megatron.files import write_json
from bd3_megatron.hf.configuration_bd3 import BD3Config
from bd3_megatron.sampling.text import folder_tokenizer

OFFICIAL_TYPE = "bd3lm"


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What the caller says about a source; None = ask the source."""

    block_size: int | None = None
    """tokens of a diffusion block; a model trained at one size may be used at another"""
    seq_len: int | None = None
    """trained length in tokens"""
    mask_id: int | None = None
    tokenizer_dir: Path | None = None
    """a folder with tokenizer files, copied and asked for token ids"""
    raw: bool = False
    """trained weights instead of their moving average"""


@dataclass(frozen=True)
class ImportReport:
    """What was written, and what the reader chose or skipped."""

    out: Path
    num_parameters: int
    notes: list[str] = field(default_factory=list)


def import_official(source: Path, out: Path, options: ImportOptions | None = None) -> ImportReport:
    """Fold an official source into an exported folder (fp32).

    Args:
        source: an official Hugging Face folder or a Lightning .ckpt.
        out: the folder to write.
        options: see `ImportOptions`.

    Raises:
        CheckpointError: the source is missing or damaged.
        ConversionError: it cannot be translated exactly, or does not say what only the caller can.
    """
    options = options or ImportOptions()
    read = read_source(Path(source), raw=options.raw)
    # In float64: w (1 + scale) and diag(gate) W are rounded once, when they are stored.
    plain = fold({name: tensor.double() for name, tensor in read.state.items()})
    tokenizer_dir = options.tokenizer_dir or read.tokenizer_dir
    config = imported_config(read, options, _tokenizer_ids(tokenizer_dir))
    copied = write_folder(plain, config, Path(out), tokenizer_dir=tokenizer_dir, dtype=torch.float32)
    notes = list(read.notes)
    notes.append(f"mask token id {config.mask_token_id} of {config.vocab_size}")
    if not copied:
        notes.append("no tokenizer files: prompts must be token ids, and texts are not decoded")
    return ImportReport(Path(out), sum(tensor.numel() for tensor in plain.values()), notes)


def _tokenizer_ids(tokenizer_dir: Path | None) -> dict[str, int | None]:
    """mask, bos and eos ids of a tokenizer folder; empty without one."""
    if tokenizer_dir is None:
        return {}
    tokenizer = folder_tokenizer(tokenizer_dir)
    if tokenizer is None:
        raise TokenizerError(f"{tokenizer_dir} holds no tokenizer files; give the tokenizer's folder.")
    return {
        "mask_id": tokenizer.mask_token_id,
        "bos_id": tokenizer.bos_token_id,
        "eos_id": tokenizer.eos_token_id,
        "pad_id": tokenizer.pad_token_id,
    }


def imported_config(read: OfficialSource, options: ImportOptions, ids: dict[str, int | None]) -> BD3Config:
    """Configuration of a folded official model.

    Raises:
        ConversionError: block size, length or heads are unknown, contradict each other, or the mask id is no row.
    """
    # Shapes are read off the tensors; a configuration that contradicts them is not asked.
    table = read.state["backbone.vocab_embed.embedding"]
    vocab_size, hidden_size = table.shape
    seq_len = _known("seq_len", options.seq_len, read.seq_len, "--seq-len")
    block_size = _known("block_size", options.block_size, 1 if read.is_causal else read.block_size, "--block-size")
    check_multiple("seq_len", seq_len, "block_size", block_size, kind=ConversionError)
    # What the caller says, then the tokenizer, then the source, else the last row: the official rule for tokenizers
    # without a mask.
    mask_id = next((m for m in (options.mask_id, ids.get("mask_id"), read.mask_id) if m is not None), vocab_size - 1)
    if not 0 <= mask_id < vocab_size:
        raise ConversionError(f"mask_id={mask_id} is not a row of the table; use 0 to {vocab_size - 1}.")
    head_dim = _head_dim(read, hidden_size)
    return BD3Config(
        vocab_size=vocab_size,
        style="paper",
        num_hidden_layers=num_layers(read.state),
        hidden_size=hidden_size,
        num_attention_heads=hidden_size // head_dim,
        head_dim=head_dim,
        intermediate_size=read.state["backbone.blocks.0.mlp.0.weight"].shape[0],
        layer_norm_eps=OFFICIAL_LAYER_NORM_EPS,
        rope_theta=OFFICIAL_ROPE_THETA,
        max_position_embeddings=seq_len,
        block_size=block_size,
        mask_token_id=mask_id,
        bos_token_id=read.bos_id if ids.get("bos_id") is None else ids["bos_id"],
        eos_token_id=read.eos_id if ids.get("eos_id") is None else ids["eos_id"],
        pad_token_id=read.pad_id if ids.get("pad_id") is None else ids["pad_id"],
        objective="ar" if read.is_causal else "block",
    )


def _known(name: str, said: int | None, read: int | None, flag: str) -> int:
    value = read if said is None else said
    if value is None or value < 1:
        raise ConversionError(f"{name}={value} is not stated by the source as a positive number; pass {flag} N.")
    return value


def _head_dim(read: OfficialSource, hidden_size: int) -> int:
    """Width of a head: twice the stored rotary frequencies, else from the number of heads."""
    frequencies = read.state.get("backbone.rotary_emb.inv_freq")
    # The stored table is the only thing in a bare checkpoint that tells the number of heads.
    head_dim = 2 * len(frequencies) if frequencies is not None else hidden_size // (read.num_heads or hidden_size)
    if head_dim < 2 or hidden_size % head_dim != 0:
        raise ConversionError(
            f"the source has hidden size {hidden_size}, num_heads={read.num_heads} and no rotary table that fits; "
            "it is not a complete BD3-LM state."
        )
    return head_dim


def export_official(folder: Path, out: Path) -> ImportReport:
    """Write an exported folder under official keys, for the official Hugging Face class (fp32).

    Args:
        folder: an exported folder in the paper's style.
        out: the folder to write; the official `configuration_bd3lm.py` and `modeling_bd3lm.py` are not ours to copy.

    Raises:
        CheckpointError: the folder is missing or damaged.
        ConversionError: the official class fixes something that this model has otherwise.
    """
    config, state = read_folder(folder)
    check_exportable(config)
    official = unfold({name: tensor.float() for name, tensor in state.items()}, head_dim=config.head_dim)
    with published(Path(out), model_type=OFFICIAL_TYPE) as staging:
        described = official_config_json(config, official)
        write_json(staging / "config.json", described)
        write_safetensors(staging / "model.safetensors", official, {"format": "pt"})
        copied = copy_files(Path(folder), staging, is_tokenizer_file)
    notes = ["place configuration_bd3lm.py and modeling_bd3lm.py of the official repository beside the weights"]
    # Its own rule is the last row, where the tokenizer names no mask.
    if config.mask_token_id != config.vocab_size - 1:
        notes.append(f"mask token id {config.mask_token_id} is not the last row: the official class asks its tokenizer")
    if not copied:
        notes.append("no tokenizer files in the source folder, so none here")
    return ImportReport(Path(out), sum(tensor.numel() for tensor in state.values()), notes)


def check_exportable(config: BD3Config) -> None:
    """Refuse a model that the official class cannot hold.

    Raises:
        ConversionError: names the first field that differs, its value, and what the official class fixes.
    """
    fixed = {
        "style": "paper",
        "qk_norm": False,
        "num_key_value_heads": config.num_attention_heads,
        "intermediate_size": OFFICIAL_MLP_RATIO * config.hidden_size,
        # The official class knows no other width.
        "head_dim": config.hidden_size // config.num_attention_heads,
        "rope_theta": OFFICIAL_ROPE_THETA,
        "layer_norm_eps": OFFICIAL_LAYER_NORM_EPS,
    }
    for name, wanted in fixed.items():
        found = vars(config)[name]
        if found != wanted:
            raise ConversionError(
                f"{name}={found} cannot be exported to the official class, which fixes {name}={wanted}; "
                "train such a model to export it."
            )


def official_config_json(config: BD3Config, official: dict[str, Tensor]) -> dict[str, object]:
    """config.json of the official class."""
    ids = {
        "mask_token_id": config.mask_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    return {
        # Its forward needs the modulation; unfold writes it as constants.
        "adaln": True,
        "architectures": ["BD3LM"],
        # torch's own attention: flex attention wants a compiler where the folder is loaded.
        "attn_backend": "sdpa",
        "auto_map": {
            "AutoConfig": "configuration_bd3lm.BD3LMConfig",
            "AutoModelForMaskedLM": "modeling_bd3lm.BD3LM",
        },
        "block_size": config.block_size,
        "causal": not objective_named(config.objective).has_noise,
        "cond_dim": official["backbone.sigma_map.mlp.0.bias"].shape[0],
        "cross_attn": objective_named(config.objective).has_noise,
        "dropout": config.residual_dropout,
        "hidden_dim": config.hidden_size,
        "model_length": config.max_position_embeddings,
        "model_type": OFFICIAL_TYPE,
        "n_blocks": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "return_dict": False,
        # The official defaults; the searched interval matters for training only.
        "sampling_eps_max": 0.999,
        "sampling_eps_min": 0.001,
        "time_conditioning": False,
        "torch_dtype": "float32",
        "var_min": True,
        "vocab_size": config.vocab_size,
        # Not fields of the official class, which keeps unknown ones; they make the way back exact.
        **{name: value for name, value in ids.items() if value is not None},
    }
