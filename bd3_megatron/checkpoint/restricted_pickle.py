"""Open a .pt file without letting it run anything: torch's weights-only reader and stand-ins for a few plain classes.

A stand-in holds data and has no behaviour, so DeepSpeed's state is read without DeepSpeed, whose own loaders unpickle
whatever they are handed. Every other class or function is refused by name. Tensors are memory-mapped.
Source: torch/_weights_only_unpickler.py; the names are those of DeepSpeed 0.19.8.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
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


StandIn = tuple[Callable[..., Any], str]
"""What takes the place of a pickled name."""

# Every name that 0.19.8 pickles beside tensors and plain containers; a newer version's names are refused until listed.
DEEPSPEED: tuple[StandIn, ...] = (
    (FragmentAddress, "deepspeed.utils.tensor_fragment.fragment_address"),
    (ZeroStage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (StaticLossScaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
)


def open_pt(path: Path, *, stand_ins: Sequence[StandIn] = DEEPSPEED) -> Any:
    """The content of a torch file, tensors memory-mapped on the CPU.

    Args:
        path: a file in torch's zip format.
        stand_ins: for names that torch does not load by itself.

    Raises:
        CheckpointError: missing, damaged, or holding anything but plain data.
    """
    allowed: Any = list(stand_ins)
    _check_there(path)
    try:
        # Only inside this call; the list is global to the process otherwise.
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than plain data and was not opened ({_first_line(error)}); do not use it."
        ) from None
    except Exception as error:  # noqa: BLE001 - a damaged archive can raise anything
        raise _damaged(path, error) from None


def unlisted_names(path: Path) -> list[str]:
    """Names in a torch file that its weights-only reader does not load by itself, sorted; nothing is unpickled.

    Raises:
        CheckpointError: missing, damaged, or no file of torch.save.
    """
    _check_there(path)
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except ValueError as error:
        # older than torch 1.6, cut short, or a TorchScript program, which would run when loaded
        raise CheckpointError(f"{path} is no whole file of torch.save ({error}); copy or save it again.") from None
    except Exception as error:  # noqa: BLE001 - a damaged archive can raise anything
        raise _damaged(path, error) from None


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; copy the checkpoint again, or use another.")


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged ({type(error).__name__}: {_first_line(error)}); copy it again, or use another."
    )


def _first_line(error: Exception) -> str:
    # an archive's error carries a C++ stack, and a hostile file chooses its text
    return next(iter(str(error).strip().splitlines()), "no reason given")[:200]
