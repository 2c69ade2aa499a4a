"""What an engine would do wrongly with a model folder, as far as the folder's files tell.

Each check asks for one assumption of an engine (architecture, mask id, block size, logit alignment, visibility, tables,
tokenizer). An error is what the engine would compute wrongly or refuse; a remark is a setting to give it. Nothing is loaded
or run, so that no answer says that an engine serves the folder well.
Source: SGLang python/sglang/srt/dllm/config.py (DLLM_PARAMS), LMDeploy lmdeploy/pytorch/configurations/sdar.py,
JetEngine's reading of config.json, transformers' loading of remote code; as read in late 2025.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bd3_megatron.convert.from_ar import EMBED_TOKENS, LM_HEAD
from bd3_megatron.convert.layerwise import TABLE_ROWS
from bd3_megatron.convert.plain_source import FolderSource
from bd3_megatron.convert.sdar import SDAR_MASK_ID
from bd3_megatron.convert.to_hf import is_tokenizer_file
from bd3_megatron.hf.plain_bd3 import predicts_next
from bd3_megatron.sampling.folder import read_export_json

Engine = Literal["sglang", "lmdeploy", "jetengine", "transformers"]
BLOCK_DIFFUSION = {"SDARForCausalLM": "sdar", "SDARMoeForCausalLM": "sdar_moe"}
"""Architectures that SGLang, LMDeploy and JetEngine serve as SDAR, and their model types."""
SDAR_BLOCK_SIZE = 4
"""SGLang's default for them."""


@dataclass(frozen=True)
class LintRemark:
    """One answer: `is_error` when the engine would serve the folder wrongly; the sentence says what to change."""

    is_error: bool
    sentence: str


def lint_folder(folder: Path, engine: Engine) -> list[LintRemark]:
    """Everything that the files say about serving `folder` with `engine`.

    Raises:
        CheckpointError: the folder has no readable config.json or weights.
    """
    # Only config.json must be there; everything else may be what is wrong.
    config = read_export_json(folder / "config.json")
    weights = FolderSource(folder)
    checks: list[Callable[[], Iterator[LintRemark]]] = [
        lambda: _vocabulary(config, weights),
        lambda: _tied_tables(config, weights),
        lambda: _tokenizer(folder, config),
    ]
    if engine == "transformers":
        checks.append(lambda: _remote_code(folder, config))
    else:
        checks += [lambda: _architecture(config, engine), lambda: _mask(folder, config, engine)]
        checks += [lambda: _blocks(config, engine), lambda: _meaning(config, engine)]
        checks += [lambda: _unused_rows(folder, config, weights)]
    return [answer for check in checks for answer in check()]


def _architecture(config: dict[str, Any], engine: Engine) -> Iterator[LintRemark]:
    name, model_type = (config.get("architectures") or ["none"])[0], config.get("model_type")
    # Both: SGLang chooses the class by architecture, transformers the configuration by model_type.
    if name not in BLOCK_DIFFUSION or model_type != BLOCK_DIFFUSION[name]:
        yield LintRemark(
            True,
            f"architecture {name} with model_type={model_type} is not served as block diffusion by {engine}, which takes "
            "SDARForCausalLM with sdar; write the folder with tools/convert_checkpoint.py --layout sdar.",
        )
    auto_map = config.get("auto_map")
    if engine == "jetengine" and not (isinstance(auto_map, dict) and "AutoConfig" in auto_map):
        yield LintRemark(
            True,
            "config.json has no auto_map with AutoConfig, and JetEngine asks transformers for the configuration; write the "
            "folder with --layout sdar.",
        )


def _mask(folder: Path, config: dict[str, Any], engine: Engine) -> Iterator[LintRemark]:
    mask_id = config.get("mask_token_id")
    if engine == "jetengine":
        yield LintRemark(False, f"give JetEngine mask_token_id={mask_id}, or it takes the tokenizer's mask.")
    elif mask_id is None:
        yield LintRemark(
            True, f"config.json names no mask_token_id; {engine} masks with {SDAR_MASK_ID}: is that the model's?"
        )
    elif mask_id != SDAR_MASK_ID:
        yield LintRemark(
            True,
            f"mask_token_id={mask_id}, but {engine} masks with {SDAR_MASK_ID} whatever the folder says; "
            "write it with --layout sdar --remap-mask, or serve it with JetEngine.",
        )


def _blocks(config: dict[str, Any], engine: Engine) -> Iterator[LintRemark]:
    block_size = config.get("block_size")
    if block_size is None:
        yield LintRemark(True, "config.json names no block_size; the engine's default may not be the trained one.")
    elif engine == "sglang" and block_size != SDAR_BLOCK_SIZE:
        yield LintRemark(
            False,
            f"give SGLang --dllm-algorithm-config with `block_size: {block_size}`; its default is {SDAR_BLOCK_SIZE}.",
        )
    elif engine == "lmdeploy":
        yield LintRemark(False, f"give LMDeploy --dllm-block-length {block_size}.")
    elif engine == "jetengine":
        yield LintRemark(False, f"give JetEngine block_length={block_size}.")


def _meaning(config: dict[str, Any], engine: Engine) -> Iterator[LintRemark]:
    # What these engines compute whatever a folder says; a field that is absent means the same.
    expected = {"logit_alignment": "none", "prefix_attention": "block_causal", "block_grid": "absolute"}
    for field, wanted in expected.items():
        given = config.get(field, wanted)
        if given != wanted:
            yield LintRemark(
                True, f"{field}={given}, but {engine} computes {wanted}; the folder cannot be served with it."
            )
    if predicts_next(config.get("objective", "block")):
        yield LintRemark(
            True, "objective=ar: an autoregressive model; serve it as Qwen3 (--layout qwen3), not as block diffusion."
        )


def _unused_rows(folder: Path, config: dict[str, Any], weights: FolderSource) -> Iterator[LintRemark]:
    """Rows of the output table without a token: an engine that samples from all rows draws those whose logit is 0."""
    if LM_HEAD not in weights.names():
        return
    zeros, rows = 0, weights.shape(LM_HEAD)[0]
    for start in range(0, rows, TABLE_ROWS):
        # Read in parts, for a table may be larger than memory.
        zeros += int((weights.rows(LM_HEAD, start, min(start + TABLE_ROWS, rows)) == 0).all(dim=1).sum())
    if zeros:
        yield LintRemark(
            True,
            f"{zeros} rows of {LM_HEAD} are zero: their logit is 0 and engines sample them; write the folder with "
            "--layout sdar, which makes such rows silent.",
        )
    size = _tokenizer_size(folder)
    if size is not None and size < rows:
        yield LintRemark(
            False,
            f"{rows - size} rows of {LM_HEAD} are of no token; whether their logits are low was not computed here "
            "(--layout sdar checks it when it writes a folder).",
        )


def _vocabulary(config: dict[str, Any], weights: FolderSource) -> Iterator[LintRemark]:
    vocab_size, mask_id = config.get("vocab_size"), config.get("mask_token_id")
    for name in (EMBED_TOKENS, LM_HEAD):
        if name in weights.names() and weights.shape(name)[0] != vocab_size:
            yield LintRemark(
                True,
                f"{name} has {weights.shape(name)[0]} rows, config.json says vocab_size={vocab_size}; make them equal.",
            )
    if isinstance(mask_id, int) and isinstance(vocab_size, int) and not 0 <= mask_id < vocab_size:
        yield LintRemark(
            True, f"mask_token_id={mask_id} lies outside the vocabulary of {vocab_size}; pad the tables beyond it."
        )


def _tied_tables(config: dict[str, Any], weights: FolderSource) -> Iterator[LintRemark]:
    tied, has_head = bool(config.get("tie_word_embeddings", False)), LM_HEAD in weights.names()
    if EMBED_TOKENS not in weights.names():
        yield LintRemark(True, f"the weights lack {EMBED_TOKENS}; names are not those of Qwen3.")
    if not tied and not has_head:
        yield LintRemark(
            True,
            f"tie_word_embeddings=false, but {LM_HEAD} is missing: nothing can be computed; set it to true if they are one.",
        )
    if tied and has_head:
        yield LintRemark(
            True,
            f"tie_word_embeddings=true, but {LM_HEAD} is stored too: engines differ in which they take; remove one.",
        )


def _tokenizer(folder: Path, config: dict[str, Any]) -> Iterator[LintRemark]:
    path = folder / "tokenizer.json"
    if not path.is_file():
        # A slow tokenizer's files may serve; none at all cannot.
        others = any(is_tokenizer_file(p) and p.name.startswith("tokenizer") for p in folder.iterdir() if p.is_file())
        yield LintRemark(not others, "the folder has no tokenizer.json; copy the tokenizer's files into it.")
        return
    try:
        ids = _tokenizer_ids(path)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        yield LintRemark(True, f"tokenizer.json cannot be read ({error!s:.100}); copy it again.")
        return
    vocab_size, mask_id = config.get("vocab_size"), config.get("mask_token_id")
    largest = max((i for i in ids if i != mask_id), default=-1)
    if isinstance(vocab_size, int) and largest >= vocab_size:
        yield LintRemark(True, f"the tokenizer has an id {largest}, the model {vocab_size} rows; pad the tables.")
    if isinstance(mask_id, int) and not ids.get(mask_id, False):
        yield LintRemark(
            False, f"id {mask_id} is no special token of the tokenizer: decode with the mask left out, or add it."
        )


def _tokenizer_ids(path: Path) -> dict[int, bool]:
    """Every id of a tokenizer.json, and whether it is an added token's."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    pieces = tree["model"]["vocab"]
    # Unigram vocabularies are lists, in which a piece's position is its id.
    ids = range(len(pieces)) if isinstance(pieces, list) else pieces.values()
    return {int(i): False for i in ids} | {int(token["id"]): True for token in tree.get("added_tokens", [])}


def _tokenizer_size(folder: Path) -> int | None:
    try:
        return len(_tokenizer_ids(folder / "tokenizer.json"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        # said by _tokenizer
        return None


def _remote_code(folder: Path, config: dict[str, Any]) -> Iterator[LintRemark]:
    auto_map = config.get("auto_map")
    if not isinstance(auto_map, dict) or not any(str(name).startswith("AutoModel") for name in auto_map):
        if config.get("model_type") in ("bd3", "sdar"):
            remedy = "export the folder again" if config["model_type"] == "bd3" else "add SDAR's own modelling files"
            yield LintRemark(
                True, f"config.json has no auto_map with a model: transformers cannot find its class; {remedy}."
            )
        return
    missing: set[str] = set()
    waiting = {f"{str(target).split('.')[0]}.py" for target in auto_map.values()}
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        path = folder / name
        if not path.is_file():
            missing.add(name)
            continue
        # transformers fetches exactly the files that relative imports name, one level after the other.
        imported = re.findall(r"^\s*from \.(\w+) import", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        waiting |= {f"{module}.py" for module in imported} - seen
    for name in sorted(missing):
        yield LintRemark(
            True, f"{name} is named by auto_map or imported from there, and missing; export the folder again."
        )
    if not missing:
        yield LintRemark(False, "load it with trust_remote_code=True.")


def has_errors(answers: list[LintRemark]) -> bool:
    """Whether the engine would do something wrongly, as far as the files tell."""
    return any(answer.is_error for answer in answers)
