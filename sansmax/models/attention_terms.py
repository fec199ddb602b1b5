"""Attention layers that take the place of those in timm's blocks, with the terms that these have.

A term that acts on one token at a time is kept: norms of queries and keys, rotary positions, and a norm and a gate
after the heads. It changes what the mechanism is given, or what it gave:

    out = proj(gate(x) * norm(attend(rotate(q_norm(q)), rotate(k_norm(k)), v)))

Such a layer has the quadratic and the linear order; without terms it has all those of its mechanism. A term for each
pair of tokens (relative position bias, attention mask) has no place in a layer that never makes the pairs.

Shapes: b images, n tokens, c channels, h heads, d channels per head.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import Tensor, nn

from sansmax.models.attention import (
    HeadsAttention,
    PointwiseAttention,
    SeqNormAttention,
    SimAAttention,
    SoftmaxAttention,
)
from sansmax.models.attention_soft import SoftAttention
from sansmax.ops.checks import check_layer
from sansmax.ops.moments import Weight, without_padding
from sansmax.ops.pointwise import ACTIVATIONS


class Terms(NamedTuple):
    """What a layer has beside projections and mechanism; the modules are those of the layer that had them before.

    `q_norm` and `k_norm` act on each head, `norm` on the joined heads, `gate` projects the layer's input. Rotary
    positions come with each call, for all tokens but the first `num_prefix_tokens`; `rotate_half` is their layout.
    """

    q_norm: nn.Module | None = None
    k_norm: nn.Module | None = None
    norm: nn.Module | None = None
    gate: nn.Module | None = None
    rotary: bool = False
    rotate_half: bool = False
    num_prefix_tokens: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The terms that are there."""
        there = {
            "norms of queries and keys": self.q_norm or self.k_norm,
            "rotary positions": self.rotary,
            "a norm after the heads": self.norm,
            "a gate": self.gate,
        }
        return tuple(name for name, value in there.items() if value)


class WithTerms(HeadsAttention):
    """A layer of heads with `terms`, called as timm's blocks call theirs.

    Raises ValueError for the order "moments" together with a term.
    """

    def __init__(self, dim: int, num_heads: int = 8, *, terms: Terms | None = None, **arguments: Any) -> None:
        super().__init__(dim, num_heads, **arguments)
        terms = Terms() if terms is None else terms
        if terms.names and self.order == "moments":
            raise ValueError(
                f'order "moments" of {self.mechanism} attention needs a layer without {" and ".join(terms.names)}; '
                'use order="linear" or "auto"'
            )
        self.q_norm = terms.q_norm or nn.Identity()
        self.k_norm = terms.k_norm or nn.Identity()
        self.norm = terms.norm or nn.Identity()
        self.gate = terms.gate
        self.rotary, self.rotate_half = terms.rotary, terms.rotate_half
        self.num_prefix_tokens = terms.num_prefix_tokens
        self.has_terms = bool(terms.names)

    @property
    def streams(self) -> bool:
        """Whether the layer has the two phases, which work on the moments of its input."""
        return super().streams and not self.has_terms

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        mask: Weight = None,
        *,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        shared_rel_pos_bias: Tensor | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Attention over all tokens at once.

        `mask` is True for real tokens, or a weight per token. `rope` holds sines and cosines of the rotary positions.
        Raises ValueError for `attn_mask`, `is_causal` and `shared_rel_pos_bias`, terms for each pair of tokens.
        """
        refuse_pairs(self.mechanism, attn_mask, is_causal, shared_rel_pos_bias)
        if rope is None and not self.has_terms:
            return super().forward(x, mask)
        check_layer(x, mask)
        return without_padding(self._with_terms(without_padding(x, mask), mask, rope), mask)

    def _with_terms(self, x: Float[Tensor, "b n c"], mask: Weight, rope: Tensor | None) -> Float[Tensor, "b n c"]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        # norms and rotations may come out wider than the values
        q, k = (self._rotated(norm(y), rope).to(v.dtype) for norm, y in ((self.q_norm, q), (self.k_norm, k)))
        out = self.norm(self.attend(*self.in_range(q, k, v), mask, self.order).transpose(1, 2).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.out_of(self.proj, out))

    def _rotated(self, x: Float[Tensor, "b h n d"], rope: Tensor | None) -> Float[Tensor, "b h n d"]:
        if rope is None:
            return x
        prefix, rest = x[:, :, : self.num_prefix_tokens], x[:, :, self.num_prefix_tokens :]
        return torch.cat((prefix, apply_rot_embed_cat(rest, rope, half=self.rotate_half).to(x.dtype)), dim=2)


class SoftmaxWithTerms(WithTerms, SoftmaxAttention):
    """Softmax attention with terms."""


class SeqNormWithTerms(WithTerms, SeqNormAttention):
    """Sequence normalisation of the queries and keys that the terms made."""


class SimAWithTerms(WithTerms, SimAAttention):
    """SimA of the queries and keys that the terms made."""


class PointwiseWithTerms(WithTerms, PointwiseAttention):
    """Pointwise attention of the queries and keys that the terms made."""


class SoftWithTerms(SoftAttention):
    """SOFT attention, called as timm's blocks call theirs. It has no terms.

    Its landmarks are projections of averages of tokens, which terms between projection and attention would not be.
    """

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        mask: Weight = None,
        grid: tuple[int, int] | None = None,
        *,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        shared_rel_pos_bias: Tensor | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Attention over all tokens at once; raises ValueError for rotary positions and terms for pairs of tokens."""
        refuse_pairs(self.mechanism, attn_mask, is_causal, shared_rel_pos_bias)
        if rope is not None:
            raise ValueError(
                'soft attention cannot take rotary positions (rope): use another mechanism such as "sima", or a '
                "network without them"
            )
        return super().forward(x, mask, grid)


WITH_TERMS: dict[str, Callable[..., nn.Module]] = {
    "softmax": SoftmaxWithTerms,
    "seqnorm": SeqNormWithTerms,
    "sima": SimAWithTerms,
    "soft": SoftWithTerms,
    **{name: partial(PointwiseWithTerms, activation=name) for name in ACTIVATIONS},
}


def refuse_pairs(
    mechanism: str, attn_mask: Tensor | None, is_causal: bool, shared_rel_pos_bias: Tensor | None = None
) -> None:
    """Raises ValueError for a term that is there for each pair of tokens."""
    given = {"attn_mask": attn_mask is not None, "is_causal": is_causal}
    given["shared_rel_pos_bias"] = shared_rel_pos_bias is not None
    if wrong := [name for name, there in given.items() if there]:
        raise ValueError(
            f"a layer converted to {mechanism} attention cannot take {' and '.join(wrong)}, a term for each pair of "
            "tokens; leave it out, or use the network as it was before the conversion"
        )
