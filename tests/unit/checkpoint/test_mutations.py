"""A checkpoint whose JSON was changed at random, checksums included, is read or refused in one sentence; it never crashes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bd3_megatron.checkpoint.layout import MANIFEST, rank_name, step_name
from bd3_megatron.checkpoint.read import open_checkpoint
from bd3_megatron.checkpoint.verify import problem_of
from bd3_megatron.convert.from_checkpoint import describe_model
from bd3_megatron.errors import SENTENCE_CHARACTERS
from bd3_megatron.train.resume import saved_run
from tests.json_mutations import num_refused
from tests.unit.checkpoint.conftest import publish_json

MANIFESTS, SIDECARS = 70, 40
"""Mutations of each."""


def read_all(folder: Path) -> None:
    """All that a reader of a foreign checkpoint does, short of training."""
    problem = problem_of(folder)
    if problem is not None:
        assert len(problem) <= SENTENCE_CHARACTERS and "\n" not in problem, problem
        return
    reader = open_checkpoint(folder)
    for kind in reader.kinds():
        for name in reader.names():
            reader.tensor(name, kind)
    config, _ = saved_run(folder, reader.manifest)
    describe_model(config, reader.manifest, None)


@pytest.mark.parametrize(("name", "count"), [(MANIFEST, MANIFESTS), (rank_name(1), SIDECARS)])
def test_a_changed_file_is_read_or_refused_in_one_sentence(name: str, count: int, checkpoints: Path) -> None:
    folder = checkpoints / step_name(2)
    original = json.loads((folder / name).read_text())

    def read(tree: dict[str, Any]) -> None:
        publish_json(folder, name, tree)
        read_all(folder)

    refused = num_refused(original, name, count, read)
    publish_json(folder, name, original)
    read_all(folder)
    assert problem_of(folder) is None and refused < count
