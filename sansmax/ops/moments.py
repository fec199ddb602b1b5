"""Count, mean and centred second moment of a set of tokens, merged without losing digits.

The sums over tokens that sequence normalisation needs, and the plain mean that a pooled head needs. Sets of tokens
merge by the pairwise formula of Chan, Golub and LeVeque (1979), never by E[x^2] - E[x]^2, so chunks, devices and the
whole image give the same numbers.

A weight per token runs through every sum: 1 is a token, 0 is none. A mask is such a weight, and the gradient by the
weight is the effect of removing the token.

Shapes: leading axes are batch (and head); n tokens, c channels.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sansmax.ops.checks import IMPLEMENTATIONS, check_choice
from sansmax.ops.moments_blocked import MomentsBesideTokens, centred_moments
from sansmax.ops.sums import fields_of, in_slot, row_of, slots_of, symmetric_of, triangle_of

Weight = Bool[Tensor, "*b n"] | Float[Tensor, "*b n"] | None


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or as it is where it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_padding(x: Float[Tensor, "*b n c"], weight: Weight) -> Float[Tensor, "*b n c"]:
    """`x` with zeros where a boolean `weight` is False: padding may hold anything, and 0 * NaN is NaN."""
    if weight is None or weight.dtype != torch.bool:
        return x
    return x.masked_fill(~weight.unsqueeze(-1), 0.0)


def centred(
    x: Float[Tensor, "*b n c"], weight: Weight
) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b c"], Float[Tensor, "*b n c"], Float[Tensor, "*b n c"]]:
    """Count, mean, the tokens less their mean, and the same times their weights, in float32 or wider."""
    x = at_least_float32(without_padding(x, weight))
    if weight is None:
        n = x.shape[-2]
        count = x.new_full(x.shape[:-2], n)
        mean = x.sum(-2) / max(n, 1)
        x = x - mean.unsqueeze(-2)
        return count, mean, x, x
    w = weight.to(x.dtype)
    count = w.sum(-1)
    mean = (w.unsqueeze(-2) @ x).squeeze(-2) / nonzero(count).unsqueeze(-1)
    x = x - mean.unsqueeze(-2)
    return count, mean, x, x * w.unsqueeze(-1)


def nonzero(count: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """`count`, or 1 where it is 0, to divide by: the sums over no tokens are 0 already."""
    return torch.where(count == 0, torch.ones_like(count), count)


def merged(state: Any, other: Any) -> Any:
    """The state of the union of two sets of tokens, of which the first may be none yet (None)."""
    return other if state is None else state.merge(other)


class Moments(NamedTuple):
    """What is known of the tokens seen so far; `scatter` is the sum of (x - mean)(x - mean)^T."""

    n: Float[Tensor, "*b"]
    mean: Float[Tensor, "*b c"]
    scatter: Float[Tensor, "*b c c"]

    @classmethod
    def of(cls, x: Float[Tensor, "*b n c"], weight: Weight = None, *, impl: str = "auto") -> "Moments":
        """Moments of one set of tokens; `weight` is True (or 1) for real tokens.

        `impl` is "blocks" (`sansmax.ops.moments_blocked`, no copy of the tokens, for no weight or a mask) or "torch"
        (plain PyTorch); "auto" is blocks where it can.
        """
        check_choice("impl", impl, IMPLEMENTATIONS, "second moments")
        by_weight = weight is not None and weight.dtype != torch.bool
        if by_weight and impl == "blocks":
            raise ValueError('impl "blocks" of second moments takes boolean masks; use impl="torch" with weights')
        # autocast would form the sum over all tokens in half precision
        with torch.autocast(x.device.type, enabled=False):
            if by_weight or impl == "torch":
                count, mean, x, weighted = centred(x, weight)
                return cls(count, mean, weighted.mT @ x)
            lead = x.shape[:-2]
            images = (math.prod(lead), *x.shape[-2:])
            mean, scatter = centred_moments(x.reshape(images), None if weight is None else weight.reshape(images[:2]))
            if weight is None:
                count = mean.new_full(lead, x.shape[-2])
            else:
                count = weight.sum(-1).to(mean.dtype)
            return cls(count, mean.reshape(*lead, -1), scatter.reshape(*lead, *scatter.shape[-2:]))

    @classmethod
    def beside(cls, x: Float[Tensor, "b n c"], weight: Weight = None) -> tuple["Moments", Float[Tensor, "b n c"]]:
        """`Moments.of(x, weight)`, and `x` to be used instead of `x` afterwards: backward then needs less memory.

        Only for a use whose backward makes the gradient of `x` anew, as a product does: it is overwritten.
        """
        tracked = torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()
        if not tracked or (weight is not None and weight.dtype != torch.bool):
            return cls.of(x, weight), x
        with torch.autocast(x.device.type, enabled=False):
            mean, scatter, x = MomentsBesideTokens.apply(x, weight)
            count = mean.new_full(x.shape[:1], x.shape[1]) if weight is None else weight.sum(-1).to(mean.dtype)
            return cls(count, mean, scatter), x

    def merge(self, other: "Moments") -> "Moments":
        """Moments of the union of two disjoint sets of tokens."""
        count = self.n + other.n
        share = other.n / nonzero(count)
        delta = other.mean - self.mean
        mean = self.mean + share.unsqueeze(-1) * delta
        between = (self.n * share)[..., None, None] * (delta.unsqueeze(-1) * delta.unsqueeze(-2))
        return Moments(count, mean, self.scatter + other.scatter + between)

    def to_sum(self, part: int, parts: int) -> Float[Tensor, "s"]:
        """The moments as a row that adds up over `parts` sets of tokens, of which this one is number `part`.

        Per image: count and mean in slots, then the triangle of the scatter, p (c + 1) + c (c + 1) / 2 numbers.
        """
        slots = in_slot(row_of((self.n, self.mean)), part, parts)
        return torch.cat((slots, triangle_of(self.scatter).flatten()))

    def of_sum(self, total: Float[Tensor, "s"], parts: int) -> "Moments":
        """The moments of all sets from the sum of their rows; `self` is one of them.

        What the sum of the scatters lacks is the scatter of the means, sum of n_p (m_p - m)(m_p - m)^T.
        """
        own, c = (self.n, self.mean), self.mean.shape[-1]
        slots = parts * sum(field.numel() for field in own)
        n, means = slots_of(total[:slots], parts, own)
        count = n.sum(0)
        # from one of the means, that of most tokens: the others differ little from it, so no digits are lost
        reference = means.take_along_dim(n.argmax(0)[None, ..., None], 0).squeeze(0)
        share = (n / nonzero(count)).unsqueeze(-1)
        mean = reference + (share * (means - reference)).sum(0)
        away = means - mean
        between = torch.einsum("p...i,p...j->...ij", n.unsqueeze(-1) * away, away)
        scatter = symmetric_of(total[slots:].view(*self.n.shape, -1), c)
        return Moments(count, mean, scatter + between)

    def covariance(self) -> Float[Tensor, "*b c c"]:
        """The biased covariance of the tokens, zero for one token or none."""
        return self.scatter / nonzero(self.n)[..., None, None]


class Mean(NamedTuple):
    """The state of mean pooling: how many tokens, and their sum."""

    n: Float[Tensor, "*b"]
    total: Float[Tensor, "*b c"]

    @classmethod
    def of(cls, x: Float[Tensor, "*b n c"], weight: Weight = None) -> "Mean":
        """Sums of one set of tokens; `weight` is True (or 1) for real tokens."""
        with torch.autocast(x.device.type, enabled=False):
            x = at_least_float32(without_padding(x, weight))
            if weight is None:
                return cls(x.new_full(x.shape[:-2], x.shape[-2]), x.sum(-2))
            w = weight.to(x.dtype)
            return cls(w.sum(-1), (w.unsqueeze(-2) @ x).squeeze(-2))

    def merge(self, other: "Mean") -> "Mean":
        """Sums of the union of two disjoint sets of tokens."""
        return Mean(self.n + other.n, self.total + other.total)

    def to_sum(self, part: int, parts: int) -> Float[Tensor, "s"]:
        """The sums as a row that adds up over sets of tokens."""
        return row_of(self)

    def of_sum(self, total: Float[Tensor, "s"], parts: int) -> "Mean":
        """The sums of all sets from the sum of their rows."""
        return Mean(*fields_of(total, self))

    def value(self) -> Float[Tensor, "*b c"]:
        """The mean of the tokens, zero over none."""
        return self.total / nonzero(self.n).unsqueeze(-1)
