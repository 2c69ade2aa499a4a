"""Weights packed for the CPU: the same products from a layout that oneDNN reads faster when a forward has few rows.

Contract: fp32 on a CPU with oneDNN only; sums come in another order, so logits move in the last digits. Where torch has
no such operator, or it gives another result, the model stays as it is. Costs one pass over the weights at loading.
Source: the operators torch's own compiler uses for frozen models (aten/src/ATen/native/mkldnn/Linear.cpp).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# From this hidden size packing pays; below it the plain product is as fast, and bit-equal to what an exported folder
# computes by itself. Measured (one thread, GPT-2-small, 16 rows): linear layers 1.3x faster.
SMALLEST_WIDTH = 512
# Rows of a typical forward, a block: oneDNN chooses its layout by it.
ROWS_HINT = 16
# Relative to the largest product: a layout mistake is wrong in the first digit, rounding in the sixth.
SELF_CHECK_TOLERANCE = 1e-4


class PackedLinear(nn.Module):
    """A linear layer whose weight is packed; inference only."""

    packed: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.num_bytes = weight.numel() * weight.element_size()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x_BRD: Tensor) -> Tensor:
        """x W^T + b."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x_BRD, self.packed, self.bias, "none", [], "")
        return product


def pack_linear_layers(model: nn.Module, *, is_tied: bool) -> int:
    """Replace linear layers by packed ones where that pays; returns how many.

    Args:
        model: plain model in eval mode, changed in place.
        is_tied: the output table is the token table, which must stay as it is.
    """
    candidates = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        # Exactly this class: a subclass may compute something else.
        if type(child) is nn.Linear and not (is_tied and name == "lm_head") and pays(child)
    ]
    if not candidates or not is_right(candidates[0][2]):
        return 0
    for parent, name, child in candidates:
        setattr(parent, name, PackedLinear(child))
    return len(candidates)


def pays(linear: nn.Linear) -> bool:
    """Whether a layer is of the kind that packing makes faster."""
    weight = linear.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and min(weight.shape) >= SMALLEST_WIDTH


@torch.inference_mode()
def is_right(linear: nn.Linear) -> bool:
    """Whether this torch can pack a layer, and the packed one gives its products."""
    if not torch.backends.mkldnn.is_available():
        return False
    x_11D = torch.linspace(-1, 1, linear.in_features)[None, None]
    plain = linear(x_11D)
    try:
        difference = (PackedLinear(linear)(x_11D) - plain).abs().max()
    except (RuntimeError, AttributeError):
        # Another build or version of torch: the operators are its own business, and the plain layer always works.
        return False
    return bool(difference <= SELF_CHECK_TOLERANCE * plain.abs().max())
