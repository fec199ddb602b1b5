"""The SOFT layer: attention to landmarks, https://arxiv.org/abs/2110.11945 and https://arxiv.org/abs/2207.03341.

Keys are the queries, so there are projections to queries and values only. The landmarks are made of the queries,

* pooled to a fixed number (`num_landmarks`), for token sets of any length, with or without a grid: linear cost; or
* by a convolution on the token grid (`ratio`, its kernel and stride), LayerNorm and GELU, as published: their number
  grows with the image, and the cost with n^2 / ratio^2. `landmark_grid` averages them to a fixed number of cells after
  the convolution: nothing where there are as many, linear cost on larger grids, with the published weights.

The published layers add a depthwise convolution of V on the grid (`value_kernel`), one filter for a whole head.

Pooled landmarks are averages of queries, and so projections of averages of tokens: the layer reads the tokens once
for those averages, once for P^T V, and once to map them. Where there are fewer landmarks than channels of a head, the
order "folded" never makes V nor the outputs of the heads (`sansmax.ops.soft.soft_affine`).

Shapes: b images, n tokens, c channels, h heads, d channels per head, m landmarks.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sansmax.models.attention import Attention
from sansmax.ops.checks import check_choice, check_layer
from sansmax.ops.landmarks import LandmarkSums, sequence_groups
from sansmax.ops.moments import Weight, merged, without_padding
from sansmax.ops.soft import (
    INVERSES,
    SoftLayerState,
    SoftState,
    landmark_inverse,
    soft_affine,
    soft_attention,
    soft_layer_rows,
)
from sansmax.ops.soft_pieces import soft_apply

# queries in memory at a time where no gradients are wanted
CHUNK_TOKENS = 4096


class Place(NamedTuple):
    """Where a chunk of tokens stands: how many real tokens come before it, and how many there are, per image."""

    first: Int[Tensor, "b"]
    total: Int[Tensor, "b"]


class Landmarks(NamedTuple):
    """Landmarks of each head, and which of them are real."""

    values: Float[Tensor, "b h m d"]
    real: Bool[Tensor, "b m"] | None


class Reading(NamedTuple):
    """What maps a query to the output of its head: the kernel with the landmarks, times `right`."""

    landmarks: Float[Tensor, "b h m d"]
    right: Float[Tensor, "b h m d"]


class FoldedReading(NamedTuple):
    """What maps the queries of all heads to the output of the layer: their rows of the kernel, times `right`."""

    landmarks: Float[Tensor, "b h m d"]
    right: Float[Tensor, "b k c"]


class SoftAttention(Attention):
    """SOFT attention (`normalized=True`: SOFT++) with landmarks pooled or convolved from the queries.

    `inverse` is "cholesky" (exact), "newton" (the published SOFT, unfinished on purpose) or "halved" (SOFT++); see
    `sansmax.ops.inverse`. `ratio` asks for landmarks by convolution, `value_kernel` for the convolution of V; `forward`
    then needs the `grid` of tokens.

    Raises ValueError if `dim` is not a multiple of `num_heads`, and for choices that do not exist.
    """

    mechanism = "soft"
    # a sum over the tokens
    fits_float16 = False
    orders = ("auto", "quadratic", "linear", "folded")
    rounds = 2

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        order: str = "auto",
        *,
        num_landmarks: int = 49,
        ratio: int | None = None,
        landmark_grid: tuple[int, int] | None = None,
        value_kernel: int | None = None,
        inverse: str = "cholesky",
        normalized: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, order)
        check_choice("inverse", inverse, INVERSES, "soft attention")
        for name, value in (("num_landmarks", num_landmarks), ("ratio", 1 if ratio is None else ratio)):
            if value < 1:
                raise ValueError(f"{name} of soft attention must be at least 1, got {value}")
        if landmark_grid is not None and ratio is None:
            raise ValueError("landmark_grid averages landmarks made by convolution; give the ratio of that too")
        if value_kernel is not None and value_kernel % 2 == 0:
            raise ValueError(f"value_kernel must be odd, for a convolution around each token, got {value_kernel}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_landmarks, self.ratio, self.landmark_grid = num_landmarks, ratio, landmark_grid
        self.options: dict[str, Any] = {"inverse": inverse, "normalized": normalized}
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.v = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        if ratio is not None:
            # one convolution for all heads
            d = dim // num_heads
            self.landmark_conv = nn.Conv2d(d, d, kernel_size=ratio, stride=ratio, bias=False, **factory)
            self.landmark_norm = nn.LayerNorm(d, eps=1e-5, **factory)
        self.value_conv: nn.Conv2d | None = None
        if value_kernel is not None:
            self.value_conv = nn.Conv2d(
                num_heads, num_heads, value_kernel, padding=value_kernel // 2, groups=num_heads, bias=False, **factory
            )

    @property
    def folds(self) -> bool:
        """Whether V and the outputs of the heads are never made: by choice, or because it costs less."""
        return self.order == "folded" or (
            self.order == "auto" and self.num_landmarks < self.q.weight.shape[0] // self.num_heads and self.streams
        )

    @property
    def streams(self) -> bool:
        """Whether the layer has the two phases; a convolution needs whole rows of neighbours."""
        return self.ratio is None and self.value_conv is None

    def forward(
        self, x: Float[Tensor, "b n c"], mask: Weight = None, grid: tuple[int, int] | None = None
    ) -> Float[Tensor, "b n c"]:
        """Attention over all tokens at once; `grid` is the (height, width) of the tokens in row-major order."""
        check_layer(x, mask)
        x = without_padding(x, mask)
        if self.streams and self.folds and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return without_padding(self._folded_in_chunks(x, mask), mask)
        if not self.streams:
            self._check_grid(x.shape[1], mask, grid)
        q = self._heads(self.q(x))
        if self.ratio is not None:
            assert grid is not None
            landmarks = Landmarks(self._convolved(q, grid), None)
        else:
            landmarks = self.finish(self.summarise(x, mask))
        if self.folds:
            rows = soft_layer_rows(q, landmarks.values, mask)
            finished = self.finish(SoftLayerState.of(rows, x, mask), landmarks)
            return without_padding(self._read(rows, finished.right, x), mask)
        v = self.v(x)
        q, heads_v = self.in_range(q, self._heads(v))
        out = soft_attention(
            q,
            heads_v,
            landmarks.values,
            mask=mask,
            landmark_mask=landmarks.real,
            order=self.order,
            **self.options,
        )
        out = out.transpose(1, 2).flatten(2)
        if self.value_conv is not None:
            assert grid is not None
            out = out + self._convolved_values(v, grid)
        return without_padding(self.proj_drop(self.out_of(self.proj, out)), mask)

    def _folded_in_chunks(self, x: Float[Tensor, "b n c"], mask: Weight) -> Float[Tensor, "b n c"]:
        # the rows of the kernel wait for their sums; queries are there of one chunk only
        landmarks = self.finish(self.summarise(x, mask))
        rows = x.new_empty(*x.shape[:2], self.num_heads * self.num_landmarks, dtype=landmarks.values.dtype)
        state = None
        for first in range(0, x.shape[1], CHUNK_TOKENS):
            chunk = slice(first, first + CHUNK_TOKENS)
            some, real = x[:, chunk], None if mask is None else mask[:, chunk]
            rows[:, chunk] = soft_layer_rows(self._heads(self.q(some)), landmarks.values, real)
            state = merged(state, SoftLayerState.of(rows[:, chunk], some, real))
        return self._read(rows, self.finish(state, landmarks).right, x)

    def _heads(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b h n d"]:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _out(self, heads: Float[Tensor, "b h n d"]) -> Float[Tensor, "b n c"]:
        return self.proj_drop(self.out_of(self.proj, heads.transpose(1, 2).flatten(2)))

    def _pooled(self, sums: LandmarkSums) -> Landmarks:
        # in the precision of the sums: the inverse amplifies rounding
        dtype, real, bias = sums.total.dtype, sums.real(), self.q.bias
        with torch.autocast(sums.total.device.type, enabled=False):
            values = F.linear(sums.value(), self.q.weight.to(dtype), None if bias is None else bias.to(dtype))
        return Landmarks(self._heads(values).masked_fill(~real[:, None, :, None], 0.0), real)

    def _check_grid(self, n: int, mask: Weight, grid: tuple[int, int] | None) -> None:
        if grid is None or grid[0] * grid[1] != n:
            raise ValueError(
                f"convolutions need the grid of the {n} tokens as grid=(height, width), got {grid}; "
                "for tokens without a grid build the layer with ratio=None and value_kernel=None"
            )
        if self.ratio is not None and min(grid) < self.ratio:
            raise ValueError(f"a token grid of {grid[0]} x {grid[1]} is smaller than the landmark ratio {self.ratio}")
        if mask is not None:
            raise ValueError(
                "convolutions mix neighbours and cannot leave out masked tokens; "
                "build the layer with ratio=None and value_kernel=None, or give images without padding"
            )

    def _convolved(self, q: Float[Tensor, "b h n d"], grid: tuple[int, int]) -> Float[Tensor, "b h m d"]:
        d = q.shape[-1]
        # the published code convolves queries divided by d^(1/4), and compares these with the landmarks
        x = (q * d**-0.25).transpose(-1, -2).flatten(0, 1).unflatten(-1, grid)
        x = self.landmark_conv(x)
        if self.landmark_grid is not None:
            rows, columns = self.landmark_grid
            x = F.adaptive_avg_pool2d(x, (min(rows, x.shape[-2]), min(columns, x.shape[-1])))
        x = F.gelu(self.landmark_norm(x.flatten(2).mT)) * d**0.25
        return x.unflatten(0, (-1, self.num_heads))

    def _convolved_values(self, v: Float[Tensor, "b n c"], grid: tuple[int, int]) -> Float[Tensor, "b n c"]:
        conv, c = self.value_conv, v.shape[-1]
        assert conv is not None
        # tokens are a map whose channels lie together; a filter for each channel is one of its head
        filters = conv.weight.repeat_interleave(c // self.num_heads, dim=0)
        x = F.conv2d(v.mT.unflatten(2, grid), filters, padding=conv.padding, groups=c)
        return x.flatten(2).mT

    # The two phases, for pooled landmarks

    def summarise(
        self,
        x: Float[Tensor, "b n c"],
        mask: Weight = None,
        known: Landmarks | None = None,
        place: Place | None = None,
    ) -> LandmarkSums | SoftState | SoftLayerState:
        """Sums of tokens per landmark; with the landmarks `known`, P^T V. `place` says where a chunk stands."""
        if known is not None and self.folds:
            return SoftLayerState.of(soft_layer_rows(self._heads(self.q(x)), known.values, mask), x, mask)
        if known is not None:
            return SoftState.of(self._heads(self.q(x)), self._heads(self.v(x)), known.values, mask)
        where = {} if place is None else {"first": place.first, "total": place.total}
        groups = sequence_groups(x, self.num_landmarks, mask, **where)
        return LandmarkSums.of(x, groups, self.num_landmarks, mask)

    def summarise_to_send(
        self, x: Float[Tensor, "b n c"], mask: Weight = None, known: Any = None, place: Place | None = None
    ) -> LandmarkSums | SoftState:
        """As `summarise`, P^T V of each head also where P^T X would be less work: it is a share 1 / h of its size."""
        if known is None:
            sums = self.summarise(x, mask, None, place)
            assert isinstance(sums, LandmarkSums)
            return sums
        return SoftState.of(self._heads(self.q(x)), self._heads(self.v(x)), known.values, mask)

    def finish(self, state: Any, known: Landmarks | None = None) -> Any:
        """The `Landmarks` from the sums of all tokens, and what `map` needs from P^T V of all tokens."""
        if isinstance(state, LandmarkSums):
            return self._pooled(state)
        assert known is not None
        inverse = landmark_inverse(known.values, known.real, **self.options)
        if isinstance(state, SoftLayerState):
            return FoldedReading(
                known.values, soft_affine(state, inverse, self.v.weight, self.v.bias, self.proj.weight)
            )
        return Reading(known.values, inverse.to(state.pv.dtype) @ state.pv)

    def map(self, finished: Reading | FoldedReading, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """The layer's output for tokens that are counted in the finished state."""
        q = self._heads(self.q(x))
        if isinstance(finished, FoldedReading):
            return self._read(soft_layer_rows(q, finished.landmarks), finished.right, x)
        return self._out(soft_apply(*self.in_range(q), finished.landmarks, finished.right, None))

    def _read(
        self, rows: Float[Tensor, "b n k"], right: Float[Tensor, "b k c"], x: Float[Tensor, "b n c"]
    ) -> Float[Tensor, "b n c"]:
        # in the precision of the rows: the inverse amplifies rounding
        with torch.autocast(x.device.type, enabled=False):
            out = rows @ right if self.proj.bias is None else torch.baddbmm(self.proj.bias.to(right.dtype), rows, right)
        return self.proj_drop(out.to(x.dtype))
