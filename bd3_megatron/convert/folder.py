"""Folders that appear whole or not at all, and that never cost anybody a file of theirs.

An output folder is written under a temporary name and then renamed. One that is there already is replaced only if all
that it holds is what an export of that kind writes; one that another process is writing is refused.
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
from bd3_megatron.lease import held_output

WRITTEN_NAMES = frozenset(
    {
        *("config.json", "generation_config.json", "README.md", "model.safetensors.index.json"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt"),
        *("bd3_tokenizer.json", "chat_template.jinja", "chat_template.json", "configuration_sdar.py"),
        "configuration_llada2_moe.py",
    }
)
"""What exports write beside weights and the plain model's files; other tokenizer files are kept from replacement."""


def model_type_of(folder: Path) -> str | None:
    """`model_type` in a folder's config.json; None where there is no readable one."""
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return described.get("model_type") if isinstance(described, dict) else None


@contextmanager
def published(out: Path, *, model_type: str) -> Iterator[Path]:
    """A temporary folder that takes the name `out` when the body ends without an error.

    Args:
        out: the final name. An empty folder is replaced, and one of this `model_type` that an export wrote.
        model_type: what the new folder will be.

    Yields:
        The temporary folder, on the same disk.

    Raises:
        ConversionError: `out` is a file, or a folder that holds something else.
        FileError, LaunchError: it cannot be written.
        FolderHeldError: another process is writing it.
    """
    # One name for the lease and for the rename, however the folder was named.
    out = Path(os.path.abspath(out))
    with held_output(out):
        _check_replaceable(out, model_type)
        with whole(out, replace_folder=True) as staging:
            staging.mkdir()
            yield staging


def _check_replaceable(out: Path, model_type: str) -> None:
    if out.is_file():
        raise ConversionError(f"out={out} is a file; give a folder that does not exist yet.")
    there = sorted(out.iterdir()) if out.is_dir() else []
    # Of another kind: somebody's own model, perhaps the source itself.
    if there and model_type_of(out) != model_type:
        raise ConversionError(
            f"out={out} holds something that is not a {model_type} folder; give a new folder, or empty this one first."
        )
    # One file of a person's among ours is enough to refuse.
    excess = next((path.name for path in there if not _is_written(path)), None)
    if excess is not None:
        raise ConversionError(
            f"out={out} holds '{excess:.80}', which no export writes and replacing the folder would delete; "
            "give a new folder, or move that file away."
        )


def _is_written(path: Path) -> bool:
    if not path.is_file():
        return False
    is_weights = path.name.startswith("model") and path.suffix == ".safetensors"
    return is_weights or path.name in WRITTEN_NAMES or path.name.endswith("_bd3.py") or path.name == "philox.py"


def copy_files(source: Path, target: Path, wanted: Callable[[Path], bool]) -> list[str]:
    """Copy the plain files of one folder that are wanted; returns their names, sorted."""
    names = sorted(path.name for path in source.iterdir() if path.is_file() and wanted(path))
    for name in names:
        # The content only: modes and times of a cache folder are not the export's.
        shutil.copyfile(source / name, target / name)
    return names
