"""What DeepSpeed's own converter (ds_to_universal) must know of each parameter to join tensor-parallel pieces.

Decides: three patterns that follow model/partition's table, one a way of cutting, the same on every stage.
Source: DeepSpeed 0.19.8 deepspeed/checkpoint/constants.py, ds_to_universal.py (every pattern must match something).
"""

from __future__ import annotations

import re
from typing import Any

from bd3_megatron.model.partition import EMBEDDING

UNIVERSAL_VERSION = 0.2
# Cut along the input dimension. What no pattern names is cut along rows, DeepSpeed's default.
ROWS = r".*\.linear_(proj|fc2)\.weight$"
# Cut along rows inside each of two stacked matrices.
STACKED = r".*\.linear_fc1\.weight$"
REPLICATED = r".*(layernorm\.(weight|bias)|linear_fc2\.bias|router\.weight)$"


def universal_info(*, gated: bool) -> dict[str, Any]:
    """The client state that goes into every model file.

    Args:
        gated: the MLP's first matrix holds [gate; up].
    """
    return {
        "universal_checkpoint_info": {
            "universal_checkpoint_version": UNIVERSAL_VERSION,
            "parameter_with_row_parallelism_patterns": [ROWS],
            "parameter_with_2_sub_params_cat_dim_0": [STACKED] if gated else [],
            # Averaging is exact where the copies are equal. "Replicated" demands bit-equality across tp and would
            # refuse a model whose copies drifted by one rounding.
            "parameter_to_average_patterns": [REPLICATED],
            "tp_replicated_parameter_patterns": [],
            # Parallel tables keep their padding rows, which are equal on every grid; the converter would strip them.
            "vocabulary_parameter_patterns": [],
            # A tied table is on the first and the last stage.
            "pipeline_replicated_parameter_patterns": [re.escape(EMBEDDING)],
        }
    }
