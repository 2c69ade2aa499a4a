"""The section model.experts: a mixture of experts in place of the MLP.

Each field has one name, type, legal range and default, as in `config/schema.py`, which holds the section.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from bd3_megatron.config.ranges import Range


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    # a mixture of one is an MLP
    number: Annotated[int, Range(2, 4096)]
    """Routed experts E of a layer."""
    top_k: Annotated[int, Range(1, 1024)]
    """Experts that compute a row."""
    width: Annotated[int, Range(1, 1e6)]
    """Inner width of one routed expert."""
    shared_width: Annotated[int, Range(1, 1e7)] | None = None
    """Inner width of the expert that computes every row; null: none."""
    leading_dense_layers: Annotated[int, Range(0, 10_000)] = 0
    """First layers with an MLP of ffn_hidden_size in place of experts (LLaDA2 has 1)."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Score of an expert from the router's logits: softmax over all of them (Qwen3) or each one's sigmoid (LLaDA2)."""
    normalize_top_k: bool = True
    """Weights of the chosen experts are divided by their sum."""
    groups: Annotated[int, Range(1, 1024)] = 1
    """Groups of neighbouring experts, of which a row may use `group_top_k`; the score of a group is the sum of its best two."""
    group_top_k: Annotated[int, Range(1, 1024)] = 1
    """Groups a row may use."""
    # LLaDA2 and DeepSeek-V3 have 2.5
    scaling_factor: Annotated[float, Range(1e-6, 1000)] = 1.0
    """Factor on the weights of the chosen experts."""
    bias: bool = False
    """An fp32 number an expert that is added to its score in the choice, never in the weight."""
    # scores lie in [0, 1]
    bias_rate: Annotated[float, Range(0, 1)] = 0.001
    """With bias: so much a step up for experts below the mean load and down for those above; 0: frozen."""
    # DeepSeek-V3 has 1e-4 beside a bias, Qwen3-MoE 1e-3 without one
    balance_loss: Annotated[float, Range(0, 100)] = 0.0
    """Factor on the term that is least where a sequence's counted rows load experts evenly (1 there)."""
    # ST-MoE has 1e-3
    z_loss: Annotated[float, Range(0, 100)] = 0.0
    """Factor on the mean square of the logarithm of the router's partition function, which keeps its logits small."""
    counted_rows: Literal["both", "noisy", "clean"] = "both"
    """Rows that make up the load. In the last layer always those that carry loss; never those that a grid may skip."""
