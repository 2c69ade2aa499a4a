"""Will this engine serve this folder rightly? Questions to a model folder, answered from its files alone.

Decides: what each engine assumes about a block-diffusion model (architecture, mask id, block size, logit alignment,
clean prefix, grid of blocks, vocabulary, tied tables), and what to change where the folder says otherwise. An error is
something the engine would do wrongly or refuse; a remark is a setting to give it. Nothing is loaded or run.
Source: SGLang python/sglang/srt/dllm/config.py (DLLM_PARAMS), LMDeploy lmdeploy/pytorch/configurations/sdar.py,
transformers' loading of remote code; as read in late 2025. Knows nothing of engines' later versions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bd3_megatron.convert.from_ar import EMBED_TOKENS, LM_HEAD
from bd3_megatron.convert.plain_source import FolderSource
from bd3_megatron.convert.sdar import SDAR_MASK_ID
from bd3_megatron.convert.to_hf import is_tokenizer_file
from bd3_megatron.hf.plain_bd3 import predicts_next
from bd3_megatron.sampling.folder import read_export_json

Engine = Literal["sglang", "lmdeploy", "transformers"]
SDAR_BLOCK_SIZE = 4
SERVED = {"sglang": ("SDARForCausalLM",), "lmdeploy": ("SDARForCausalLM",)}


@dataclass(frozen=True)
class LintRemark:
    """One answer: `is_error` when the engine would serve the folder wrongly; the sentence says what to change."""

    is_error: bool
    sentence: str


def lint_folder(folder: Path, engine: Engine) -> list[LintRemark]:
    """Everything to be said about serving `folder` with `engine`; no error among it means that it is served rightly.

    Raises:
        CheckpointError: the folder has no readable config.json or weights.
    """
    config = read_export_json(folder / "config.json")
    weights = FolderSource(folder)
    checks: list[Callable[[], Iterator[LintRemark]]] = [
        lambda: _architecture(config, engine),
        lambda: _vocabulary(config, weights),
        lambda: _tied_tables(config, weights),
        lambda: _tokenizer(folder, config),
    ]
    if engine == "transformers":
        checks.append(lambda: _remote_code(folder, config))
    else:
        checks += [lambda: _mask(config, engine), lambda: _blocks(config, engine), lambda: _meaning(config, engine)]
    return [finding for check in checks for finding in check()]


def _architecture(config: dict[str, Any], engine: Engine) -> Iterator[LintRemark]:
    names = config.get("architectures") or ["none"]
    if engine == "transformers":
        if "auto_map" not in config and config.get("model_type") == "sdar":
            yield LintRemark(
                True,
                "model_type=sdar without auto_map: transformers has no such class; add SDAR's own modelling files.",
            )
        return
    if names[0] not in SERVED[engine]:
        yield LintRemark(
            True,
            f"architecture {names[0]} is unknown to {engine}, which serves {', '.join(SERVED[engine])} as block diffusion; "
            "write the folder with tools/convert_checkpoint.py --layout sdar.",
        )


def _mask(config: dict[str, Any], engine: Engine) -> Iterator[LintRemark]:
    mask_id = config.get("mask_token_id")
    if mask_id is None:
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


def _meaning(config: dict[str, Any], engine: Engine) -> Iterator[LintRemark]:
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
            f"tie_word_embeddings=false, but {LM_HEAD} is missing: the engine would start it at random; set it to true.",
        )
    if tied and has_head:
        yield LintRemark(
            True,
            f"tie_word_embeddings=true, but {LM_HEAD} is stored too: engines differ in which they take; remove one.",
        )


def _tokenizer(folder: Path, config: dict[str, Any]) -> Iterator[LintRemark]:
    path = folder / "tokenizer.json"
    if not path.is_file():
        others = any(is_tokenizer_file(p) and p.name.startswith("tokenizer") for p in folder.iterdir() if p.is_file())
        yield LintRemark(not others, "the folder has no tokenizer.json; copy the tokenizer's files into it.")
        return
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        added = {token["id"]: token["content"] for token in tree.get("added_tokens", [])}
        pieces = tree["model"]["vocab"]
        size = max([len(pieces) - 1, *added]) + 1
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield LintRemark(True, f"tokenizer.json cannot be read ({error}); copy it again.")
        return
    vocab_size, mask_id = config.get("vocab_size"), config.get("mask_token_id")
    if isinstance(vocab_size, int) and size > vocab_size:
        yield LintRemark(True, f"the tokenizer has {size} ids, the model {vocab_size}; pad the tables.")
    if isinstance(mask_id, int) and mask_id not in added:
        yield LintRemark(
            False, f"id {mask_id} is no special token of the tokenizer: decode with the mask left out, or add it."
        )


def _remote_code(folder: Path, config: dict[str, Any]) -> Iterator[LintRemark]:
    auto_map = config.get("auto_map")
    if not isinstance(auto_map, dict):
        if config.get("model_type") == "bd3":
            yield LintRemark(
                True,
                "config.json has no auto_map: transformers cannot find the model's class; export the folder again.",
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
        imported = re.findall(r"^\s*from \.(\w+) import", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        waiting |= {f"{module}.py" for module in imported} - seen
    for name in sorted(missing):
        yield LintRemark(
            True, f"{name} is named by auto_map or imported from there, and missing; export the folder again."
        )
    if not missing:
        yield LintRemark(False, "load it with trust_remote_code=True.")


def served_rightly(findings: list[LintRemark]) -> bool:
    """No finding is an error."""
    return not any(finding.is_error for finding in findings)
