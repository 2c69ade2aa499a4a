"""Folders that appear whole or not at all.

Decides how a converted folder is published: written under a temporary name beside its place, flushed to disk, then
renamed. Refuses to replace a folder that is not one of ours, so that a mistyped path never costs anybody their files.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bd3_megatron.errors import ConversionError
from bd3_megatron.files import whole


def model_type_of(folder: Path) -> str | None:
    """`model_type` in a folder's config.json; None where there is no readable one."""
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return described.get("model_type") if isinstance(described, dict) else None


@contextmanager
def published(out: Path, *, model_type: str) -> Iterator[Path]:
    """A temporary folder that takes the place of `out` when the body ends without an error.

    Args:
        out: the final place. An empty folder, or one whose config.json has this `model_type`, is replaced.
        model_type: what the new folder will be.

    Yields:
        The temporary folder, on the same disk.

    Raises:
        ConversionError: `out` is a file, or a folder of something else.
    """
    out = Path(os.path.abspath(out))
    _check_replaceable(out, model_type)
    with whole(out, replace_folder=True) as staging:
        staging.mkdir()
        yield staging


def _check_replaceable(out: Path, model_type: str) -> None:
    if out.is_file():
        raise ConversionError(f"out={out} is a file; give a folder that does not exist yet.")
    if out.is_dir() and any(out.iterdir()) and model_type_of(out) != model_type:
        raise ConversionError(
            f"out={out} holds something that is not a {model_type} folder; give a new folder, or empty this one first."
        )


def copy_files(source: Path, target: Path, wanted: Callable[[Path], bool]) -> list[str]:
    """Copy the plain files of one folder that are wanted; returns their names, sorted."""
    names = sorted(path.name for path in source.iterdir() if path.is_file() and wanted(path))
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names
