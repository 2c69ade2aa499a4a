"""Files of an exported folder, read strictly.

Decides what a folder must hold to be sampled from: config.json of model type bd3 and undamaged safetensors (one file,
or shards with their index). Tensors come as stored, on the CPU. Whether the weights are the configuration's is the
caller's question.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bd3_megatron.data.tokenizer_open import check_folder_tokenizer
from bd3_megatron.errors import CheckpointError, cut, shown
from bd3_megatron.files import read_json
from bd3_megatron.hf.configuration_bd3 import BD3Config

MODEL_TYPE = "bd3"


def read_export_json(path: Path) -> dict[str, Any]:
    """A JSON object of an exported folder.

    Raises:
        CheckpointError: the file is missing or is not a JSON object.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give an exported model folder.")
    return read_json(path, "export the folder again", kind=CheckpointError)


def read_config(folder: Path) -> BD3Config:
    """config.json of an exported folder.

    Raises:
        CheckpointError: missing, damaged, of another model type, or with values that no model can have.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give an exported model folder.")
    described = read_export_json(folder / "config.json")
    model_type = described.pop("model_type", None)
    if model_type != MODEL_TYPE:
        raise CheckpointError(
            f"{folder} holds model_type={shown(model_type)}; expected {MODEL_TYPE!r}: official weights become such a folder "
            "with tools/import_official.py."
        )
    try:
        # The configuration's own checks decide what a model can be.
        return BD3Config(**described)
    except Exception as error:  # transformers, which reads fields of its own, raises many kinds
        raise CheckpointError(f"{folder / 'config.json'} is not a model's: {cut(str(error), 400)}") from None


def check_model_tokenizer(folder: Path, config: BD3Config) -> None:
    """Refuse a folder whose tokenizer is not the one that made the ids which its model learned.

    Raises:
        TokenizerError: they differ, or the tokenizer cannot be read.
    """
    recorded = config.tokenizer_fingerprint
    check_folder_tokenizer(folder, None if recorded is None else (recorded, f"the model's {folder / 'config.json'}"))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of model.safetensors, or of the shards that its index names.

    Raises:
        CheckpointError: a file is missing, damaged, or lacks a tensor that the index promises.
    """
    index_path = folder / "model.safetensors.index.json"
    if not index_path.exists():
        return read_safetensors(folder / "model.safetensors")
    weight_map = read_export_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index_path} has no weight_map; export the folder again.")
    state: dict[str, Tensor] = {}
    if not all(isinstance(file_name, str) for file_name in weight_map.values()):
        raise CheckpointError(f"{index_path} names files that are no text; export the folder again.")
    for file_name in sorted(set(weight_map.values())):
        # the name alone: an index must not lead out of the folder
        state |= read_safetensors(folder / Path(file_name).name)
    # Both ways: a shard from another export would bring tensors that nobody asked for.
    if set(state) != set(weight_map):
        raise CheckpointError(f"{folder} lacks tensors that its index names; copy the folder again, completely.")
    return state


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one file.

    Raises:
        CheckpointError: missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; copy the folder again, completely.")
    try:
        # safetensors hold data only; nothing in them can be executed.
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); copy or export the folder again.") from None
