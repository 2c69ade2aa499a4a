"""DeepSpeed 0.19.8: what must be switched off before it is asked for anything.

On CPU, `deepspeed.initialize` would compile a shared-memory collective (`deepspeed_shm_comm`), which is declared
incompatible here.
"""

from __future__ import annotations

import importlib
import logging
import os
from types import ModuleType

from bd3_megatron.compat.device import cuda_is_there

COMPILED_ON_FIRST_USE = ("deepspeed_shm_comm", "shm_comm")
IMPORTED_BY_INITIALIZE = ("deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.zero.muon.muon_optimizer")


def load_deepspeed() -> ModuleType:
    """Import DeepSpeed with its compile-at-first-use collectives off and its log at warnings.

    Returns:
        The `deepspeed` module.
    """
    if not cuda_is_there():
        # DeepSpeed otherwise guesses the accelerator from the packages that are installed
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import logger

    # Compiling takes minutes, and a rank killed meanwhile leaves a lock file on which every later run waits for ever.
    # The collective serves inference only.
    for name in COMPILED_ON_FIRST_USE:
        deepspeed.ops.__compatible_ops__[name] = False
    logger.setLevel(logging.WARNING)
    # `deepspeed.initialize` imports them in every rank; loaded here, ranks that are forked share them
    for name in IMPORTED_BY_INITIALIZE:
        importlib.import_module(name)
    return deepspeed
