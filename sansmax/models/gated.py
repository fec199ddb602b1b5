"""Gated attention pooling (ABMIL): https://arxiv.org/abs/1802.04712, equations 8 and 9.

    a_i = w . (tanh(V h_i) * sigmoid(U h_i)),   z = sum_i exp(a_i) h_i / sum_i exp(a_i)

All that pooling needs of a set of tokens is the largest score, the sum of exponentials, and the sum of tokens times
exponentials; those of disjoint sets merge, so a bag in chunks gives what it gives at once. A weight per token runs
through both sums.

Shapes: b bags, n tokens, c channels.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sansmax.ops.moments import Weight, at_least_float32, nonzero, without_padding
from sansmax.ops.sums import in_slot, row_of, slots_of


class GatedScores(nn.Module):
    """The score of each token (b, n, 1), by a hidden layer with a gate."""

    def __init__(self, dim: int, hidden: int, **factory: Any) -> None:
        super().__init__()
        self.value = nn.Linear(dim, hidden, **factory)
        self.gate = nn.Linear(dim, hidden, **factory)
        # a bias would move all scores alike, and the softmax does not see that
        self.score = nn.Linear(hidden, 1, bias=False, **factory)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n 1"]:
        """Scores of tokens."""
        return self.score(self.value(x).tanh() * self.gate(x).sigmoid())


class GatedPool(NamedTuple):
    """Sums over the tokens seen so far, in float32 or wider, the exponentials relative to the largest score."""

    largest: Float[Tensor, "b"]
    n: Float[Tensor, "b"]
    total: Float[Tensor, "b c"]

    @classmethod
    def of(cls, x: Float[Tensor, "b n c"], scores: Float[Tensor, "b n"], weight: Weight = None) -> "GatedPool":
        """Sums of one set of tokens; `weight` is True (or 1) for real tokens."""
        with torch.autocast(x.device.type, enabled=False):
            x, scores = at_least_float32(without_padding(x, weight)), at_least_float32(scores)
            # any number would do, so no gradient runs through it; it keeps the exponentials below 1
            counted = scores.detach() if weight is None else scores.detach().masked_fill(weight == 0, -torch.inf)
            lowest = torch.finfo(scores.dtype).min
            largest = torch.cat((counted, counted.new_full((len(x), 1), lowest)), dim=1).amax(1)
            if weight is not None and weight.dtype == torch.bool:
                scores = scores.masked_fill(~weight, lowest)
            e = (scores - largest.unsqueeze(1)).exp()
            if weight is not None:
                e = e * weight.to(e.dtype)
            return cls(largest, e.sum(1), (e.unsqueeze(1) @ x).squeeze(1))

    def merge(self, other: "GatedPool") -> "GatedPool":
        """Sums of the union of two disjoint sets of tokens."""
        largest = torch.maximum(self.largest, other.largest)
        a, b = (self.largest - largest).exp(), (other.largest - largest).exp()
        n = a * self.n + b * other.n
        return GatedPool(largest, n, a.unsqueeze(1) * self.total + b.unsqueeze(1) * other.total)

    def to_sum(self, part: int, parts: int) -> Float[Tensor, "s"]:
        """The sums in a slot of a row that adds up over `parts` sets of tokens: p (c + 2) numbers per bag."""
        return in_slot(row_of(self), part, parts)

    def of_sum(self, total: Float[Tensor, "s"], parts: int) -> "GatedPool":
        """The sums of all sets from the sum of their rows."""
        scores, n, totals = slots_of(total, parts, self)
        largest = scores.amax(0)
        share = (scores - largest).exp()
        return GatedPool(largest, (share * n).sum(0), (share.unsqueeze(-1) * totals).sum(0))

    def value(self) -> Float[Tensor, "b c"]:
        """The weighted mean of the tokens, zero over none."""
        return self.total / nonzero(self.n).unsqueeze(-1)
