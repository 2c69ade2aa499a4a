"""Warnings of foreign engines that are true, known and of no use to the person who reads the console.

Decides: which are dropped, each by module and wording; anything else an engine says is shown. Must run before the engines
are imported, because they warn while they are.
"""

from __future__ import annotations

import warnings

KNOWN = (
    # Apex and TransformerEngine are optional here by design; `bd3 doctor` says what is there
    (r"Transformer Engine and Apex are not installed", r"megatron\."),
    (r"Apex is not installed", r"megatron\."),
    # megatron-core 0.16.1 warns of the default it sets itself (transformer_config.py, cuda_graph_scope)
    (r"full scope is deprecated", r"megatron\."),
    # tensor_parallel/layers.py: launch/env sets CUDA_DEVICE_MAX_CONNECTIONS where there is a GPU
    (r"When using (async grad allreduce|sequence parallelism) it is recommended", r"megatron\."),
    # torch 2.13 renamed two collectives that DeepSpeed and megatron call by their old names at every step
    (r"`torch\.distributed\..*` is deprecated", r""),
)
"""(start of the message, start of the module's name)."""


def drop_known_warnings() -> None:
    """Drop the warnings of `KNOWN` in this process."""
    for message, module in KNOWN:
        warnings.filterwarnings("ignore", message=message, module=module)
