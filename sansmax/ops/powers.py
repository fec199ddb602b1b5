"""Powers of scalar products as scalar products of features, summed and read without keeping the features.

    (x . y)^p = f(x) . f(y)    f(x) = sqrt(p! / (m_1! ... m_d!)) x_1^m_1 ... x_d^m_d,  m_1 + ... + m_d = p

Only the distinct products of p channels are made, C(d + p - 1, p) of them, for a chunk of tokens at a time, and again
in backward. Two operators are each other's derivative: sums over tokens, f(K)^T V, and reading, f(Q) S.

Shapes: leading axes are batch and head; n tokens, d channels, e value channels, f features. float32 or wider.
"""

import math
from functools import lru_cache
from itertools import combinations_with_replacement, pairwise
from typing import Any

import torch
from torch import Tensor

# features times tokens made at once; enough tokens for full products, and a few megabytes that stay in the cache
CHUNK = 2**20
FEWEST_TOKENS = 64


def count_features(d: Any, degree: int) -> Any:
    """How many distinct products `degree` of `d` channels have: C(d + degree - 1, degree), for a traced `d` too."""
    count = 1
    for i in range(degree):
        count = count * (d + i) // (i + 1)
    return count


@lru_cache(maxsize=16)
def _roots(d: int, degree: int) -> Tensor:
    """The square root of how often each product occurs, (f, 1) in float64."""
    times = [
        math.factorial(degree) / math.prod(math.factorial(product.count(i)) for i in set(product))
        for product in combinations_with_replacement(range(d), degree)
    ]
    return torch.tensor(times, dtype=torch.float64).sqrt().unsqueeze(-1)


def _rows(d: int, degree: int) -> list[tuple[slice, slice]]:
    """Of the products whose lowest channel is 0, 1, ...: their rows, and those of what that channel multiplies.

    Products are in lexicographic order, so a channel multiplies those of one degree less from its own on.
    """
    starts = [count_features(d, degree) - count_features(d - i, degree) for i in range(d)]
    ends = [*starts[1:], count_features(d, degree)]
    lower = count_features(d, degree - 1)
    return [(slice(start, end), slice(lower - (end - start), lower)) for start, end in zip(starts, ends, strict=True)]


def _flat(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def _chunks(x: Tensor, features: int) -> tuple[list[tuple[slice, slice]], int, int]:
    """Heads and tokens of each chunk, and the most of either."""
    heads, n, _ = x.shape
    tokens = max(1, min(n, max(FEWEST_TOKENS, CHUNK // features)))
    together = max(1, min(heads, CHUNK // (features * tokens)))
    chunks = [
        (slice(g, min(g + together, heads)), slice(i, min(i + tokens, n)))
        for g in range(0, heads, together)
        for i in range(0, n, tokens)
    ]
    return chunks, together, tokens


class _Products:
    """Room for the products of 1, 2, ... channels of a chunk of tokens, (heads, f, n) for each degree."""

    def __init__(self, x: Tensor, degree: int, together: int, tokens: int) -> None:
        self.d, self.degree = x.shape[-1], degree
        self.room = [x.new_empty(together * count_features(self.d, p) * tokens) for p in range(1, degree + 1)]

    def views(self, heads: int, n: int) -> list[Tensor]:
        sizes = (count_features(self.d, p) for p in range(1, self.degree + 1))
        return [room[: heads * f * n].view(heads, f, n) for room, f in zip(self.room, sizes, strict=True)]

    def of(self, x: Tensor) -> list[Tensor]:
        """Products of each degree of the tokens `x`, (heads, n, d)."""
        levels = self.views(x.shape[0], x.shape[1])
        levels[0].copy_(x.mT)
        for p, (lower, level) in enumerate(pairwise(levels), start=2):
            for i, (rows, tail) in enumerate(_rows(self.d, p)):
                torch.mul(lower[:, tail], levels[0][:, i : i + 1], out=level[:, rows])
        return levels


def _weighted(sums: Tensor, d: int, degree: int) -> Tensor:
    return sums * _roots(d, degree).to(sums)


@torch.library.custom_op("sansmax::power_sums", mutates_args=())
def power_sums(k: Tensor, v: Tensor, degree: int) -> Tensor:
    """The sum of f(k) v^T over tokens, (..., f, e)."""
    with torch.autocast(k.device.type, enabled=False):
        d, e, features = k.shape[-1], v.shape[-1], count_features(k.shape[-1], degree)
        keys, values = _flat(k), _flat(v)
        sums = k.new_zeros(keys.shape[0], features, e)
        chunks, together, tokens = _chunks(keys, features)
        products = _Products(keys, degree, together, tokens)
        for g, i in chunks:
            sums[g].baddbmm_(products.of(keys[g, i])[-1], values[g, i])
        return _weighted(sums, d, degree).view(*k.shape[:-2], features, e)


@torch.library.custom_op("sansmax::power_read", mutates_args=())
def power_read(q: Tensor, sums: Tensor, degree: int) -> Tensor:
    """f(q) times the sums, (..., n, e)."""
    with torch.autocast(q.device.type, enabled=False):
        queries, state = _flat(q), _weighted(_flat(sums), q.shape[-1], degree)
        out = q.new_empty(*queries.shape[:2], state.shape[-1])
        chunks, together, tokens = _chunks(queries, state.shape[-2])
        products = _Products(queries, degree, together, tokens)
        for g, i in chunks:
            out[g, i] = products.of(queries[g, i])[-1].mT @ state[g]
        return out.view(*q.shape[:-1], state.shape[-1])


@torch.library.custom_op("sansmax::power_slope", mutates_args=())
def power_slope(x: Tensor, left: Tensor, sums: Tensor, degree: int) -> Tensor:
    """The gradient by x, token for token, of f(x) times the sums times `left`, (..., n, d)."""
    with torch.autocast(x.device.type, enabled=False):
        tokens_of, lefts, d = _flat(x), _flat(left), x.shape[-1]
        state = _weighted(_flat(sums), d, degree)
        out = x.new_empty(tokens_of.shape)
        chunks, together, tokens = _chunks(tokens_of, state.shape[-2])
        products, slopes = (_Products(tokens_of, degree, together, tokens) for _ in range(2))
        for g, i in chunks:
            levels = products.of(tokens_of[g, i])
            by = slopes.views(levels[0].shape[0], levels[0].shape[2])
            for level in by[:-1]:
                level.zero_()
            torch.bmm(state[g], lefts[g, i].mT, out=by[-1])
            for p in range(degree, 1, -1):
                lower, to_lower, to_level = levels[p - 2], by[p - 2], by[p - 1]
                for c, (rows, tail) in enumerate(_rows(d, p)):
                    by[0][:, c] += torch.linalg.vecdot(to_level[:, rows], lower[:, tail], dim=1)
                    to_lower[:, tail].addcmul_(to_level[:, rows], levels[0][:, c : c + 1])
            out[g, i] = by[0].mT
        return out.view(x.shape)


@power_sums.register_fake
def _(k, v, degree):
    return k.new_empty(*k.shape[:-2], count_features(k.shape[-1], degree), v.shape[-1])


@power_read.register_fake
def _(q, sums, degree):
    return q.new_empty(*q.shape[:-1], sums.shape[-1])


@power_slope.register_fake
def _(x, left, sums, degree):
    return x.new_empty(x.shape)


def _keep(ctx, inputs, output):
    *tensors, ctx.degree = inputs
    ctx.save_for_backward(*tensors)


def _sums_backward(ctx, grad):
    k, v = ctx.saved_tensors
    return power_slope(k, v, grad, ctx.degree), power_read(k, grad, ctx.degree), None


def _read_backward(ctx, grad):
    q, sums = ctx.saved_tensors
    return power_slope(q, grad, sums, ctx.degree), power_sums(q, grad, ctx.degree), None


power_sums.register_autograd(_sums_backward, setup_context=_keep)
power_read.register_autograd(_read_backward, setup_context=_keep)
