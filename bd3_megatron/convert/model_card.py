"""The README.md of an exported folder: what the model is, what it saw, how well it predicts, how to sample from it.

Decides: only what the run recorded is said; what is not known is called unknown, the licence too unless it is given.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from bd3_megatron.checkpoint.layout import Manifest
from bd3_megatron.config.schema import Config
from bd3_megatron.diffusion.objective import objective_named
from bd3_megatron.hf.configuration_bd3 import BD3Config

_CARD = """---
license: {licence}
library_name: transformers
tags:
- block-diffusion
- bd3
---

# {title}

{kind} language model, {parameters:.1f} M parameters, {weights} weights of step {step:,}, written by bd3_megatron.

| | |
|---|---|
| layers, width, heads (key/value) | {layers}, {width}, {heads} ({groups}) |
| vocabulary | {vocab_size:,} ids, mask id {mask_id} |
| length, block size | {length:,} tokens, {block_size} |
| logits | {alignment}, clean prefix block-causal, blocks at absolute multiples of the block size |
| data | {data} |
| clean tokens seen | {tokens} |
| held-out perplexity | {perplexity} |
| code | commit {commit} |

## Sampling

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

model = AutoModelForMaskedLM.from_pretrained("FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)
prompt = tokenizer("The", return_tensors="pt", add_special_tokens=False).input_ids
print(tokenizer.decode(model.generate(prompt, max_new_tokens=64)[0]))
```

`model(input_ids=noisy, context_ids=clean).logits` are the raw logits of the noisy half.

## Training configuration

```json
{config}
```
"""


def model_card(
    described: BD3Config,
    config: Config,
    manifest: Manifest,
    *,
    weights: str,
    num_parameters: int,
    licence: str,
    run_dir: Path,
) -> str:
    """The text of README.md.

    Args:
        described: of the folder.
        config: the run.
        manifest: the checkpoint's.
        weights: "averaged" or "raw".
        num_parameters: of the folder.
        licence: a Hugging Face licence id, or "unknown".
        run_dir: whose metrics.jsonl holds evaluations.
    """
    block = objective_named(described.objective).has_noise
    # Clean tokens: rows of the noisy copies are not counted.
    tokens = manifest.samples_consumed * config.data.seq_len
    return _CARD.format(
        # Never guessed: a wrong licence is worse than an unknown one.
        licence=licence,
        title=Path(config.run.dir).name or "model",
        kind="Block-diffusion" if block else "Autoregressive",
        parameters=num_parameters / 1e6,
        # Averaged and raw weights differ in quality; readers must know which they have.
        weights=weights,
        step=manifest.step,
        layers=described.num_hidden_layers,
        width=described.hidden_size,
        heads=described.num_attention_heads,
        groups=described.num_key_value_heads,
        vocab_size=described.vocab_size,
        mask_id="none" if described.mask_token_id is None else described.mask_token_id,
        length=described.max_position_embeddings,
        block_size=described.block_size,
        alignment="of a position predict that position" if block else "of a position predict the next one",
        data=_data_names(config),
        tokens=f"{tokens:,}" if tokens else "none by this run" if manifest.origin else "unknown",
        perplexity=_perplexity(run_dir / "metrics.jsonl", manifest.step),
        commit=manifest.git_commit or "unknown",
        config=json.dumps(_without_paths(manifest.config), indent=1),
    )


def _data_names(config: Config) -> str:
    stream = config.data.stream
    # Names only: a folder's path tells about the machine it was on.
    named = [*config.data.mixed_folders] if stream is None else [stream.dataset]
    named = named or [name for name in (config.data.path, *config.data.text) if name]
    return ", ".join(Path(name).name for name in named) or "unknown"


def _without_paths(tree: dict[str, Any]) -> dict[str, Any]:
    """A published card tells nobody's folders."""
    run = {key: value for key, value in tree.get("run", {}).items() if key != "dir"}
    naming = ("path", "text", "mixture", "stages", "stream")
    data = {key: value for key, value in tree.get("data", {}).items() if key not in naming}
    return {**tree, "run": run, "data": data}


def _perplexity(metrics: Path, step: int) -> str:
    """The evaluation nearest before the checkpoint, with its standard error; "not measured" where there is none."""
    best: dict[str, Any] | None = None
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if (
            isinstance(record, dict)
            and record.get("eval/perplexity") is not None
            and int(record.get("step", 0)) <= step
        ):
            # Records are in order of steps, so the last that fits is the nearest.
            best = record
    if best is None:
        return "not measured"
    # of the texts and of the noise: independent, and small against 1, so that they are relative errors of the perplexity
    errors = [best.get(f"eval/stderr_{of}_nats_per_token") for of in ("text", "noise")]
    total = math.hypot(*(error for error in errors if error is not None))
    spread = f" ± {best['eval/perplexity'] * total:.2g} (standard error)" if total else ""
    return f"{best['eval/perplexity']:.4g}{spread} at step {best['step']:,}"
