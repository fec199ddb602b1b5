"""The kernels of SimA's sums: a block of tokens at a time, so that no copy of them is made.

`l1_sums` are the three sums over queries, keys and values that are there already. Absolute values are taken in a buffer
that stays in the cache; backward is

    dQ = sign(Q) * g_q,   dK = sign(K) * g_k + V G^T,   dV = K G        with G the gradient of K^T V

`projected_l1_norm` is `sum over tokens of |x W^T + b|` without keeping the projection. Backward projects a block again
for its signs,

    dX = (sign(Q) * g) W,   dW = (sign(Q) * g)^T X,   db = sum of sign(Q) * g        with Q = X W^T + b

so the memory is that of one block, forward and backward.

Shapes: b images, h heads, n tokens, d channels per head, c channels, e projected channels; `mask` is True for real
tokens.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# tokens in work at a time: 1,024 of 768 projected channels in float32 are 3 MiB
BLOCK_TOKENS = {"cpu": 1024, "cuda": 65536}


@torch.library.custom_op("sansmax::l1_sums", mutates_args=())
def l1_sums(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """|Q|_1 and |K|_1 (b, h, d) and K^T V (b, h, d, d), in float32 or wider; `mask` is (b, h, n)."""
    b, h, n, d = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    norms = q.new_zeros((2, b, h, d), dtype=wide)
    kv = q.new_zeros((b, h, d, d), dtype=wide)
    step = BLOCK_TOKENS.get(q.device.type, 4096)
    # tokens first: heads are side by side in memory where a projection made them
    room = q.new_empty((min(step, n), h, d), dtype=wide)
    for i in range(b):
        for first in range(0, n, step):
            where = slice(first, first + step)
            q_i, k_i, v_i = (x[i, :, where] for x in (q, k, v))
            if mask is not None:
                hidden = ~mask[i, :, where].unsqueeze(-1)
                q_i, k_i, v_i = (x.masked_fill(hidden, 0.0) for x in (q_i, k_i, v_i))
            for norm, x in zip(norms[:, i], (q_i, k_i), strict=True):
                buffer = room[: x.shape[1]]
                torch.abs(buffer.copy_(x.transpose(0, 1)) if x.dtype != wide else x.transpose(0, 1), out=buffer)
                norm += buffer.sum(0)
            # not added token by token to the large sum, which would lose digits
            kv[i] += k_i.mT.to(wide) @ v_i.to(wide)
    return norms[0].clone(), norms[1].clone(), kv


@l1_sums.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    b, h, _, d = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    q_norm, k_norm = (q.new_empty((b, h, d), dtype=wide) for _ in "qk")
    return q_norm, k_norm, q.new_empty((b, h, d, d), dtype=wide)


def _keep_heads(ctx, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _heads_backward(ctx, by_q_norm: Tensor, by_k_norm: Tensor, by_kv: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    q, k, v, mask = ctx.saved_tensors
    wide = by_kv.dtype
    with torch.autocast(q.device.type, enabled=False):
        hidden = None if mask is None else ~mask.unsqueeze(-1)
        if hidden is not None:
            q, k, v = (x.masked_fill(hidden, 0.0) for x in (q, k, v))
        by_q = q.sign() * by_q_norm.unsqueeze(-2)
        by_k = v.to(wide) @ by_kv.mT + k.sign() * by_k_norm.unsqueeze(-2)
        by_v = k.to(wide) @ by_kv
        if hidden is not None:
            by_k, by_v = (x.masked_fill(hidden, 0.0) for x in (by_k, by_v))
        return by_q.to(q.dtype), by_k.to(k.dtype), by_v.to(v.dtype), None


l1_sums.register_autograd(_heads_backward, setup_context=_keep_heads)


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
    # bfloat16 has the range of float32; float16 has not
    wide = by_norm.dtype if x.dtype == torch.float16 else x.dtype
    for i, where, piece, real in _blocks(x, mask):
        s = F.linear(piece, w.to(x.dtype), None if b is None else b.to(x.dtype)).sign_().to(wide).mul_(by_norm[i])
        if real is not None:
            s.masked_fill_(~real, 0.0)
            piece = piece.masked_fill(~real, 0.0)
        by_x[i, where] = s @ w.to(wide)
        by_w += s.mT @ piece.to(wide)
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
