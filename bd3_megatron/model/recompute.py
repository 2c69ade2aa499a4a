"""What is computed again in the backward pass instead of being kept: nothing, cheap parts, or whole layers.

Decides: it applies to the first layers of every chunk, as megatron's method "block" counts them. full: whole layers, by
megatron's block; a trimmed last layer does it itself. selective: the outputs of both norms, the core attention and the
MLP's activation; what stays is what matrix products and the attention's backward read.
Exact to the bit, dropout included: what is computed again restores the random state through megatron's tracker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from bd3_megatron.model.activation import activate

_SETTINGS: Mapping[str, dict[str, bool]] = {"none": {}, "selective": {"has_parts": True}, "full": {"is_full": True}}
"""Fields of `Recompute` by the setting's name."""


@dataclass(frozen=True)
class Recompute:
    """What the first `layers` layers of each chunk (None: all) compute again: their cheap parts, everything, or nothing."""

    has_parts: bool = False
    is_full: bool = False
    layers: int | None = None

    @classmethod
    def of_setting(cls, name: str, layers: int | None) -> Recompute:
        """From train.recompute and train.recompute_layers."""
        return cls(layers=layers, **_SETTINGS[name])

    def of_parts(self, index: int) -> bool:
        """Layer `index` of a chunk, from 0, computes its cheap parts again."""
        return self.has_parts and self._covers(index)

    def of_all(self, index: int) -> bool:
        """Layer `index` of a chunk, from 0, is computed again as a whole."""
        return self.is_full and self._covers(index)

    def _covers(self, index: int) -> bool:
        return self.layers is None or index < self.layers

    def block_settings(self, num_layers: int) -> dict[str, Any]:
        """megatron's settings for whole layers; what is finer is flags on layers.

        Args:
            num_layers: of the whole model, which no chunk exceeds.
        """
        if not self.is_full:
            return {}
        # As many layers as memory asks for, and no forward pass more.
        layers = num_layers if self.layers is None else self.layers
        return {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": layers}


def rebuilt(function: Callable[..., Tensor], *args: Tensor | None) -> tuple[Tensor, Callable[[Tensor], None]]:
    """The output of `function`, and what to call once that output has been used.

    Returns:
        (output, release): called with a later tensor that depends on the output, `release` frees the output's memory;
        the output is computed again when the gradient of that tensor has arrived.
    """
    # the default fp8=False asks for TransformerEngine, see compat/megatron
    once = CheckpointWithoutOutput(fp8=None)
    return once.checkpoint(function, *args), once.discard_output_and_register_recompute


class ThriftyMLP(MLP):
    """megatron's MLP, which can compute its activation again in the backward instead of keeping it."""

    # Set on each layer: megatron's configuration knows one answer for all of them.
    rebuild_activation: bool = False

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any) -> Any:
        """As megatron's, with (output, bias)."""
        inner, bias = self.linear_fc1(hidden_states)
        active = partial(activate, gated=self.config.gated_linear_unit)
        if not (self.rebuild_activation and self.training):
            return self.linear_fc2(active(inner, bias))
        rows, release = rebuilt(active, inner, bias)
        output, output_bias = self.linear_fc2(rows)
        release(output)
        return output, output_bias
