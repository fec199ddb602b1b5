"""A fixed number of landmarks from any number of tokens, as averages over disjoint groups of them.

    landmark_j = sum over tokens i of group j of w_i x_i / sum of w_i

With a grid the groups are its cells: the token at (y, x) of (height, width) belongs to cell
(floor(y rows / height), floor(x columns / width)). Without one they are stretches of the sequence: the token of rank r
among R real ones belongs to group floor(r m / R), so that a padded set gives what it gives alone.

A group without real tokens is empty (fewer tokens than landmarks, or a cell of padding). Its landmark is zero and
`real` is False for it; attention takes that as `landmark_mask`, and then the landmark has no part in anything.

Shapes: leading axes are batch; n tokens, m landmarks, c channels (all heads side by side).
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sansmax.ops.moments import Weight, at_least_float32, nonzero
from sansmax.ops.sums import fields_of, row_of


class LandmarkSums(NamedTuple):
    """Weight and weighted sum of each group over the tokens seen so far, in float32 or wider."""

    n: Float[Tensor, "*b m"]
    total: Float[Tensor, "*b m c"]

    @classmethod
    def of(
        cls, x: Float[Tensor, "*b n c"], group: Int[Tensor, "*b n"], num_landmarks: int, weight: Weight = None
    ) -> "LandmarkSums":
        """Sums of one set of tokens, the group of each given; `weight` is True (or 1) for real tokens."""
        # autocast would form the sums in half precision
        with torch.autocast(x.device.type, enabled=False):
            c = x.shape[-1]
            x = at_least_float32(x)
            w = x.new_ones(x.shape[:-1]) if weight is None else weight.to(x.dtype)
            if weight is not None and weight.dtype == torch.bool:
                # padding may hold anything: it is summed in a group of its own, that nobody reads
                group = torch.where(weight, group, num_landmarks)
            elif weight is not None:
                x = x * w.unsqueeze(-1)
            # one long list of tokens, and of the groups of all images one after the other
            images = torch.ones(x.shape[:-2], dtype=torch.int64, device=x.device).flatten().cumsum(0) - 1
            row = (group.flatten(0, -2) if group.ndim > 1 else group[None]) + images[:, None] * (num_landmarks + 1)
            groups = images.shape[0] * (num_landmarks + 1)
            n = x.new_zeros(groups).index_add(0, row.flatten(), w.flatten())
            total = x.new_zeros(groups, c).index_add(0, row.flatten(), x.reshape(-1, c))
            shape = (*x.shape[:-2], num_landmarks + 1)
            return cls(n.view(shape)[..., :-1], total.view(*shape, c)[..., :-1, :])

    def merge(self, other: "LandmarkSums") -> "LandmarkSums":
        """Sums of the union of two disjoint sets of tokens."""
        return LandmarkSums(self.n + other.n, self.total + other.total)

    def to_sum(self, part: int, parts: int) -> Float[Tensor, "s"]:
        """The sums as a row that adds up over sets of tokens: m (c + 1) numbers per image."""
        return row_of(self)

    def of_sum(self, total: Float[Tensor, "s"], parts: int) -> "LandmarkSums":
        """The sums of all sets from the sum of their rows."""
        return LandmarkSums(*fields_of(total, self))

    def value(self) -> Float[Tensor, "*b m c"]:
        """The landmarks, zero for an empty group."""
        return self.total / nonzero(self.n).unsqueeze(-1)

    def real(self) -> Bool[Tensor, "*b m"]:
        """True for the landmarks whose groups are not empty."""
        return self.n != 0


def sequence_groups(
    x: Float[Tensor, "*b n c"],
    num_landmarks: int,
    weight: Weight = None,
    *,
    first: int | Int[Tensor, "*b"] = 0,
    total: int | Int[Tensor, "*b"] | None = None,
) -> Int[Tensor, "*b n"]:
    """The group of each token of a sequence: `num_landmarks` stretches of equal length, but for one token.

    A token of weight 0 has no rank and no group to speak of. For a chunk of a longer sequence, `first` is how many
    real tokens come before it, and `total` how many the whole sequence has.
    """
    if weight is None:
        real = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    else:
        real = weight if weight.dtype == torch.bool else weight != 0
    rank = real.cumsum(-1) - 1
    total = real.sum(-1) if total is None else total
    if isinstance(first, Tensor):
        first = first.unsqueeze(-1)
    if isinstance(total, Tensor):
        total = total.unsqueeze(-1).clamp_min(1)
    # an absent token at the very front would have rank -1
    return ((rank + first).clamp_min(0) * num_landmarks // total).clamp_max(num_landmarks - 1)


def grid_groups(
    x: Float[Tensor, "*b n c"], grid: tuple[int, int], cells: tuple[int, int], *, first: int = 0
) -> Int[Tensor, "*b n"]:
    """The group of each token of a grid in row-major order: `cells` (rows, columns) of the grid (height, width).

    A grid that the cells divide gives the cells of adaptive average pooling; else they differ by at most one token in
    height and width, and no token is in two. For a chunk of the grid, `first` is the index of its first token.
    """
    height, width = grid
    i = torch.arange(x.shape[-2], device=x.device) + first
    group = (i // width * cells[0] // height) * cells[1] + i % width * cells[1] // width
    return group.expand(x.shape[:-1])


def sequence_landmarks(
    x: Float[Tensor, "*b n c"], num_landmarks: int, weight: Weight = None
) -> tuple[Float[Tensor, "*b m c"], Bool[Tensor, "*b m"]]:
    """Landmarks of whole sequences, in float32 or wider, and which of them are real."""
    sums = LandmarkSums.of(x, sequence_groups(x, num_landmarks, weight), num_landmarks, weight)
    return sums.value(), sums.real()


def grid_landmarks(
    x: Float[Tensor, "*b n c"], grid: tuple[int, int], cells: tuple[int, int], weight: Weight = None
) -> tuple[Float[Tensor, "*b m c"], Bool[Tensor, "*b m"]]:
    """Landmarks of whole grids, in float32 or wider, and which of them are real.

    Raises ValueError for a grid that has another number of tokens than `x`.
    """
    if grid[0] * grid[1] != x.shape[-2]:
        raise ValueError(
            f"grid {grid[0]} x {grid[1]} has {grid[0] * grid[1]} tokens, but x has {x.shape[-2]}; give (height, width) "
            "of the token grid in row-major order"
        )
    sums = LandmarkSums.of(x, grid_groups(x, grid, cells), cells[0] * cells[1], weight)
    return sums.value(), sums.real()
