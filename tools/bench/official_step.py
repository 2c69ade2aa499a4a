"""The official code's own model as a candidate of the step benchmark, loaded from a folder that the user has.

Contract: a checkout of kuleshov-group/bd3lms with models/dit.py; nothing of it is copied here. It is given the weights of
the shipped model, SDPA under its own mask, and a loss without the copies that its trainer makes, which favours it.
Refuses a folder without that file.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bd3_megatron.config.schema import Config
from bd3_megatron.convert.official import unfold
from bd3_megatron.errors import UsageError

CONDITION_WIDTH = 128


def official_model(folder: Path, config: Config, plain: Mapping[str, Tensor], vocab: int) -> nn.Module:
    """The official DIT with the weights of a plain model.

    Args:
        folder: the checkout.
        config: paper style.
        plain: weights of the plain model.
        vocab: V.

    Raises:
        UsageError: the folder has no models/dit.py, or the style is not the paper's.
    """
    shape = config.model
    if shape.style != "paper":
        raise UsageError(f"--official with --style {shape.style}: the official model has one style; add --style paper.")
    settings = SimpleNamespace(
        block_size=config.diffusion.block_size,
        algo=SimpleNamespace(parameterization="subs", cross_attn=True),
        loader=SimpleNamespace(eval_batch_size=1),
        model=SimpleNamespace(
            length=config.data.seq_len,
            hidden_size=shape.hidden_size,
            cond_dim=CONDITION_WIDTH,
            n_heads=shape.num_heads,
            n_blocks=shape.num_layers,
            dropout=0.0,
            attn_backend="sdpa",
            tie_word_embeddings=False,
        ),
    )
    model = _module(folder).DIT(settings, vocab)
    state = unfold(plain, head_dim=shape.head_width, condition_width=CONDITION_WIDTH)
    names = model.state_dict().keys()
    model.load_state_dict(
        {k.removeprefix("backbone."): v for k, v in state.items() if k.removeprefix("backbone.") in names}
    )
    return model


def official_step(
    model: nn.Module, ids_BP: Tensor, target_BL: Tensor, weight_BL: Tensor, *, mask_id: int
) -> Callable[[], Tensor]:
    """One forward and backward of the official model.

    Args:
        model: of `official_model`.
        ids_BP: [noisy; clean] ids.
        target_BL: clean ids; weight_BL: loss weight of every noisy row, 0 where it has none.
        mask_id: never predicted.
    """
    # its time conditioning is off: every sequence has sigma 0
    sigma_B = torch.zeros(ids_BP.shape[0], device=ids_BP.device)

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        logits = model(ids_BP, sigma_B).float()
        logits = logits.index_fill(-1, torch.tensor([mask_id], device=logits.device), float("-inf"))
        log_probs = F.log_softmax(logits, dim=-1)
        loss = -(log_probs.gather(-1, target_BL[..., None])[..., 0] * weight_BL).sum() / target_BL.numel()
        loss.backward()
        return loss.detach()

    return step


def _module(folder: Path) -> Any:
    path = folder / "models/dit.py"
    if not path.is_file():
        raise UsageError(f"--official {folder} has no models/dit.py; give a checkout of kuleshov-group/bd3lms.")
    # imported there for configurations that come as a dictionary, which ours does not
    sys.modules.setdefault("omegaconf", ModuleType("omegaconf"))
    spec = importlib.util.spec_from_file_location("official_dit", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"--official {folder}: models/dit.py cannot be imported.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
