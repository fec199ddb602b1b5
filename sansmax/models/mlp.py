"""timm's MLP, made for inference on a CPU too: products by oneDNN, and a piece of the tokens at a time.

The hidden layer is several times as wide as the tokens. Without gradients it need not be whole: a piece of it stays in
the cache of a CPU, and its memory is used again for the next one.

Shapes: b images, n tokens, c channels.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from timm.layers.mlp import Mlp as TimmMlp
from torch import Tensor, nn

from sansmax.models.linear import Linear

# tokens whose hidden layer stays in the cache of a CPU
PIECE_TOKENS = 4096


class Mlp(TimmMlp):
    """timm's `Mlp`: arguments, names, and numbers but for rounding. GELU (exact or tanh) comes with the first layer."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        bias: bool = True,
        drop: float = 0.0,
        **factory: Any,
    ) -> None:
        super().__init__(in_features, hidden_features, act_layer=act_layer, bias=bias, drop=drop, **factory)  # pyright: ignore[reportArgumentType]
        gelu = None
        if isinstance(self.act, nn.GELU):
            gelu, self.act = self.act.approximate, nn.Identity()
        self.fc1 = Linear(in_features, hidden_features, bias=bias, gelu=gelu, **factory)
        self.fc2 = Linear(hidden_features, in_features, bias=bias, **factory)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """The output for all tokens."""
        if torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        pieces = x.split(max(1, PIECE_TOKENS // max(1, x.shape[1])))
        if len(pieces) == 1:
            return super().forward(x)
        out = None
        for i, piece in enumerate(pieces):
            y = super().forward(piece)
            out = y.new_empty(*x.shape[:-1], y.shape[-1]) if out is None else out
            out[i * len(pieces[0]) : i * len(pieces[0]) + len(piece)] = y
        assert out is not None
        return out
