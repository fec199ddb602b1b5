"""Transformer blocks in two phases: summarise the tokens, then map each token by the summary.

    block(x) == block.map(block.summarise(x), x)

Summaries of disjoint sets of tokens merge, so a whole image, a stream of chunks and several devices run the same
code. The modules here hold parameters; the mathematics is in `sansmax.ops`.

Shapes: b images, n tokens, c channels.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from timm.layers.drop import DropPath
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from sansmax.models.attention import (
    Others,
    PointwiseAttention,
    SeqNormAttention,
    SimAAttention,
    SoftmaxAttention,
    attend_among,
)
from sansmax.models.attention_soft import Place, SoftAttention
from sansmax.ops.moments import Weight, without_padding
from sansmax.ops.pointwise import ACTIVATIONS

ATTENTIONS: dict[str, Callable[..., nn.Module]] = {
    "softmax": SoftmaxAttention,
    "seqnorm": SeqNormAttention,
    "sima": SimAAttention,
    "soft": SoftAttention,
    **{name: partial(PointwiseAttention, activation=name) for name in ACTIVATIONS},
}


class Block(nn.Module):
    """Pre-norm transformer block, `x + attn(norm1(x))` then `x + mlp(norm2(x))`, with any attention of this package.

    Arguments and parameter names are those of timm's block, so timm builds it (`block_fn`) and weights exchange.
    `attn_options` go to the layer of `attention` (see `sansmax.models.attention`).

    Raises ValueError for an attention that does not exist, an option or order that it lacks, and options of timm's
    block that this one lacks.
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
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        mlp_layer: Callable[..., nn.Module] = Mlp,
        attn_layer: object = None,
        depth: int = 0,
        attention: str = "seqnorm",
        order: str = "auto",
        attn_options: Mapping[str, Any] | None = None,
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
        if attention == "soft" and (attn_options or {}).get("ratio") is not None:
            raise ValueError(
                "ratio asks for landmarks by convolution, which need the grid of tokens that a block is not given; "
                "use num_landmarks, or the layer sansmax.models.attention_soft.SoftAttention by itself"
            )
        # only what was asked for: timm's layers before 1.0.21 take neither
        factory: dict[str, Any] = {k: v for k, v in (("device", device), ("dtype", dtype)) if v is not None}
        self.norm1 = norm_layer(dim, **factory)
        self.attn: Any = _attention(
            attention,
            dim,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            proj_drop=proj_drop,
            order=order,
            **(attn_options or {}),
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
        return self.attn.streams

    @property
    def rounds(self) -> int:
        """How often the tokens are summarised before they can be mapped."""
        return self.attn.rounds

    def summarise(
        self, x: Float[Tensor, "b n c"], mask: Weight = None, known: Any = None, place: Place | None = None
    ) -> Any:
        """All that the block needs to know of the tokens; summaries of disjoint sets merge.

        In a second round `known` is what `finish` gave in the first. `place` says where a chunk stands among all
        tokens, which pooled landmarks need; None is the whole.
        """
        where = {} if place is None or self.rounds == 1 else {"place": place}
        return self._two_phase().summarise(self.norm1(without_padding(x, mask)), mask, known, **where)

    def finish(self, state: Any, known: Any = None) -> Any:
        """What `map` (or the next round) needs, computed once from the summary of all tokens."""
        return self._two_phase().finish(state, known)

    def map(self, state: Any, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """The block's output for tokens that are counted in `state`: a summary, or better what `finish` made of it."""
        finished = self.finish(state) if hasattr(state, "merge") else state
        return self._residual(x, self._two_phase().map(finished, self.norm1(x)))

    def forward(
        self, x: Float[Tensor, "b n c"], mask: Weight = None, others: Others | None = None
    ) -> Float[Tensor, "b n c"]:
        """The block over all tokens at once; `mask` is True (or weight 1) for real tokens, others may hold anything.

        With `others` the tokens are one's own, and these hold the rest.
        """
        # here and not after the norm: in backward, NaN under a mask is NaN in the gradient of the norm's weights
        x = without_padding(x, mask)
        if others is None:
            return self._residual(x, self.attn(self.norm1(x), mask))
        return self._residual(x, attend_among(self._two_phase(), self.norm1(x), mask, others))

    def _two_phase(self) -> Any:
        if not self.streams:
            raise ValueError(
                f"{type(self.attn).__name__} has no summary of fixed size that chunks of tokens could share; use "
                'attention="seqnorm", "sima", or "soft" with pooled landmarks'
            )
        return self.attn

    def _residual(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(attended))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def _attention(name: str, *arguments: Any, **options: Any) -> nn.Module:
    try:
        return ATTENTIONS[name](*arguments, **options)
    except TypeError as e:
        raise ValueError(f"{name} attention does not take these options: {e}") from e
