"""The l1 norm over tokens of a linear projection, `sum over tokens of |x W^T + b|`, without keeping the projection.

A block of tokens is projected at a time. Backward projects it again for its signs,

    dX = (sign(Q) * g) W,   dW = (sign(Q) * g)^T X,   db = sum of sign(Q) * g        with Q = X W^T + b

so the memory is that of one block, forward and backward.

Shapes: b images, n tokens, c channels, e projected channels; `mask` is True for real tokens.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# tokens in work at a time: 1,024 of 768 projected channels in float32 are 3 MiB
BLOCK_TOKENS = {"cpu": 1024, "cuda": 65536}


@torch.library.custom_op("sansmax::projected_l1_norm", mutates_args=())
def projected_l1_norm(x: Tensor, w: Tensor, b: Tensor | None, mask: Tensor | None) -> Tensor:
    """The norms (b, e) for tokens `x` (b, n, c), weights `w` (e, c) and bias `b` (e), in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = x.new_zeros((x.shape[0], w.shape[0]), dtype=wide)
    for i, _, piece, real in _blocks(x, mask):
        q = F.linear(piece, w.to(x.dtype), None if b is None else b.to(x.dtype)).abs_()
        if real is not None:
            q.masked_fill_(~real, 0.0)
        norm[i] += q.sum(0, dtype=wide)
    return norm


def _blocks(x: Tensor, mask: Tensor | None) -> Iterator[tuple[int, slice, Tensor, Tensor | None]]:
    step = BLOCK_TOKENS.get(x.device.type, 4096)
    for i in range(x.shape[0]):
        for first in range(0, x.shape[1], step):
            where = slice(first, first + step)
            yield i, where, x[i, where], None if mask is None else mask[i, where].unsqueeze(-1)


@projected_l1_norm.register_fake
def _(x: Tensor, w: Tensor, b: Tensor | None, mask: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[0]), dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("sansmax::projected_l1_norm_backward", mutates_args=())
def _gradients(
    by_norm: Tensor, x: Tensor, w: Tensor, b: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    by_x, by_w, by_b = torch.empty_like(x), by_norm.new_zeros(w.shape), by_norm.new_zeros(w.shape[0])
    for i, where, piece, real in _blocks(x, mask):
        s = F.linear(piece, w.to(x.dtype), None if b is None else b.to(x.dtype)).sign_().mul_(by_norm[i])
        if real is not None:
            s.masked_fill_(~real, 0.0)
            piece = piece.masked_fill(~real, 0.0)
        torch.mm(s, w.to(x.dtype), out=by_x[i, where])
        by_w += s.mT @ piece
        by_b += s.sum(0, dtype=by_b.dtype)
    return by_x, by_w.to(w.dtype), by_b.to(w.dtype)


@_gradients.register_fake
def _(by_norm: Tensor, x: Tensor, w: Tensor, b: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(w), w.new_empty(w.shape[0])


def _setup(ctx, inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, by_norm: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
    x, w, b, mask = ctx.saved_tensors
    with torch.autocast(x.device.type, enabled=False):
        by_x, by_w, by_b = _gradients(by_norm, x, w, b, mask)
    return by_x, by_w, None if b is None else by_b.to(b.dtype), None


projected_l1_norm.register_autograd(_backward, setup_context=_setup)
