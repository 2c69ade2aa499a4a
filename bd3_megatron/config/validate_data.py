"""Rules of the data section: which source of training rows, mixtures and their stages, streams.

Whether folders and datasets are there shows when they are opened. Torch-free.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from bd3_megatron.config.data import DataConfig, StageConfig
from bd3_megatron.errors import ConfigError


def check_data(data: DataConfig) -> None:
    """Refuse a data section that cannot be read.

    Raises:
        ConfigError: one sentence with value, law and remedy.
    """
    given = {"mixture": data.mixture, "stages": data.stages, "stream": data.stream is not None}
    named = [f"data.{key}" for key, value in given.items() if value]
    if len(named) > 1:
        raise ConfigError(f"{' and '.join(named)} each say what to train on; keep one of them.")
    if data.mixture:
        _check_weights("data.mixture", data.mixture)
    for number, stage in enumerate(data.stages):
        _check_stage(f"data.stages[{number}]", stage, is_last=number == len(data.stages) - 1)
    # a batch size that changes would move one kind of seam and not the other
    if any(s.steps is not None for s in data.stages) and any(s.tokens is not None for s in data.stages):
        raise ConfigError("data.stages gives some lengths in steps and some in tokens; give all in one of them.")
    if data.stream is not None:
        # a stream has no end from which rows could be held out
        if data.path is None and not data.text:
            raise ConfigError(
                "data.stream has neither data.path nor data.text, and tokenizer and held-out rows come from there; "
                "prepare a part of the corpus with tools/prepare_data.py and name it as data.path."
            )


def _check_weights(where: str, weights: Mapping[str, float]) -> None:
    # 0 is a source that was read before and is no longer wanted; not all can be
    if not any(weights.values()):
        raise ConfigError(f"{where} has no positive weight; give at least one folder a weight above 0.")
    spelled: dict[str, str] = {}
    for folder in weights:
        other = spelled.setdefault(os.path.realpath(folder), folder)
        if other != folder:
            raise ConfigError(f"{where} names one folder twice, as {other} and {folder}; give it one weight.")


def _check_stage(where: str, stage: StageConfig, *, is_last: bool) -> None:
    _check_weights(f"{where}.mixture", stage.mixture)
    if stage.steps is not None and stage.tokens is not None:
        raise ConfigError(f"{where} gives both steps={stage.steps} and tokens={stage.tokens}; give one.")
    if stage.steps is None and stage.tokens is None and not is_last:
        raise ConfigError(f"{where} gives neither steps nor tokens and is not the last; give one.")
