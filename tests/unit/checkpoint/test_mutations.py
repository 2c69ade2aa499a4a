"""A checkpoint whose JSON was changed at random, checksums included, is read or refused in one sentence; it never crashes."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bd3_megatron.checkpoint.layout import MANIFEST, MANIFEST_DIGEST, digest_bytes, rank_name, step_name
from bd3_megatron.checkpoint.read import open_checkpoint
from bd3_megatron.checkpoint.verify import problem_of
from bd3_megatron.config.load import config_from_tree
from bd3_megatron.convert.from_checkpoint import describe_model
from bd3_megatron.errors import BD3Error

SEED = 17
MANIFESTS, SIDECARS = 70, 40
"""Mutations of each."""
LONGEST = 600
"""Characters of a sentence."""
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 3, 2**31, 2**63, 10**30, 1.5, -0.0, float("nan"), float("inf")),
    *("", "x", "../../etc/passwd", "\0", "a" * 5000, "\ud800"),
    *([], [[]], [1, 2], {}, {"a": {"b": []}}, [None] * 3),
)


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value in nested JSON."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from places(tree[key])


def mutated(tree: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """A copy with one value, shallow ones as often as deep ones, changed, removed or renamed."""
    tree = copy.deepcopy(tree)
    top = draw.choice(sorted(tree))
    inner = list(places(tree[top])) if isinstance(tree[top], dict | list) else []
    container, key = draw.choice(inner) if inner and draw.random() < 0.6 else (tree, top)
    way = draw.random()
    if way < 0.7:
        container[key] = draw.choice(VALUES)
    elif way < 0.85 or isinstance(container, list):
        del container[key]
    else:
        container[draw.choice(("other", "", "../x", "a" * 300))] = container.pop(key)
    return tree


def publish_json(folder: Path, name: str, tree: dict[str, Any]) -> None:
    """Replace one JSON file of a checkpoint as somebody would who also recomputes every checksum."""
    manifest = json.loads((folder / MANIFEST).read_text()) if name != MANIFEST else tree
    if name != MANIFEST:
        content = json.dumps(tree).encode()
        (folder / name).write_bytes(content)
        manifest["files"][name] = {"bytes": len(content), "sha256": digest_bytes(content)}
    content = json.dumps(manifest).encode()
    (folder / MANIFEST).write_bytes(content)
    (folder / MANIFEST_DIGEST).write_text(f"{digest_bytes(content)}\n")


def read_all(folder: Path) -> None:
    """All that a reader of a foreign checkpoint does, short of training."""
    problem = problem_of(folder)
    if problem is not None:
        assert len(problem) <= LONGEST and "\n" not in problem, problem
        return
    reader = open_checkpoint(folder)
    for kind in reader.kinds():
        for name in reader.names():
            reader.tensor(name, kind)
    describe_model(config_from_tree(reader.manifest.config), reader.manifest, None)


@pytest.mark.parametrize(("name", "count"), [(MANIFEST, MANIFESTS), (rank_name(1), SIDECARS)])
def test_a_changed_file_is_read_or_refused_in_one_sentence(name: str, count: int, checkpoints: Path) -> None:
    folder, draw = checkpoints / step_name(2), random.Random(SEED)
    original = json.loads((folder / name).read_text())
    refused = 0
    for number in range(count):
        tree = mutated(original, draw)
        publish_json(folder, name, tree)
        try:
            read_all(folder)
        except BD3Error as error:
            assert len(str(error)) <= LONGEST and "\n" not in str(error), (number, str(error))
            refused += 1
        except Exception as error:
            changed = sorted(key for key in {*original, *tree} if original.get(key) != tree.get(key))
            raise AssertionError(f"mutation {number} of {changed}: {type(error).__name__}: {error}") from error
    publish_json(folder, name, original)
    read_all(folder)
    assert problem_of(folder) is None and refused < count
