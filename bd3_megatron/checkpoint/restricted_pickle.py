"""Open a .pt file without letting it run anything.

Decides: torch's weights-only unpickler, plus stand-ins for the few plain classes DeepSpeed 0.19.8 puts beside tensors in
its state (fragment addresses, the ZeRO stage, the static loss scaler). The stand-ins hold data and have no behaviour, so
reading needs no DeepSpeed and DeepSpeed's own loaders, which unpickle anything, are never handed a file.
Refuses: every other class or function, whatever it is; the error is typed and names the file.
Costs: tensors are memory-mapped; nothing is read until it is used.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from bd3_megatron.errors import CheckpointError


class FragmentAddress:
    """deepspeed.utils.tensor_fragment.fragment_address: `numel` elements from `start`."""

    numel: int
    start: int


class ZeroStage(int):
    """deepspeed.runtime.zero.config.ZeroStageEnum."""


class StaticLossScaler:
    """deepspeed.runtime.fp16.loss_scaler.LossScaler: its attributes, nothing else."""


STAND_INS: tuple[tuple[type, str], ...] = (
    (FragmentAddress, "deepspeed.utils.tensor_fragment.fragment_address"),
    (ZeroStage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (StaticLossScaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
)


def open_pt(path: Path) -> Any:
    """The content of a torch file, tensors memory-mapped on the CPU.

    Args:
        path: a file in torch's zip format.

    Raises:
        CheckpointError: missing, damaged, or holding anything but plain data.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; the checkpoint is incomplete, use another.")
    allowed: Any = list(STAND_INS)
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{path} holds more than plain data and was not opened ({reason}); do not use it."
        ) from None
    except Exception as error:  # noqa: BLE001 - a damaged archive can raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {reason}); use another checkpoint."
        ) from None
