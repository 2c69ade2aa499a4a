"""The held-out rows of each part of a mixture, so that a run tells on which text it gets better.

Contract: a part's rows are cut by the run's own convention, as `bd3 evaluate RUN --data PART` cuts them. A part whose rows
another part may train on, or that holds none, is left out of the evaluation with a sentence, never silently.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bd3_megatron.data.convention import EvaluationConvention
from bd3_megatron.data.loader import TokenDataset, check_held_out
from bd3_megatron.data.shard_header import HEADER_FILE
from bd3_megatron.data.shards import TokenShards
from bd3_megatron.errors import BD3Error


@dataclass(frozen=True)
class HeldOutSources:
    """What is held out of a mixture, part by part."""

    rows: Mapping[str, TokenDataset] = field(default_factory=dict)
    """By the part's name; empty where there is no mixture of several."""
    left_out: tuple[str, ...] = ()
    """A sentence for each part that is not evaluated."""


def held_out_sources(
    folders: Sequence[str],
    convention: EvaluationConvention,
    trained: Sequence[TokenShards],
    *,
    seq_len: int,
    known: tuple[Path, TokenDataset] | None,
) -> HeldOutSources:
    """Open the held-out rows of every part.

    Args:
        folders: of the mixture, as the configuration names them.
        convention: of the run.
        trained: the splits that are trained on.
        seq_len: L.
        known: (folder, rows) of the run's own held-out split, which is not opened, nor scored, a second time.
    """
    if len(folders) < 2:
        return HeldOutSources()
    rows: dict[str, TokenDataset] = {}
    left_out = []
    for name, folder in zip(source_names(folders), map(Path, folders), strict=True):
        try:
            if known is not None and known[0].resolve() == folder.resolve():
                rows[name] = known[1]
            elif (folder / "valid" / HEADER_FILE).is_file():
                opened = convention.open_rows(folder / "valid", seq_len=seq_len)
                # a greater fraction here would count documents that another part trains on
                check_held_out(opened.sources[0].shards, trained)
                rows[name] = opened
            else:
                left_out.append(f"{name} is not evaluated by itself: it has no split valid")
        except BD3Error as error:
            left_out.append(f"{name} is not evaluated by itself: {error}")
    return HeldOutSources(rows, tuple(left_out))


def source_names(folders: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell the folders apart, one a folder."""
    parts = [Path(os.path.abspath(folder)).parts[1:] for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    # one folder under two spellings: the text as it was given differs
    return list(folders)
