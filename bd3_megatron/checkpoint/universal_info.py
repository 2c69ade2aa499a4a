"""What DeepSpeed's own converter (ds_to_universal) must know of each parameter to join tensor-parallel pieces.

Decides: three patterns that follow model/partition's table, one a way of cutting, the same on every stage. Norms are
"averaged", which is exact where the copies are equal (the converter's "replicated" demands bit-equality across tp and
would refuse a model whose copies drifted by one rounding). Parallel tables keep their padding, equal on every grid.
Source: DeepSpeed 0.19.8 deepspeed/checkpoint/constants.py, ds_to_universal.py (every pattern must match something).
"""

from __future__ import annotations

import re
from typing import Any

from bd3_megatron.model.partition import EMBEDDING

UNIVERSAL_VERSION = 0.2
ROWS = r".*\.linear_(proj|fc2)\.weight$"
STACKED = r".*\.linear_fc1\.weight$"
REPLICATED = r".*(layernorm\.(weight|bias)|linear_fc2\.bias)$"


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
            "parameter_to_average_patterns": [REPLICATED],
            "tp_replicated_parameter_patterns": [],
            "vocabulary_parameter_patterns": [],
            "pipeline_replicated_parameter_patterns": [re.escape(EMBEDDING)],
        }
    }
