"""The layouts of other engines that an exported folder can be written in, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from bd3_megatron.convert.llada2 import write_llada2
from bd3_megatron.convert.plain_source import FolderSource
from bd3_megatron.convert.qwen3_layout import LayoutRequest, MaskPlace, write_qwen3
from bd3_megatron.convert.sdar import write_sdar
from bd3_megatron.convert.to_hf import check_ids, checked_shapes
from bd3_megatron.sampling.folder import read_config

LAYOUTS: Mapping[str, Callable[[LayoutRequest], list[str]]] = {
    "sdar": write_sdar,
    "llada2": write_llada2,
    "qwen3": write_qwen3,
}
"""What writes each; returns what the user must know."""


def export_layout(
    folder: Path,
    out: Path,
    layout: str,
    *,
    mask: MaskPlace | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> list[str]:
    """Write an exported folder in another engine's layout.

    Args:
        folder: an exported folder of ours.
        out: the folder to write.
        layout: one of LAYOUTS.
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
    request = LayoutRequest(folder=folder, config=config, source=source, shapes=shapes, out=out, mask=mask, dtype=dtype)
    return LAYOUTS[layout](request)
