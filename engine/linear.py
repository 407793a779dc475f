"""Linear layers of the fast path: weights laid out once for oneDNN, and what follows a product done within it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS = {
    "gelu": ("gelu", "none"),
    "gelu_new": ("gelu", "tanh"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
}
"""Hugging Face's name of an activation, and oneDNN's with its variant."""

Get = Callable[[str, tuple[int, ...]], Tensor]
"""Hands out the weight of a name and shape."""

_ROWS = 1024  # a hint for the layout of the weights: the rows of a usual batch


class Linear:
    """`x @ weight.T + bias` for x `(n, in)`, with an activation, a sum or a product fused into it.

    On a CPU, in float32 and bf16, oneDNN keeps the weight in the order its kernels read it, and applies what follows to
    the float32 accumulators, before they are rounded. Elsewhere each step is PyTorch's own. Inference only.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._bias = bias
        self.prepared = weight.device.type == "cpu" and _onednn_takes(weight.dtype)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS) if self.prepared else weight

    def __deepcopy__(self, memo: object) -> Linear:
        return self  # nothing changes it, and prepared weights cannot be copied

    def __call__(self, x: Tensor) -> Tensor:
        if self.prepared:
            return self._fused(x, "none", "")
        return functional.linear(x, self._weight, self._bias)

    def activated(self, x: Tensor, activation: str) -> Tensor:
        """One of `ACTIVATIONS` of the product."""
        name, variant = ACTIVATIONS[activation]
        if self.prepared:
            return self._fused(x, name, variant)
        product = functional.linear(x, self._weight, self._bias)
        if name == "gelu":
            return functional.gelu(product, approximate=variant)
        return functional.silu(product) if name == "swish" else functional.relu(product)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The product plus `other`, `(n, out)`."""
        if self.prepared:
            return self._combined(x, other, "add")
        return functional.linear(x, self._weight, self._bias) + other

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """The product times `other`, `(n, out)`, component by component."""
        if self.prepared:
            return self._combined(x, other, "mul")
        return functional.linear(x, self._weight, self._bias) * other

    def _fused(self, x: Tensor, activation: str, variant: str) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self._weight, self._bias, activation, [], variant)
        return out

    def _combined(self, x: Tensor, other: Tensor, how: str) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self._weight, self._bias, how)
        return out


def _onednn_takes(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))
