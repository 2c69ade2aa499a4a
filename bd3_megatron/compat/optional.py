"""Optional packages: detected by what they offer, never required.

The package index's `apex` is a web toolkit of the same name, not NVIDIA's; an import that merely succeeds proves
nothing, so each package is asked for the very class that would be used.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from bd3_megatron.errors import ConfigError

# Package -> (module, the name that would be used): an import that merely succeeds proves nothing.
PROBES = {
    "apex": ("apex.optimizers", "FusedAdam"),
}


def find(package: str) -> Any | None:
    """The class or function that proves `package` is the right one and works here, or None."""
    module, name = PROBES[package]
    try:
        return getattr(importlib.import_module(module), name)
    # a half-installed CUDA package may raise anything at import (OSError, RuntimeError, AttributeError)
    except Exception:
        return None


def require(package: str) -> Any:
    """As `find`, for an explicit request.

    Raises:
        ConfigError: the package is absent or another project of that name.
    """
    found = find(package)
    if found is None:
        raise ConfigError(f"{package} was asked for, but {_sentence(package)}; install it or use the value `auto`.")
    return found


def _sentence(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed; not needed"
    if package == "apex":
        return (
            "the installed `apex` is not NVIDIA Apex (the package index has an unrelated project of that name); ignored"
        )
    return f"{package} is installed but does not import here; ignored"
