"""Linear layers by oneDNN where only a forward pass on a CPU is wanted.

PyTorch sends large products in float32 to the MKL library, which adds the bias and applies an activation in passes of
their own; on a CPU that is not Intel's, oneDNN is about a tenth faster at the product, too. It comes with every build
of PyTorch for x86; PyTorch's own compiler calls it by the same function.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

# multiplications from which oneDNN is not slower: its call alone takes 20 microseconds
LARGE = 2**24


class LinearChoice(NamedTuple):
    """What computes a linear layer, "onednn" or "torch", and why."""

    name: str
    reason: str


def choose_linear(x: Tensor, weight: Tensor) -> LinearChoice:
    """What computes `F.linear(x, weight)`: the one place that decides."""
    if torch.compiler.is_compiling():
        return LinearChoice("torch", "the compiler chooses by itself")
    if torch.is_grad_enabled():
        return LinearChoice("torch", "oneDNN's product has no gradients")
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return LinearChoice("torch", "not in float32 on a CPU")
    if torch.is_autocast_enabled("cpu"):
        return LinearChoice("torch", "autocast changes the types")
    if type(weight) not in (Tensor, nn.Parameter) or type(x) is not Tensor:
        return LinearChoice("torch", "tensors of another kind")
    if x.shape.numel() * weight.shape[0] < LARGE:
        return LinearChoice("torch", "too small a product")
    if not (torch.backends.mkldnn.is_available() and getattr(torch.backends.mkldnn, "enabled", True)):
        return LinearChoice("torch", "PyTorch was built without oneDNN, or it is switched off")
    return LinearChoice("onednn", "a large product in float32 on a CPU, without gradients")


class Linear(nn.Linear):
    """`torch.nn.Linear`, the same numbers but for rounding, with GELU behind it.

    Tools that go by the exact type of a layer, such as `torch.ao.quantization.quantize_dynamic`, must be told of it.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, gelu: str | None = None, **factory: Any
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, **factory)
        self.gelu = gelu

    def forward(self, input: Float[Tensor, "*b c_in"]) -> Float[Tensor, "*b c_out"]:  # noqa: A002 - torch's name
        """The output for each token."""
        x = input
        if choose_linear(x, self.weight).name == "onednn":
            after = ("gelu", [], self.gelu) if self.gelu else ("none", [], "")
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *after)
        y = F.linear(x, self.weight, self.bias)
        return F.gelu(y, approximate=self.gelu) if self.gelu else y

    def extra_repr(self) -> str:
        """The sizes, and the activation."""
        return super().extra_repr() + (f", gelu={self.gelu!r}" if self.gelu else "")
