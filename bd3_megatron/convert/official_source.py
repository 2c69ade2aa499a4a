"""Readers of official BD3-LM weights: a Hugging Face folder, or a Lightning checkpoint.

Decides which weights are meant (EMA by default, as official evaluation and sampling use), and what a source says about
its own block size, length, heads, objective and token ids. Nothing is guessed: what a source does not say stays None and
the importer asks for it. Nothing in a checkpoint is executed (see convert/unread.py); what was skipped is reported.
Refuses time-conditioned models, parameterizations other than SUBS and AR, and files that are neither format.
Source: kuleshov-group/bd3lms diffusion.py (on_save_checkpoint, load), hub pages of the published weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from bd3_megatron.convert.official import IGNORED_KEYS, strip_compile_prefix
from bd3_megatron.convert.unread import Unread, plain_value, read_foreign
from bd3_megatron.errors import CheckpointError, ConversionError
from bd3_megatron.sampling.folder import read_export_json, read_safetensors

OFFICIAL_MODEL_TYPES = ("bd3lm", "mdlm")
TOKENIZER_MARKS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True, kw_only=True)
class OfficialSource:
    """Weights under official names and what their source says about them; None = it does not say."""

    state: Mapping[str, Tensor]
    block_size: int | None = None
    """tokens of a diffusion block"""
    seq_len: int | None = None
    """trained length in tokens"""
    num_heads: int | None = None
    is_causal: bool = False
    """the autoregressive baseline"""
    mask_id: int | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    tokenizer_dir: Path | None = None
    """a folder with tokenizer files"""
    notes: tuple[str, ...] = ()
    """what was chosen or skipped, as sentences"""


def read_source(path: Path, *, raw: bool = False) -> OfficialSource:
    """Read an official Hugging Face folder or a Lightning .ckpt.

    Args:
        path: the folder or the file.
        raw: take the trained weights instead of their moving average (.ckpt only).

    Raises:
        CheckpointError: missing or damaged.
        ConversionError: time-conditioned, another parameterization, or no moving average where one is wanted.
    """
    if path.is_dir():
        return _read_hf_folder(path, raw=raw)
    return _read_lightning(path, raw=raw)


def _read_hf_folder(folder: Path, *, raw: bool) -> OfficialSource:
    described = read_export_json(folder / "config.json")
    model_type = described.get("model_type")
    if model_type not in OFFICIAL_MODEL_TYPES:
        raise ConversionError(
            f"{folder} holds model_type={model_type!r}; expected one of {', '.join(OFFICIAL_MODEL_TYPES)}."
        )
    _check_time_conditioning(described.get("time_conditioning"))
    notes = ["--raw has no effect: a Hugging Face folder holds one set of weights"] if raw else []
    seq_len = _as_int(described.get("model_length"))
    # Without the clean half the model is MDLM: one block over the whole length.
    has_clean_half = bool(described.get("cross_attn", model_type == "bd3lm"))
    has_tokenizer = any((folder / mark).is_file() for mark in TOKENIZER_MARKS)
    return OfficialSource(
        state=strip_compile_prefix(_hf_weights(folder, notes)),
        block_size=_as_int(described.get("block_size")) if has_clean_half else seq_len,
        seq_len=seq_len,
        num_heads=_as_int(described.get("n_heads")),
        is_causal=bool(described.get("causal", False)),
        mask_id=_as_int(described.get("mask_token_id")),
        bos_id=_as_int(described.get("bos_token_id")),
        eos_id=_as_int(described.get("eos_token_id")),
        pad_id=_as_int(described.get("pad_token_id")),
        tokenizer_dir=folder if has_tokenizer else None,
        notes=tuple(notes),
    )


def _hf_weights(folder: Path, notes: list[str]) -> dict[str, Tensor]:
    # safetensors first: nothing in it can be executed.
    if (folder / "model.safetensors").exists() or not (folder / "pytorch_model.bin").exists():
        return read_safetensors(folder / "model.safetensors")
    content, skipped = read_foreign(folder / "pytorch_model.bin")
    notes.extend(_skipped_notes(skipped))
    return _tensors(content, folder / "pytorch_model.bin")


def _read_lightning(path: Path, *, raw: bool) -> OfficialSource:
    content, skipped = read_foreign(path)
    if not isinstance(content, dict) or "state_dict" not in content:
        raise CheckpointError(f"{path} has no state_dict; give a Lightning checkpoint of BD3-LM.")
    # Official training compiles its model, which leaves a prefix in every name.
    state = strip_compile_prefix(_tensors(content["state_dict"], path))
    notes = _skipped_notes(skipped)
    if raw:
        notes.append("took the trained weights (--raw), not their moving average")
    else:
        state = _with_moving_average(state, content.get("ema"), path)
        notes.append("took the moving average of the weights (EMA)")
    hyper = content.get("hyper_parameters")
    # Lightning may have saved none, or an object that was not loaded.
    hyper = hyper if isinstance(hyper, dict) else {}
    if not hyper:
        notes.append("no hyper_parameters inside: time conditioning is taken to be off")
    described = _from_configuration(plain_value(hyper.get("config")) or {})
    mask_id, bos_id, eos_id = _token_ids(hyper.get("tokenizer"))
    return replace(described, state=state, notes=tuple(notes), mask_id=mask_id, bos_id=bos_id, eos_id=eos_id)


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds no state of named tensors; give a BD3-LM checkpoint.")
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


def _skipped_notes(skipped: list[str]) -> list[str]:
    if not skipped:
        return []
    return [f"not loaded (nothing in the file is executed): {', '.join(skipped)}"]


def _with_moving_average(state: dict[str, Tensor], ema: Any, path: Path) -> dict[str, Tensor]:
    """The state with every parameter replaced by its average, which lists them in named_parameters order.

    A state dict lists parameters in that same order, with buffers among them.
    """
    shadows = ema.get("shadow_params") if isinstance(ema, dict) else None
    if not isinstance(shadows, list):
        raise ConversionError(f"{path} holds no moving average (EMA); pass --raw to take the trained weights.")
    # Buffers have no average; shapes are compared, since the list holds no names.
    names = [name for name in state if name not in IGNORED_KEYS]
    shapes = [tuple(state[name].shape) for name in names]
    if shapes != [tuple(shadow.shape) if isinstance(shadow, Tensor) else None for shadow in shadows]:
        raise ConversionError(
            f"{path} has {len(shadows)} averaged tensors that do not match its {len(names)} parameters; "
            "pass --raw to take the trained weights."
        )
    return {**state, **dict(zip(names, shadows, strict=True))}


def _from_configuration(config: Mapping[str, Any]) -> OfficialSource:
    """What the official configuration tree says; the weights are filled in by the caller."""
    algo, model = config.get("algo") or {}, config.get("model") or {}
    _check_time_conditioning(algo.get("time_conditioning"))
    # The official default.
    parameterization = algo.get("parameterization", "subs")
    if parameterization not in ("subs", "ar"):
        raise ConversionError(
            f"parameterization={parameterization!r} cannot be imported; only subs (bd3lm, mdlm) and ar have our form."
        )
    seq_len = _as_int(model.get("length"))
    has_clean_half = bool(algo.get("cross_attn", True))
    return OfficialSource(
        state={},
        block_size=_as_int(config.get("block_size")) if has_clean_half else seq_len,
        seq_len=seq_len,
        num_heads=_as_int(model.get("n_heads")),
        is_causal=bool(algo.get("causal_attention", False)) or parameterization == "ar",
    )


def _token_ids(tokenizer: Any) -> tuple[int | None, int | None, int | None]:
    """(mask, bos, eos) ids that a pickled tokenizer states as plain numbers.

    Raises:
        ConversionError: it has a mask token, but not as a number.
    """
    state = tokenizer.state if isinstance(tokenizer, Unread) else None
    state = state if isinstance(state, dict) else {}
    mask_id = _as_int(state.get("mask_token_id"))
    named_mask = state.get("mask_token") or state.get("_mask_token")
    if named_mask is not None and mask_id is None:
        raise ConversionError(
            "the tokenizer inside the checkpoint has a mask token but does not state its id; pass --mask-id, "
            "or --tokenizer with its folder."
        )
    return mask_id, _as_int(state.get("bos_token_id")), _as_int(state.get("eos_token_id"))


def _check_time_conditioning(value: Any) -> None:
    if value:
        raise ConversionError(
            "time_conditioning is on: the modulation of every layer then depends on the noise level, so it cannot be "
            "folded into weights; only models trained with time_conditioning=False can be imported."
        )


def _as_int(value: Any) -> int | None:
    # Python counts True as 1.
    return value if isinstance(value, int) and not isinstance(value, bool) else None
