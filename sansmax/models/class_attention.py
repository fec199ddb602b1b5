"""Class attention: after the last block, a class token gathers from the patch tokens, which it no longer changes.

CaiT's layers (https://arxiv.org/abs/2103.17239, section 3) with SimA's normalisation instead of softmax, as published
with SimA (https://arxiv.org/abs/2206.08898). Of the attention only the class token's row is needed.

What is computed for one token costs next to nothing, and the logits hang on it: autocast leaves it as it is.

Shapes: b images, t tokens with the class token first, c channels.
"""

from typing import Any

import torch
from jaxtyping import Float
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from sansmax.ops.checks import check_layer, check_num_heads
from sansmax.ops.sima import sima_class_attention

# the norms of this package's published networks have it; the default of PyTorch is 1e-5
NORM_EPS = 1e-6


class ClassAttention(nn.Module):
    """SimA attention of one query, the class token's, with parameters as in a layer of all queries.

    The queries are normalised by their l1 norm over all tokens, the patch tokens' queries included, though only the
    class token's is used. Raises ValueError if `dim` is not a multiple of `num_heads`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_num_heads(dim, num_heads)
        self.num_heads, self.eps = num_heads, eps
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Float[Tensor, "b t c"]) -> Float[Tensor, "b 1 c"]:
        """The class token's output; the other tokens have none."""
        check_layer(x, None)
        read = sima_class_attention(x, self.qkv.weight, self.qkv.bias, self.num_heads, eps=self.eps)
        with torch.autocast(x.device.type, enabled=False):
            return self.proj_drop(self.proj(read.unsqueeze(1).to(self.proj.weight.dtype)))


class ClassAttentionBlock(nn.Module):
    """Class attention and an MLP of the class token, each beside a residual, with gains per channel `gamma1`, `gamma2`.

    As published, patch tokens take part though they learn nothing: they gain `gamma1 * norm1(x)`, are normed if
    `tokens_norm`, and doubled. `eta` is the start of the gains. Without `tokens_norm` the second norm is the class
    token's alone.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        eta: float = 1.0,
        tokens_norm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        # only what was asked for: timm's layers before 1.0.21 take neither
        factory: dict[str, Any] = {k: v for k, v in (("device", device), ("dtype", dtype)) if v is not None}
        self.eta, self.tokens_norm = eta, tokens_norm
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS, **factory)
        self.attn = ClassAttention(dim, num_heads, qkv_bias, proj_drop, **factory)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **factory)
        self.gamma1 = nn.Parameter(torch.full((dim,), eta, **factory))
        self.gamma2 = nn.Parameter(torch.full((dim,), eta, **factory))

    def forward(self, x: Float[Tensor, "b t c"], only_class: bool = False) -> Float[Tensor, "b t2 c"]:
        """All tokens, or the class token alone, which is all that a head on it needs of the last block."""
        x = x.to(self.gamma1.dtype)
        y = self.norm1(x)
        cls = torch.addcmul(x[:, :1], self.gamma1, self.attn(y))
        with torch.autocast(x.device.type, enabled=False):
            cls = self.norm2(cls)
            cls = torch.addcmul(cls, self.gamma2, self.mlp(cls))
        if only_class:
            return cls
        patches = torch.addcmul(x[:, 1:], self.gamma1, y[:, 1:])
        patches = self.norm2(patches) if self.tokens_norm else patches
        return torch.cat((cls, 2 * patches), dim=1)
