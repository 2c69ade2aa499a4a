"""The first checkpoint of a run from somebody's weights: an exported folder of ours, or Qwen3, Llama, SDAR.

Decides: what is written is step 0 of the run, kind "whole", under the run's own configuration; `bd3 train CONFIG` then
finds it like any other checkpoint and starts from it on any grid. The model section must say what the source is.
The proof compares logits: of the source's plain tensors, and of the checkpoint's parallel tensors.
Refuses: a model section that differs from the source (with the values to put there), a run that has begun.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bd3_megatron.checkpoint.describe import software_versions, source_commit
from bd3_megatron.checkpoint.layout import Manifest, checkpoint_folders, step_name
from bd3_megatron.checkpoint.read import open_checkpoint
from bd3_megatron.checkpoint.whole import write_whole
from bd3_megatron.config.load import to_tree
from bd3_megatron.config.objective import block_sizes
from bd3_megatron.config.schema import Config
from bd3_megatron.convert.folder import model_type_of
from bd3_megatron.convert.from_ar import MODEL_TYPES, ArSource, MaskInit, describe_as_bd3, read_ar_folder
from bd3_megatron.convert.from_checkpoint import checked_difference
from bd3_megatron.convert.layerwise import NUM_BLOCKS, parallel_logits, plain_logits, proof_span, random_tokens
from bd3_megatron.convert.name_table import NameTable
from bd3_megatron.convert.plain_config import MIXTURE_FIELDS, mixture_fields
from bd3_megatron.convert.plain_source import FolderSource, PlainSource
from bd3_megatron.convert.to_hf import check_ids, checked_shapes
from bd3_megatron.convert.upcycle import upcycled
from bd3_megatron.data.tokenizer_fingerprint import check_same_tokenizer
from bd3_megatron.data.tokenizer_open import check_folder_tokenizer
from bd3_megatron.diffusion.objective import objective_named
from bd3_megatron.errors import ConversionError
from bd3_megatron.hf.configuration_bd3 import BD3Config
from bd3_megatron.sampling.folder import MODEL_TYPE, read_config

MODEL_FIELDS = {
    "style": "style",
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_width",
    "intermediate_size": "ffn_width",
    "qk_norm": "qk_norm",
    "tie_word_embeddings": "tie_embeddings",
    "layer_norm_eps": "layer_norm_eps",
    "rope_theta": "rope_base",
    "partial_rotary_factor": "rotary_fraction",
}
"""BD3Config's fields, and what our ModelConfig calls them."""
KEYS = {"kv_heads": "num_kv_heads", "head_width": "head_dim", "ffn_width": "ffn_hidden_size"}
"""Derived properties of ModelConfig, and the keys a file sets."""


@dataclass(frozen=True, kw_only=True)
class StartReport:
    """What was written, for people."""

    path: Path
    model_type: str
    num_parameters: int
    max_logit_difference: float


def start_run(
    folder: Path,
    config: Config,
    *,
    vocab_size: int,
    mask_id: int | None,
    mask_init: MaskInit = "mean",
    upcycle_noise: float | None = None,
    tokenizer: tuple[str, str] | None = None,
) -> StartReport:
    """Write step 0 of a run from a folder's weights.

    Args:
        folder: exported by us, or a Qwen3, Qwen2.5, Llama or SDAR folder.
        config: the run to come.
        vocab_size: V of the run (of its data, or model.vocab_size), mask id included.
        mask_id: of the run; None for objective ar.
        mask_init: how the mask's row is made of a model that has none.
        upcycle_noise: make the run's experts of the MLPs of a dense folder, each copy with noise of so many times the standard
            deviation of its weights; None: the folder must have the run's experts.
        tokenizer: (fingerprint, what it belongs to) of the run's data; None: not compared.

    Raises:
        ConversionError, CheckpointError: see the module.
        TokenizerError: the folder's tokenizer is not the data's, or its special ids collide.
    """
    # First, because it is the mistake that no shape check finds.
    check_folder_tokenizer(folder, tokenizer)
    checkpoints = Path(config.run.dir) / "checkpoints"
    # Beside later steps, step 0 would never be resumed from.
    if checkpoint_folders(checkpoints):
        raise ConversionError(f"{checkpoints} holds checkpoints already; name a new run.dir, or remove them first.")
    described, source, origin = open_source(folder, config, vocab_size=vocab_size, mask_id=mask_id, mask_init=mask_init)
    if tokenizer is not None and described.tokenizer_fingerprint is not None:
        # a folder without tokenizer files still says which one its model learned
        check_same_tokenizer((described.tokenizer_fingerprint, f"the model in {folder}"), tokenizer)
    check_ids(described, str(folder))
    dense = None
    if upcycle_noise is not None:
        dense = (described, source)
        described, source = upcycled(described, source, config, noise=upcycle_noise)
        origin |= {"upcycle_noise": upcycle_noise}
    refuse_other_shape(described, config)
    table = NameTable(config.model, vocab_size)
    plain_shapes = checked_shapes(source, described)
    shapes = _parallel_shapes(table, plain_shapes)

    def produce(name: str) -> Tensor:
        return table.to_parallel(name, {plain: source.tensor(plain).float() for plain in table.plain_names(name)})

    path = checkpoints / step_name(0)
    proof: list[float] = []

    def prove(folder: Path) -> None:
        proof.append(_prove(folder, config, source, described))
        # of the folder itself too, and not only of what was made of it
        if dense is not None and not upcycle_noise:
            proof.append(_prove(folder, config, dense[1], dense[0]))

    write_whole(
        path,
        _manifest(config, vocab_size, mask_id, origin),
        shapes,
        produce,
        check=prove,
    )
    return StartReport(
        path=path,
        model_type=str(origin["model_type"]),
        num_parameters=sum(math.prod(shape) for shape in plain_shapes.values()),
        max_logit_difference=max(proof),
    )


def check_source(folder: Path) -> str:
    """`model_type` of a folder that a run can start from; quick, so that nothing is prepared in vain.

    Raises:
        ConversionError: no such folder, or a model of another kind.
    """
    model_type = model_type_of(folder)
    if model_type not in (MODEL_TYPE, *MODEL_TYPES):
        raise ConversionError(
            f"{folder} holds model_type={model_type!r}; this starts from {', '.join((MODEL_TYPE, *MODEL_TYPES))}."
        )
    return model_type


def open_source(
    folder: Path, config: Config, *, vocab_size: int, mask_id: int | None, mask_init: MaskInit
) -> tuple[BD3Config, PlainSource, dict[str, object]]:
    """Configuration and tensors of a folder as the run will have them, and where they came from."""
    if check_source(folder) == MODEL_TYPE:
        described = read_config(folder)
        # Our own folders are taken as they are: their rows, the mask's among them, are trained.
        if (described.vocab_size, described.mask_token_id) != (vocab_size, mask_id):
            raise ConversionError(
                f"{folder} has {described.vocab_size} ids and mask {described.mask_token_id}, the run's data has {vocab_size} "
                f"and {mask_id}; prepare the data with the folder's tokenizer."
            )
        origin: dict[str, object] = {"model_type": MODEL_TYPE, "logit_alignment": described.logit_alignment}
        return described, FolderSource(folder), origin
    foreign = read_ar_folder(folder)
    described = describe_as_bd3(
        foreign,
        vocab_size=vocab_size,
        mask_id=mask_id,
        block_size=block_sizes(config)[0],
        length=config.data.seq_len,
        objective=config.diffusion.objective,
    )
    # A model that was trained with this mask has a row worth keeping.
    keep = foreign.mask_id is not None and foreign.mask_id == mask_id
    source = ArSource(foreign, described, mask_init="keep" if keep else mask_init, seed=config.run.seed)
    return (
        described,
        source,
        {
            "model_type": foreign.model_type,
            "logit_alignment": foreign.logit_alignment,
            "mask_row": "kept" if keep else mask_init,
        },
    )


def refuse_other_shape(described: BD3Config, config: Config) -> None:
    """Refuse a model section that does not describe the source.

    Raises:
        ConversionError: lists every key with the value to set.
    """
    wrong = []
    for theirs, ours in MODEL_FIELDS.items():
        wanted, given = getattr(described, theirs), getattr(config.model, ours)
        if wanted != given:
            # Every key at once: the section can be mended in one go.
            wrong.append(f"model.{KEYS.get(ours, ours)}={wanted} (is {given})")
    wanted_mixture = {field: getattr(described, field) for field in MIXTURE_FIELDS}
    given_mixture = mixture_fields(config.model)
    for field, wanted in wanted_mixture.items():
        # how many are chosen, and how, says nothing of a dense model
        if wanted != given_mixture[field] and (described.num_experts or given_mixture["num_experts"]):
            wrong.append(f"in model.experts {MIXTURE_FIELDS[field]}={wanted} (is {given_mixture[field]})")
    if wrong:
        raise ConversionError(f"the model section does not describe the source; set {', '.join(wrong)}.")


def _parallel_shapes(table: NameTable, plain: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for name in table.parallel_names():
        # Shapes are joined by the same code as the tensors.
        with torch.device("meta"):
            parts = {key: torch.empty(plain[key]) for key in table.plain_names(name)}
        shapes[name] = tuple(table.to_parallel(name, parts).shape)
    return shapes


def _manifest(config: Config, vocab_size: int, mask_id: int | None, origin: dict[str, object]) -> Manifest:
    return Manifest(
        step=0,
        samples_consumed=0,
        grid={"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "dp": 1},
        zero_stage=1,
        world_size=1,
        config=to_tree(config),
        git_commit=source_commit(),
        seeds={"run": config.run.seed},
        vocab_size=vocab_size,
        mask_id=mask_id,
        # A run at step 0 has done nothing: the trainer's defaults hold.
        train_state={},
        software=software_versions(),
        origin=origin,
    )


def _prove(path: Path, config: Config, source: PlainSource, described: BD3Config) -> float:
    span = proof_span(described.objective, described.block_size)
    noisy_BL = random_tokens(described.vocab_size, NUM_BLOCKS * span)
    clean_BL = (
        random_tokens(described.vocab_size, NUM_BLOCKS * span, seed=2)
        if objective_named(described.objective).has_noise
        else None
    )
    # Of the source as it was read, not of the checkpoint: a wrong name table would agree with itself.
    there = plain_logits(source, described, noisy_BL, clean_BL, span=span)
    reader = open_checkpoint(path)
    here = parallel_logits(reader.tensor, config.model, noisy_BL, clean_BL, span=span, vocab_size=described.vocab_size)
    return checked_difference(there, here, "the checkpoint and its source")
