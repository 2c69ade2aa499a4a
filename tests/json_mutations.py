"""JSON changed at random, as a foreign, damaged or hand-edited file might hold it."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

from bd3_megatron.errors import SENTENCE_CHARACTERS, BD3Error

VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 3, 2**31, 2**63, 10**30, 10**400, 1.5, -0.0, 1e300, float("nan"), float("inf")),
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


def num_refused(original: dict[str, Any], seed: str, count: int, read: Callable[[dict[str, Any]], object]) -> int:
    """Hand mutations to a reader that must take them or refuse them in one sentence.

    Returns:
        How many it refused.

    Raises:
        AssertionError: another error, or a sentence that is too long; names the mutation.
    """
    refused = 0
    for number in range(count):
        tree = mutated(original, random.Random(f"{seed}/{number}"))
        try:
            read(tree)
        except BD3Error as error:
            said = str(error)
            assert len(said) <= SENTENCE_CHARACTERS and "\n" not in said, (number, said)
            refused += 1
        except Exception as error:
            changed = sorted(key for key in {*original, *tree} if original.get(key) != tree.get(key))
            raise AssertionError(f"mutation {number} of {changed}: {type(error).__name__}: {error}") from error
    return refused
