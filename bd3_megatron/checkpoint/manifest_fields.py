"""What every field of a manifest may hold, and of a rank's sidecar: files that may come from outside.

A field of the wrong type or beyond its bounds is refused in one sentence that names it, its law and its value; nothing is
allocated, opened or counted before its field is checked. Knows nothing of meanings beyond that.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bd3_megatron.errors import CheckpointError

SHARDED_KIND, WHOLE_KIND = "sharded", "whole"
"""Kinds of checkpoints: written by a run, cut over its ranks; or weights only, parameter by parameter."""

GRID_SIZES = ("tp", "pp", "vpp", "cp", "dp")
MAX_COUNT = 2**53
"""Steps, samples, bytes and elements: what a float64 of a record still tells apart."""
# Bounds far beyond any run, so that a hostile number cannot make a reader allocate or loop for long.
MAX_RANKS = 2**20
MAX_ROWS = 2**31
MAX_TEXT = 4096
_DIGEST = re.compile(r"[0-9a-f]{64}")
# No slash: a sidecar may not lead a reader out of the checkpoint's folder.
_STATE_FILE = re.compile(r"\w[\w.-]*\.pt")
# Global names as ParallelModel gives them; they become names of folders in the universal form.
_PARAMETER = re.compile(r"(embedding|output_layer)\.[\w.]+|decoder\.(layers\.\d{1,6}\.)?[\w.]+")


def is_count(value: Any, low: int = 0, high: int = MAX_COUNT) -> bool:
    """Whether it is a whole number in [low, high]; true and false are none."""
    # isinstance would accept true, which Python counts as 1.
    return type(value) is int and low <= value <= high


def _is_number(value: Any) -> bool:
    # JSON as Python reads it may hold NaN and Infinity.
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= MAX_COUNT


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT


def _all_values(law: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(law(inner) for inner in value.values())


def _is_grid(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) - {"ep"} == set(GRID_SIZES)
        and all(is_count(n, 1, MAX_RANKS) for n in value.values())
    )


def _is_seed(value: Any) -> bool:
    return is_count(value, -MAX_COUNT)


def _is_configuration(value: Any) -> bool:
    return isinstance(value, dict) and "model" in value and all(isinstance(part, dict) for part in value.values())


def _is_train_state(value: Any) -> bool:
    # the trainer's own, but for what exports rely on
    if not isinstance(value, dict):
        return False
    size, tokenizer = value.get("block_size"), value.get("tokenizer")
    return (size is None or is_count(size, 1, MAX_ROWS)) and (tokenizer is None or _is_tokenizer(tokenizer))


def _is_tokenizer(value: Any) -> bool:
    ids = {name: inner for name, inner in value.items() if name != "fingerprint"} if isinstance(value, dict) else None
    if ids is None or not isinstance(value.get("fingerprint"), str) or not _DIGEST.fullmatch(value["fingerprint"]):
        return False
    return all(inner is None or is_count(inner, 0, MAX_ROWS) for inner in ids.values())


def _is_file_record(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {"bytes", "sha256"}:
        return False
    return is_count(value["bytes"]) and isinstance(value["sha256"], str) and bool(_DIGEST.fullmatch(value["sha256"]))


MANIFEST_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "version": (lambda v: is_count(v, 1), "a whole number from 1"),
    "step": (is_count, "a whole number from 0 to 2**53"),
    "samples_consumed": (is_count, "a whole number from 0 to 2**53"),
    "grid": (_is_grid, f"sizes from 1 to 2**20 of the axes {', '.join(GRID_SIZES)}"),
    "zero_stage": (lambda v: is_count(v, 0, 3), "0, 1, 2 or 3"),
    "world_size": (lambda v: is_count(v, 1, MAX_RANKS), "a whole number from 1 to 2**20"),
    "config": (_is_configuration, "sections of settings, model among them"),
    "git_commit": (lambda v: v is None or _is_text(v), "text or nothing"),
    "seeds": (lambda v: _all_values(_is_seed)(v) and "run" in v, "whole numbers by name, that of the run among them"),
    "vocab_size": (lambda v: is_count(v, 1, MAX_ROWS), "a whole number from 1 to 2**31"),
    "mask_id": (lambda v: v is None or is_count(v, 0, MAX_ROWS), "an id of the vocabulary or nothing"),
    "train_state": (_is_train_state, "values by name, with a block_size from 1 and a tokenizer of ids and SHA-256"),
    "engine": (_all_values(lambda v: v is None or (_is_number(v) and v >= 0)), "numbers from 0 by name"),
    "software": (_all_values(_is_text), "versions by name"),
    "evaluation": (lambda v: isinstance(v, dict), "values by name"),
    "origin": (lambda v: isinstance(v, dict), "values by name"),
    "kind": (lambda v: v in (SHARDED_KIND, WHOLE_KIND), f"{SHARDED_KIND} or {WHOLE_KIND}"),
    "files": (lambda v: _all_values(_is_file_record)(v) and len(v) > 0, "size and SHA-256 of one file or more"),
}
"""Law of each field, and how a refusal states it."""

SIDECAR: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rank": (lambda v: is_count(v, 0, MAX_RANKS), "a whole number from 0"),
    "tp_rank": (lambda v: is_count(v, 0, MAX_RANKS), "a whole number from 0"),
    "ep_rank": (lambda v: is_count(v, 0, MAX_RANKS), "a whole number from 0"),
    "pp_rank": (lambda v: is_count(v, 0, MAX_RANKS), "a whole number from 0"),
    "biases": (
        lambda v: isinstance(v, list) and all(_is_text(n) and is_parameter_name(n) for n in v),
        "parameter names",
    ),
    "state_file": (lambda v: isinstance(v, str) and bool(_STATE_FILE.fullmatch(v)), "the name of a .pt file"),
    "zero_stage": (lambda v: is_count(v, 0, 3), "0, 1, 2 or 3"),
    "kinds": (lambda v: isinstance(v, list) and all(_is_text(kind) for kind in v), "a list of names"),
    "shapes": (lambda v: isinstance(v, dict) and all(map(_is_shape, v.items())), "shapes of parameters by name"),
    "pieces": (lambda v: isinstance(v, list) and all(map(_is_piece, v)), "a list of [name and four whole numbers]"),
}
"""Law of each field of a rank's sidecar that readers use, and how a refusal states it."""

YOUNGER_FIELDS: dict[str, Any] = {"ep_rank": 0, "biases": []}
"""What sidecars do not say that were written before models had experts."""


def _is_shape(item: tuple[str, Any]) -> bool:
    name, shape = item
    if not is_parameter_name(name) or not isinstance(shape, list) or len(shape) > 3:
        return False
    return all(is_count(n, 1, MAX_ROWS) for n in shape)


def _is_piece(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 5 or not isinstance(value[0], str):
        return False
    return all(is_count(number) for number in value[1:])


def is_parameter_name(name: str) -> bool:
    """Whether a model could have a parameter of that global name."""
    return bool(_PARAMETER.fullmatch(name))


def check_manifest(tree: Mapping[str, Any], path: Path) -> None:
    """Refuse a manifest with a field that is absent, unknown or not lawful, or with two that contradict each other.

    Args:
        tree: the manifest's JSON, fields with defaults filled in.
        path: of the manifest, for the sentence.

    Raises:
        CheckpointError: the first such field.
    """
    _check_fields(tree, MANIFEST_FIELDS, path)
    _check_agreement(tree, path)
    grid, ranks = tree["grid"], tree["world_size"]
    # vpp cuts a rank's own layers and adds no ranks.
    product = grid["tp"] * grid["pp"] * grid["cp"] * grid["dp"]
    if product != ranks:
        raise CheckpointError(
            f"{path}: world_size={ranks} is not tp*pp*cp*dp={product} of its grid; use another checkpoint."
        )
    if tree["mask_id"] is not None and tree["mask_id"] >= tree["vocab_size"]:
        raise CheckpointError(
            f"{path}: mask_id={tree['mask_id']} lies outside the vocabulary of {tree['vocab_size']}; use another checkpoint."
        )


def _check_agreement(tree: Mapping[str, Any], path: Path) -> None:
    """Refuse numbers that are written down twice and differ: hand-edited, or put together from two checkpoints."""
    config, state = tree["config"], tree["train_state"]
    step, samples = tree["step"], tree["samples_consumed"]
    twice = [
        ("seeds.run", tree["seeds"]["run"], "config.run.seed", config.get("run", {}).get("seed")),
        ("step", step, "train_state.step", state.get("step")),
        ("samples_consumed", samples, "train_state.samples_consumed", state.get("samples_consumed")),
    ]
    # weights that were imported or averaged were cut over no grid
    if tree["kind"] == "sharded":
        sizes = config.get("parallel", {})
        twice += [
            (f"grid.{axis}", size, f"config.parallel.{axis}", sizes.get(axis)) for axis, size in tree["grid"].items()
        ]
    for name, value, other, found in twice:
        if found is not None and found != value:
            raise CheckpointError(f"{path}: {name}={value} and {other}={_short(found)} differ; use another checkpoint.")
    # every update takes a sample at least, and only updates take any
    if tree["kind"] == "sharded" and (samples < step or (step == 0) != (samples == 0)):
        raise CheckpointError(
            f"{path}: samples_consumed={samples} cannot be after step={step}, since an update takes one sample or more; "
            "use another checkpoint."
        )


def check_sidecar(tree: Mapping[str, Any], path: Path) -> None:
    """Refuse a sidecar with a field that is absent or not lawful.

    Raises:
        CheckpointError: the first such field.
    """
    _check_fields({**YOUNGER_FIELDS, **tree}, SIDECAR, path)
    unknown = next((piece[0] for piece in tree["pieces"] if piece[0] not in tree["shapes"]), None)
    if unknown is not None:
        raise CheckpointError(f"{path}: a piece names '{unknown:.80}', which has no shape; use another checkpoint.")


def _check_fields(tree: Mapping[str, Any], laws: Mapping[str, tuple[Callable[[Any], bool], str]], path: Path) -> None:
    for name, (law, words) in laws.items():
        if name not in tree:
            raise CheckpointError(f"{path} lacks the field {name}; use another checkpoint.")
        if not law(tree[name]):
            raise CheckpointError(f"{path}: {name}={_short(tree[name])} must be {words}; use another checkpoint.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
