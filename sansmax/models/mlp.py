"""timm's MLP, a piece of the tokens at a time where that is faster.

The hidden layer is several times as wide as the tokens. Without gradients it need not be whole: a piece of it stays in
the cache of a CPU, and its memory is used again for the next one.

Shapes: b images, n tokens, c channels.
"""

import torch
from jaxtyping import Float
from timm.layers.mlp import Mlp as TimmMlp
from torch import Tensor

# tokens whose hidden layer stays in the cache of a CPU
PIECE_TOKENS = 4096


class Mlp(TimmMlp):
    """timm's `Mlp`, arguments, names and numbers; in pieces of images on a CPU where no gradients are wanted."""

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
