"""The SOFT layer for bags of any length: an average over the tokens where SOFT has a sum.

    out = (m / n) P Z P^T V

The sum P^T V of SOFT (https://arxiv.org/abs/2110.11945) grows with the number of tokens n. Images of one size do not
notice; bags of 500 and of 50,000 tokens would differ a hundredfold in the balance of attention and residual. Over
n / m tokens per landmark the output is that of SOFT at n = m, whatever the length.

Shapes: b bags, h heads, n tokens, m landmarks, d channels per head, c channels.
"""

from typing import Any, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from sansmax.models.attention_soft import Landmarks, Place, SoftAttention
from sansmax.ops.checks import check_layer
from sansmax.ops.landmarks import LandmarkSums
from sansmax.ops.moments import Weight, nonzero, without_padding


class CountedLandmarks(NamedTuple):
    """Landmarks of each head, which of them are real, and the tokens for each real one."""

    values: Float[Tensor, "b h m d"]
    real: Bool[Tensor, "b m"]
    tokens_each: Float[Tensor, "b"]


class MeanSoftAttention(SoftAttention):
    """`SoftAttention` with pooled landmarks, its sum over the tokens divided by the tokens per landmark.

    Arguments are those of `SoftAttention` without the convolutions.
    """

    mechanism = "soft"

    def forward(
        self, x: Float[Tensor, "b n c"], mask: Weight = None, grid: tuple[int, int] | None = None
    ) -> Float[Tensor, "b n c"]:
        """Attention over all tokens at once."""
        if self.folds:
            return super().forward(x, mask, grid)
        check_layer(x, mask)
        x = without_padding(x, mask)
        known = self.finish(self.summarise(x, mask))
        return without_padding(self.map(self.finish(self.summarise(x, mask, known), known), x), mask)

    def summarise(
        self, x: Float[Tensor, "b n c"], mask: Weight = None, known: Any = None, place: Place | None = None
    ) -> Any:
        """As in `SoftAttention`."""
        landmarks = None if known is None else Landmarks(known.values, known.real)
        return super().summarise(x, mask, landmarks, place)

    def finish(self, state: Any, known: Any = None) -> Any:
        """The landmarks, and how many tokens each stands for; then what `map` needs, averaged."""
        if isinstance(state, LandmarkSums):
            landmarks = super().finish(state)
            # fewer tokens than landmarks leave some without any
            real = landmarks.real.sum(-1).clamp_min(1).to(state.n.dtype)
            return CountedLandmarks(landmarks.values, landmarks.real, nonzero(state.n.sum(-1)) / real)
        reading = super().finish(state, Landmarks(known.values, known.real))
        each = known.tokens_each.view(-1, *[1] * (reading.right.ndim - 1))
        return reading._replace(right=reading.right / each.to(reading.right.dtype))
