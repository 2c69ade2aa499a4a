"""Read an exported folder back: configuration and plain state, as stored, on the CPU.

Refuses a folder that is not ours, a damaged weight file, and weights that are not exactly the configuration's. The bytes
are read by sampling/folder; here their meaning is checked.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from bd3_megatron.convert.plain_source import StateSource
from bd3_megatron.convert.to_hf import checked_shapes
from bd3_megatron.hf.configuration_bd3 import BD3Config
from bd3_megatron.sampling.folder import read_config, read_weights


def read_folder(path: Path | str) -> tuple[BD3Config, dict[str, Tensor]]:
    """Configuration and weights of an exported folder.

    Args:
        path: a folder written by `write_folder`.

    Returns:
        The configuration, and the state under plain names (no `lm_head.weight` when tied) in its stored dtype.

    Raises:
        CheckpointError: the folder, its config.json or its weights are missing or damaged.
        ConversionError: the weights are not those of the configuration.
    """
    folder = Path(path)
    config = read_config(folder)
    state = read_weights(folder)
    if config.tie_word_embeddings:
        # Some writers store the tied table twice; the embedding's is the one that counts.
        state.pop("lm_head.weight", None)
    checked_shapes(StateSource(state), config)
    return config, state
