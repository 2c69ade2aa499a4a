"""Known remarks of foreign engines are dropped; anything else they say is heard."""

from __future__ import annotations

import warnings

from bd3_megatron.process.quiet import drop_known_warnings


def said(message: str, module: str) -> bool:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        drop_known_warnings()
        warnings.warn_explicit(message, UserWarning, "file.py", 1, module=module)
    return bool(heard)


def test_a_known_remark_of_megatron_is_dropped() -> None:
    assert not said("Apex is not installed. Falling back to Torch Norm", "megatron.core.models.backends")


def test_the_same_words_of_somebody_else_are_heard() -> None:
    assert said("Apex is not installed. Falling back to Torch Norm", "bd3_megatron.compat.optional")


def test_other_words_of_megatron_are_heard() -> None:
    assert said("gradients are not finite", "megatron.core.optimizer")
