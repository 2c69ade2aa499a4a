"""The README.md of an exported folder: what the model is, what it saw, how well it predicts, how to sample from it.

Decides: only what the run recorded of these weights is said; what is not known is called unknown, and a licence is named
only where one was given.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from bd3_megatron.checkpoint.layout import Manifest
from bd3_megatron.config.schema import Config
from bd3_megatron.convert.plain_config import run_tokenizer
from bd3_megatron.data.convention import convention_from_json
from bd3_megatron.data.tokenizer_fingerprint import SHOWN_DIGITS
from bd3_megatron.diffusion.objective import objective_named
from bd3_megatron.files import json_record
from bd3_megatron.hf.configuration_bd3 import BD3Config

_CARD = """---
{licence}library_name: transformers
tags:
- block-diffusion
- bd3
---

# {title}

{kind} language model, {parameters:.3g} M parameters, {weights}, written by bd3_megatron.

| | |
|---|---|
| layers, width, heads (key/value) | {layers}, {width}, {heads} ({groups}) |
| vocabulary | {vocab_size:,} ids, mask id {mask_id} |
| length, block size | {length:,} tokens, {block_size} |
| logits | {alignment}, clean prefix block-causal, blocks at absolute multiples of the block size |
| data | {data} |
| tokenizer | {tokenizer} |
| clean tokens seen | {tokens} |
| held-out perplexity | {perplexity} |
| measured by | {convention} |
| code | commit {commit} |

## Sampling

{sampling}

{logits}

## Training configuration

```json
{config}
```
"""

_WITH_TOKENIZER = """```python
from transformers import {auto}, AutoTokenizer

folder = "."  # where this file lies, or the model's name on the hub
model = {auto}.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
prompt = tokenizer("The", return_tensors="pt", add_special_tokens=False).input_ids
print(tokenizer.decode(model.generate(prompt, max_new_tokens={new_tokens})[0]))
```"""

_WITHOUT_TOKENIZER = """```python
import torch
from transformers import {auto}

folder = "."  # where this file lies, or the model's name on the hub
model = {auto}.from_pretrained(folder, trust_remote_code=True)
prompt = torch.tensor([[{first_id}]])  # ids of the tokenizer named above, which is not in this folder
print(model.generate(prompt, max_new_tokens={new_tokens})[0].tolist())
```"""
_NEW_TOKENS = 64


def model_card(
    described: BD3Config,
    config: Config,
    manifest: Manifest,
    *,
    weights: str,
    num_parameters: int,
    licence: str | None,
    run_dir: Path,
    has_tokenizer: bool,
) -> str:
    """The text of README.md.

    Args:
        described: of the folder.
        config: the run.
        manifest: the checkpoint's.
        weights: "averaged" or "raw".
        num_parameters: of the folder.
        licence: a Hugging Face licence id; None: the card names none, for only the owner can give one.
        run_dir: whose metrics.jsonl holds evaluations.
        has_tokenizer: whether the folder holds the tokenizer's files.
    """
    block = objective_named(described.objective).has_noise
    # a run evaluates the averaged weights of its steps, and no mean of several checkpoints
    found = None if _merged_steps(manifest) else _evaluation(run_dir / "metrics.jsonl", manifest.step)
    is_other = weights == "raw" and config.optim.ema_decay > 0
    # Clean tokens: rows of the noisy copies are not counted.
    tokens = manifest.samples_consumed * config.data.seq_len
    return _CARD.format(
        # Never guessed: a wrong licence is worse than an unknown one.
        licence=f"license: {licence}\n" if licence else "",
        title=Path(config.run.dir).name or "model",
        kind="Block-diffusion" if block else "Autoregressive",
        parameters=num_parameters / 1e6,
        weights=_weights(weights, manifest),
        layers=described.num_hidden_layers,
        width=described.hidden_size,
        heads=described.num_attention_heads,
        groups=described.num_key_value_heads,
        vocab_size=described.vocab_size,
        mask_id="none" if described.mask_token_id is None else described.mask_token_id,
        length=described.max_position_embeddings,
        block_size=described.block_size,
        alignment="of a position predict that position" if block else "of a position predict the next one",
        data=_data(config, manifest),
        tokenizer=_tokenizer(described, manifest),
        tokens=f"{tokens:,}" if tokens else "none by this run" if manifest.origin else "unknown",
        perplexity="not measured" if found is None else _perplexity(found, is_other=is_other),
        convention=_convention(found, manifest),
        sampling=_snippet(described, has_tokenizer=has_tokenizer),
        logits="`model(input_ids=noisy, context_ids=clean).logits` are the raw logits of the noisy half."
        if block
        else "`model(input_ids=tokens).logits` are the raw logits of the next tokens.",
        commit=manifest.git_commit or "unknown",
        config=json.dumps(_without_paths(manifest.config), indent=1),
    )


def _merged_steps(manifest: Manifest) -> list[int]:
    """Steps of the checkpoints that tools/average_checkpoints.py made this one of; none for a run's own."""
    return sorted(manifest.origin.get("averaged_steps") or [])


def _weights(weights: str, manifest: Manifest) -> str:
    # Averaged, raw and merged weights differ in quality; readers must know which they have.
    merged = _merged_steps(manifest)
    if not merged:
        return f"{weights} weights of step {manifest.step:,}"
    kind = "averaged" if manifest.origin.get("weights") == "ema" else "raw"
    return f"the mean of the {kind} weights of steps {', '.join(f'{step:,}' for step in merged)}"


def _data(config: Config, manifest: Manifest) -> str:
    """Names of what was read, and how much of it there is where the run counted it."""
    stream = config.data.stream
    named = [*config.data.mixed_folders] if stream is None else [stream.dataset]
    named = named or [name for name in (config.data.path, *config.data.text) if name]
    names = ", ".join(Path(name).name for name in named) or "unknown"
    sources = (manifest.train_state.get("rows") or {}).get("train") or []
    if not sources:
        return names
    documents, tokens = (sum(int(source[key]) for source in sources) for key in ("documents", "tokens"))
    return f"{names}: {documents:,} documents of {tokens:,} tokens"


def _tokenizer(described: BD3Config, manifest: Manifest) -> str:
    fingerprint = described.tokenizer_fingerprint
    if fingerprint is None:
        return "unknown"
    recorded = run_tokenizer(manifest)
    ids = ", ".join(f"{name} {recorded[name]}" for name in ("bos", "eos", "pad") if recorded.get(name) is not None)
    return f"fingerprint {fingerprint[:SHOWN_DIGITS]}{f'; ids {ids}' if ids else ''}"


def _snippet(described: BD3Config, *, has_tokenizer: bool) -> str:
    """Code that runs as it is pasted, in the folder."""
    text = _WITH_TOKENIZER if has_tokenizer else _WITHOUT_TOKENIZER
    return text.format(
        auto="AutoModelForMaskedLM" if objective_named(described.objective).has_noise else "AutoModelForCausalLM",
        # a model of short texts is not asked for more than it has learned
        new_tokens=min(_NEW_TOKENS, described.max_position_embeddings // 2),
        first_id=described.bos_token_id or 0,
    )


def _without_paths(tree: dict[str, Any]) -> dict[str, Any]:
    """A published card tells nobody's folders."""
    run = {key: value for key, value in tree.get("run", {}).items() if key != "dir"}
    naming = ("path", "text", "mixture", "stages", "stream")
    data = {key: value for key, value in tree.get("data", {}).items() if key not in naming}
    return {**tree, "run": run, "data": data}


def _evaluation(metrics: Path, step: int) -> dict[str, Any] | None:
    """The evaluation nearest before the checkpoint; None where there is none."""
    best: dict[str, Any] | None = None
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []:
        record = json_record(line) or {}
        at = record.get("step")
        if type(at) is int and at <= step and type(record.get("eval/perplexity")) is float:
            # Records are in order of steps, so the last that fits is the nearest.
            best = record
    return best


def _perplexity(found: dict[str, Any], *, is_other: bool) -> str:
    """With its standard error; `is_other`: the folder holds the raw weights, and the averaged ones were measured."""
    # of the texts and of the noise: independent, and small against 1, so that they are relative errors of the perplexity
    errors = [found.get(f"eval/stderr_{of}_nats_per_token") for of in ("text", "noise")]
    total = math.hypot(*(error for error in errors if type(error) is float))
    spread = f" ± {found['eval/perplexity'] * total:.2g} (standard error)" if total else ""
    whose = ", of the averaged weights, not of these" if is_other else ""
    return f"{found['eval/perplexity']:.4g}{spread} at step {found['step']:,}{whose}"


def _convention(found: dict[str, Any] | None, manifest: Manifest) -> str:
    """Which rows and tokens the number is of; a number without its convention compares with none."""
    said = []
    counts = [] if found is None else [found.get("eval/num_tokens"), found.get("eval/num_sequences", 0)]
    if counts and all(type(count) is int for count in counts):
        said.append(f"{counts[0]:,} tokens of {counts[1]:,} held-out sequences")
    if manifest.evaluation:
        said.append(convention_from_json(manifest.evaluation, "the manifest").sentence())
    return "; ".join(said) or "unknown"
