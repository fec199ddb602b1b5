"""Transformer blocks in two phases: summarise the tokens, then map each token by the summary.

    block(x) == block.map(block.summarise(x), x)

Summaries of disjoint sets of tokens merge, so a whole image, a stream of chunks and several devices run the same
code. The modules here hold parameters; the mathematics is in `sansmax.ops`.

Shapes: b images, n tokens, c channels.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from timm.layers.drop import DropPath
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from sansmax.ops import Moments, seqnorm_affine, seqnorm_attention, softmax_attention
from sansmax.ops.moments import Weight, without_padding

ORDERS = ("auto", "quadratic", "linear", "moments")


class Choice(NamedTuple):
    """The order in which a layer is computed, and why."""

    order: str
    reason: str


def choose_order(num_tokens: int, embed_dim: int, head_dim: int) -> Choice:
    """The cheapest order of a sequence-normalised layer: by multiplications, for one image.

    The second moments cost two products of n c^2, and 4 c^3 + 2 c^2 d per image for the small matrices; the direct
    orders cost four projections of n c^2 and two products of n c d or of n^2 c.
    """
    n, c, d = num_tokens, embed_dim, head_dim
    costs = {
        "moments": 2 * n * c * c + 4 * c**3 + 2 * c * c * d,
        "linear": 4 * n * c * c + 2 * n * c * d,
        "quadratic": 4 * n * c * c + 2 * n * n * c,
    }
    order = min(costs, key=lambda name: costs[name])
    mega = ", ".join(f"{name} {cost / 1e6:.3g}" for name, cost in costs.items())
    return Choice(order, f"fewest multiplications for {n} tokens, {c} channels, heads of {d} (millions: {mega})")


class SeqNormAttention(nn.Module):
    """Multi-head attention with Q, K and V normalised over the tokens (https://arxiv.org/abs/2406.01314).

    The parameters are those of timm's attention, `qkv` and `proj`, and a gain and a bias per channel for each of Q, K
    and V. Biases of `qkv` cancel in the normalisation; they are accepted so that weights of other transformers load.
    `order` forces one order of computation; the numbers are the same up to rounding.

    Raises ValueError if `dim` is not a multiple of `num_heads` or `order` is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        order: str = "auto",
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
        self.num_heads, self.order, self.eps = num_heads, order, eps
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        for name in ("q", "k", "v"):
            # one axis, so that optimisers leave them out of weight decay as they do any gain and bias
            self.register_parameter(f"gamma_{name}", nn.Parameter(torch.empty(dim, device=device, dtype=dtype)))
            self.register_parameter(f"beta_{name}", nn.Parameter(torch.empty(dim, device=device, dtype=dtype)))
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gains 1 and biases 0, but for the bias of the values."""
        for name in ("q", "k", "v"):
            nn.init.ones_(getattr(self, f"gamma_{name}"))
            nn.init.zeros_(getattr(self, f"beta_{name}"))
        # the output knows beta_k and beta_v by their product: were both 0, so were both gradients, for ever
        nn.init.normal_(self.get_parameter("beta_v"), std=0.02)

    def _gains(self) -> dict[str, Tensor]:
        names = ("gamma_q", "beta_q", "gamma_k", "beta_k", "gamma_v", "beta_v")
        return {name: getattr(self, name).unflatten(0, (self.num_heads, -1)) for name in names}

    def summarise(self, x: Float[Tensor, "b n c"], mask: Weight = None) -> Moments:
        """All that the layer needs to know of the other tokens."""
        return Moments.of(x, mask)

    def finish(self, state: Moments) -> tuple[Float[Tensor, "b c c"], Float[Tensor, "b c"]]:
        """The affine map `(M, c)` that the layer applies to each token, from the moments of all of them."""
        w_q, w_k, w_v = self.qkv.weight.chunk(3)
        proj = self.proj
        return seqnorm_affine(
            state, w_q, w_k, w_v, proj.weight, proj.bias, self.num_heads, **self._gains(), eps=self.eps
        )

    def map(self, finished: tuple[Tensor, Tensor], x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """The layer's output for tokens that are counted in the finished state."""
        m, c = finished
        with torch.autocast(x.device.type, enabled=False):
            # the small matrices were formed in float32; the large product runs in the type of the tokens
            out = torch.baddbmm(c.to(x.dtype).unsqueeze(-2), x, m.to(x.dtype))
        return self.proj_drop(out)

    def forward(self, x: Float[Tensor, "b n c"], mask: Weight = None) -> Float[Tensor, "b n c"]:
        """Attention over all tokens at once, in the cheapest order unless one is forced."""
        n, c = x.shape[-2:]
        order = choose_order(n, c, c // self.num_heads).order if self.order == "auto" else self.order
        x = without_padding(x, mask)
        if order == "moments":
            return self.map(self.finish(self.summarise(x, mask)), x)
        q, k, v = _split_heads(self.qkv(x), self.num_heads)
        out = seqnorm_attention(q, k, v, **self._gains(), mask=mask, order=order, eps=self.eps)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class SoftmaxAttention(nn.Module):
    """Multi-head softmax attention with the same call, the baseline; parameters as in timm."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Float[Tensor, "b n c"], mask: Weight = None) -> Float[Tensor, "b n c"]:
        """Attention over all tokens at once."""
        q, k, v = _split_heads(self.qkv(without_padding(x, mask)), self.num_heads)
        return self.proj_drop(self.proj(softmax_attention(q, k, v, mask=mask).transpose(1, 2).flatten(2)))


def _check_heads(dim: int, num_heads: int) -> None:
    if dim % num_heads:
        raise ValueError(f"embed_dim {dim} is not divisible by num_heads {num_heads}")


def _split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    b, n, c = qkv.shape
    q, k, v = qkv.view(b, n, 3, num_heads, c // (3 * num_heads)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


ATTENTIONS: dict[str, type[nn.Module]] = {"seqnorm": SeqNormAttention, "softmax": SoftmaxAttention}


class Block(nn.Module):
    """Pre-norm transformer block, `x + attn(norm1(x))` then `x + mlp(norm2(x))`, with any attention of this package.

    Arguments and parameter names are those of timm's block, so timm builds it (`block_fn`) and weights exchange.

    Raises ValueError for an attention that does not exist and for options of timm's block that this one lacks.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_attn_norm: bool = False,
        scale_mlp_norm: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        mlp_layer: type[nn.Module] = Mlp,
        attn_layer: object = None,
        depth: int = 0,
        attention: str = "seqnorm",
        order: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        del attn_layer, depth  # timm passes them to every block; `attention` says what is built here
        unsupported = {
            "qk_norm": qk_norm,
            "scale_attn_norm": scale_attn_norm,
            "scale_mlp_norm": scale_mlp_norm,
            "attn_drop_rate": attn_drop,
        }
        if wrong := [name for name, value in unsupported.items() if value]:
            raise ValueError(f"{', '.join(wrong)} cannot be used with {attention} attention; leave it out")
        if attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
        if attention != "seqnorm" and order != "auto":
            raise ValueError(f"{attention} attention has one order of computation; leave out order={order!r}")
        # only what was asked for: timm's layers before 1.0.21 take neither
        factory: dict[str, Any] = {k: v for k, v in (("device", device), ("dtype", dtype)) if v is not None}
        options = {"order": order} if attention == "seqnorm" else {}
        self.norm1 = norm_layer(dim, **factory)
        self.attn = ATTENTIONS[attention](
            dim,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            proj_drop=proj_drop,
            **options,
            **factory,
        )
        self.ls1 = LayerScale(dim, init_values=init_values, **factory) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim, **factory)
        self.mlp = mlp_layer(
            in_features=dim,
            hidden_features=int(dim * mlp_ratio),
            act_layer=act_layer,
            bias=proj_bias,
            drop=proj_drop,
            **factory,
        )
        self.ls2 = LayerScale(dim, init_values=init_values, **factory) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    @property
    def streams(self) -> bool:
        """Whether the block has the two phases."""
        return isinstance(self.attn, SeqNormAttention)

    def summarise(self, x: Float[Tensor, "b n c"], mask: Weight = None) -> Moments:
        """All that the block needs to know of the tokens; summaries of disjoint sets merge."""
        return self._two_phase().summarise(self.norm1(x), mask)

    def finish(self, state: Moments) -> tuple[Tensor, Tensor]:
        """What `map` needs, computed once from the summary of all tokens."""
        return self._two_phase().finish(state)

    def map(self, state: Moments | tuple[Tensor, Tensor], x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """The block's output for tokens counted in `state`, which is a summary or a finished one."""
        attn = self._two_phase()
        finished = attn.finish(state) if isinstance(state, Moments) else state
        return self._residual(x, attn.map(finished, self.norm1(x)))

    def forward(self, x: Float[Tensor, "b n c"], mask: Weight = None) -> Float[Tensor, "b n c"]:
        """The block over all tokens at once; `mask` is True (or weight 1) for real tokens, others may hold anything."""
        # here and not after the norm: in backward, NaN under a mask is NaN in the gradient of the norm's weights
        x = without_padding(x, mask)
        return self._residual(x, self.attn(self.norm1(x), mask))

    def _two_phase(self) -> SeqNormAttention:
        if not isinstance(self.attn, SeqNormAttention):
            raise ValueError(
                f"{type(self.attn).__name__} needs every pair of tokens and has no summary of fixed size; "
                'use attention="seqnorm"'
            )
        return self.attn

    def _residual(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(attended))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
