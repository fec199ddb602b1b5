"""The sums of SOFT attention over tokens in pieces, without any temporary of the size of the tokens.

    soft_summarise   S = P^T (w V)             P = exp(-|q - l|^2 / (2 sqrt d)), one column per landmark
    soft_apply       out = P R
    soft_mix         out = P Z (P^T (w V))     both at once, with the m x m matrix Z between them
    soft_rows        P itself, for layers that multiply it with something else than V

Without `soft_rows` P is never whole. Tokens pass in pieces small enough for the cache, through buffers that are used
again. Where a row of P fits into a row of the result (m <= d, and not of 16 bit) `soft_mix` computes P once: its rows
wait in the place of the results that are made of them; else it computes P twice. Backward keeps inputs and m-sized
matrices, and computes P again.

These are `torch.library` operators: opaque to compile and export, with first derivatives only.

Shapes: b images, h heads, n tokens, d channels per head, m landmarks; q, v and outputs are (b, h, n, d), landmarks, S
and R (b, h, m, d), Z (b, h, m, m), w (b, n): boolean (True = real token; out is zero at the others) or floating.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sansmax.ops.moments import at_least_float32

# entries of P in a piece: what fits into a cache of 1 to 2 MB beside the tokens it is made of, or fills a GPU
CPU_PIECE, GPU_PIECE = 2**18, 2**24
# tokens of an image in a piece, at least: many images with few landmarks would be products of a few rows else
LEAST_TOKENS = 64


class _Pieces:
    """Pieces of the tokens, one after the other: rows of P, centred tokens, and other tensors in the same pieces."""

    def __init__(self, q: Tensor, landmarks: Tensor, weight: Tensor | None):
        self.q = q
        self.landmarks = at_least_float32(landmarks)
        self.dtype = torch.promote_types(torch.promote_types(q.dtype, landmarks.dtype), torch.float32)
        self.landmarks = self.landmarks.to(self.dtype)
        self.real = weight if weight is not None and weight.dtype == torch.bool else None
        self.weight = weight if self.real is None else None
        self.m = landmarks.shape[2]
        # distances do not change when all points move; near zero their squares lose no digits
        self.centre = self.landmarks.mean(2, keepdim=True)
        self.scale = q.shape[3] ** -0.5
        self.points = self.landmarks - self.centre
        self.columns = (self.points * self.scale).mT
        self.offset = -0.5 * self.scale * self.points.square().sum(-1).unsqueeze(2)
        b, h, n, _ = q.shape
        piece = CPU_PIECE if q.device.type == "cpu" else GPU_PIECE
        self.step = min(max(1, n), max(LEAST_TOKENS, piece // (h * self.m)))
        self.images = min(max(1, b), max(1, piece // (h * self.m * self.step)))
        self.buffers: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        b, n = self.q.shape[0], self.q.shape[2]
        for i in range(0, b, self.images):
            for t in range(0, n, self.step):
                yield slice(i, min(b, i + self.images)), slice(t, min(n, t + self.step))

    def buffer(self, name: str, at: tuple[slice, slice], width: int) -> Tensor:
        """A contiguous (images, h, tokens, width) that holds what was last written to this name."""
        shape = (at[0].stop - at[0].start, self.q.shape[1], at[1].stop - at[1].start, width)
        if name not in self.buffers:
            size = self.images * self.q.shape[1] * self.step * width
            self.buffers[name] = torch.empty(size, dtype=self.dtype, device=self.q.device)
        return self.buffers[name][: shape[0] * shape[1] * shape[2] * width].view(shape)

    def clear(self, x: Tensor, at: tuple[slice, slice]) -> Tensor:
        """`x` with zeros at the tokens that are none, in place."""
        return x if self.real is None else x.masked_fill_(~self.real[at][:, None, :, None], 0.0)

    def tokens(self, at: tuple[slice, slice]) -> Tensor:
        """The queries less the centre of the landmarks."""
        i, t = at
        out = self.buffer("tokens", at, self.q.shape[3])
        return self.clear(torch.sub(self.q[i, :, t], self.centre[i], out=out), at)

    def kernel(self, at: tuple[slice, slice], room: Tensor | None = None) -> Tensor:
        """The rows of P, zero at the tokens that are none; in `room` where that is given."""
        tokens, p = self.tokens(at), self.buffer("p", at, self.m) if room is None else room
        squares = torch.mul(tokens, tokens, out=self.buffer("squares", at, self.q.shape[3]))
        norms = torch.sum(squares, -1, keepdim=True, out=self.buffer("norms", at, 1))
        torch.add(self.offset[at[0]], norms, alpha=-0.5 * self.scale, out=p)
        flat(p).baddbmm_(flat(tokens), flat(self.columns[at[0]]))
        return self.clear(p.exp_(), at)

    def read(self, x: Tensor, at: tuple[slice, slice], weight: Tensor | None = None) -> Tensor:
        """A piece of another tensor of tokens, times weights, zero at tokens that are none; not to write to."""
        piece = x[at[0], :, at[1]]
        if self.real is None and weight is None and x.dtype == self.dtype:
            return piece
        piece = self.clear(self.buffer("weighted" if weight is not None else "read", at, x.shape[3]).copy_(piece), at)
        return piece if weight is None else piece.mul_(weight[at][:, None, :, None])

    def room(self, result: Tensor, at: tuple[slice, slice]) -> Tensor | None:
        """Where the rows of P can wait: in the place of the rows of a result, if they fit, digits included."""
        if self.m > result.shape[3] or result.dtype != self.dtype:
            return None
        i, t = at
        # whole tokens of one image, or whole images, lie together
        place = result.transpose(1, 2)[i, t].view(-1)
        shape = (i.stop - i.start, self.q.shape[1], t.stop - t.start, self.m)
        return place[: shape[0] * shape[1] * shape[2] * shape[3]].view(shape)

    def kept(self, result: Tensor, at: tuple[slice, slice]) -> Tensor:
        """The rows of P that wait in the place of `result`, or else made again."""
        room = self.room(result, at)
        return self.kernel(at) if room is None else room

    def summarise(self, x: Tensor, weight: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """P^T (w x), P left in the place of the result `keep` where it fits."""
        total = x.new_zeros((*self.landmarks.shape[:3], x.shape[3]), dtype=self.dtype)
        for at in self:
            p = self.kernel(at, None if keep is None else self.room(keep, at))
            flat(total[at[0]]).baddbmm_(flat(p).mT, flat(self.read(x, at, weight)))
        return total

    def apply(self, right: Tensor, out: Tensor, kept: bool = False) -> Tensor:
        """P R, written to `out`."""
        for at in self:
            p = self.kept(out, at) if kept else self.kernel(at)
            y = self.buffer("y", at, out.shape[3])
            torch.bmm(flat(p), flat(right[at[0]]), out=flat(y))
            out[at[0], :, at[1]].copy_(y)
        return out


def flat(x: Tensor) -> Tensor:
    """Images and heads as one axis; a view wherever it is written to."""
    return x.flatten(0, 1)


def _operator(name: str, schema: str) -> Any:
    return torch.library.custom_op(f"sansmax::{name}", mutates_args=(), schema=schema)


def _wide(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def _backward(
    pieces: _Pieces,
    grad_q: Tensor,
    *,
    out: tuple[Tensor, Tensor] | None = None,
    value: tuple[Tensor, Tensor] | None = None,
    kept: bool = False,
    grad_read: Tensor | None = None,
    grad_v: Tensor | None = None,
    grad_w: Tensor | None = None,
) -> Tensor:
    """Gradients of out = P R, given (gradient of out, R), and of S = P^T (w V), given (V, gradient of S).

    dP = dout R^T + (w V) dS^T, dR = P^T dout, dV = w P dS.
    Writes those of q, R, V and w, and returns that of the landmarks.
    """
    sums = _landmark_sums(pieces)
    for at in pieces:
        i, t = at
        p = flat(pieces.kept(grad_q, at) if kept else pieces.kernel(at))
        e, tokens = flat(pieces.buffer("e", at, pieces.m)), flat(pieces.tokens(at))
        if out is not None:
            y = flat(pieces.read(out[0], at))
            torch.bmm(y, flat(out[1][i]).mT, out=e)
            if grad_read is not None:
                flat(grad_read[i]).baddbmm_(p.mT, y)
        if value is not None:
            x = flat(pieces.read(value[0], at, pieces.weight))
            e.baddbmm_(x, flat(value[1][i]).mT, beta=0 if out is None else 1)
            dv = pieces.buffer("y", at, x.shape[2])
            torch.bmm(p, flat(value[1][i]), out=flat(dv))
            if pieces.weight is not None:
                assert grad_w is not None
                grad_w[at].copy_((dv * pieces.read(value[0], at)).sum((1, 3)))
                dv.mul_(pieces.weight[at][:, None, :, None])
            if grad_v is not None:
                grad_v[i, :, t].copy_(dv)
        _through_kernel(pieces, at, e.mul_(p), tokens, grad_q, sums)
    return _of_landmarks(pieces, sums)


def _through_kernel(
    pieces: _Pieces, at: tuple[slice, slice], e: Tensor, tokens: Tensor, grad_q: Tensor, sums: tuple[Tensor, Tensor]
) -> None:
    """Of E = dP * P of one piece: writes dq = (E l - (E 1) q) / sqrt d, and adds E^T q and E^T 1 to the sums."""
    i, t = at
    flat(sums[0][i]).baddbmm_(e.mT, tokens)
    flat(sums[1][i]).add_(e.sum(1).unsqueeze(-1))
    row = torch.sum(e, -1, keepdim=True, out=flat(pieces.buffer("norms", at, 1)))
    # the squares are not needed any more
    dq = pieces.buffer("squares", at, pieces.q.shape[3])
    torch.mul(tokens, row, out=flat(dq)).baddbmm_(e, flat(pieces.points[i]), beta=-pieces.scale, alpha=pieces.scale)
    grad_q[i, :, t].copy_(dq)


def _landmark_sums(pieces: _Pieces) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(pieces.landmarks), torch.zeros_like(pieces.landmarks[..., :1])


def _of_landmarks(pieces: _Pieces, sums: tuple[Tensor, Tensor]) -> Tensor:
    """dl = (E^T q - (E^T 1) l) / sqrt d."""
    return (sums[0] - sums[1] * pieces.points) * pieces.scale


@_operator("soft_summarise", "(Tensor q, Tensor v, Tensor landmarks, Tensor? weight) -> Tensor")
def soft_summarise(q: Tensor, v: Tensor, landmarks: Tensor, weight: Tensor | None) -> Tensor:
    """P^T (w V), in float32 or wider."""
    with torch.autocast(q.device.type, enabled=False):
        pieces = _Pieces(q, landmarks, weight)
        return pieces.summarise(v, pieces.weight)


@soft_summarise.register_fake
def _(q: Tensor, v: Tensor, landmarks: Tensor, weight: Tensor | None) -> Tensor:
    return landmarks.new_empty(landmarks.shape, dtype=_wide(q, landmarks))


@_operator(
    "soft_summarise_backward",
    "(Tensor grad, Tensor q, Tensor v, Tensor landmarks, Tensor? weight) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _summarise_backward(
    grad: Tensor, q: Tensor, v: Tensor, landmarks: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        pieces = _Pieces(q, landmarks, weight)
        dq, dv, dw = _like_tokens(q), _like_tokens(v), _like_weight(q, weight)
        dl = _backward(pieces, dq, value=(v, grad.to(pieces.dtype)), grad_v=dv, grad_w=dw)
        return dq, dv, dl.to(landmarks.dtype), dw


@_summarise_backward.register_fake
def _(
    grad: Tensor, q: Tensor, v: Tensor, landmarks: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _like_tokens(q), _like_tokens(v), landmarks.new_empty(landmarks.shape), _like_weight(q, weight)


def _save_summarise(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_summarise(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # once: checkpointing unpacks what was saved a single time
    saved = ctx.saved_tensors
    dq, dv, dl, dw = _summarise_backward(grad, *saved)
    return dq, dv, dl, _or_none(dw, saved[3])


soft_summarise.register_autograd(_differentiate_summarise, setup_context=_save_summarise)


@_operator("soft_apply", "(Tensor q, Tensor landmarks, Tensor right, Tensor? weight) -> Tensor")
def soft_apply(q: Tensor, landmarks: Tensor, right: Tensor, weight: Tensor | None) -> Tensor:
    """P R, in the dtype of `q`; a floating `weight` changes nothing."""
    with torch.autocast(q.device.type, enabled=False):
        pieces = _Pieces(q, landmarks, weight)
        return pieces.apply(right.to(pieces.dtype), _like_tokens(q))


@soft_apply.register_fake
def _(q: Tensor, landmarks: Tensor, right: Tensor, weight: Tensor | None) -> Tensor:
    return _like_tokens(q)


@_operator(
    "soft_apply_backward",
    "(Tensor grad, Tensor q, Tensor landmarks, Tensor right, Tensor? weight) -> (Tensor, Tensor, Tensor)",
)
def _apply_backward(
    grad: Tensor, q: Tensor, landmarks: Tensor, right: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        pieces = _Pieces(q, landmarks, weight)
        wide = right.to(pieces.dtype)
        dq, dr = _like_tokens(q), wide.new_zeros(wide.shape)
        dl = _backward(pieces, dq, out=(grad, wide), grad_read=dr)
        return dq, dl.to(landmarks.dtype), dr.to(right.dtype)


@_apply_backward.register_fake
def _(
    grad: Tensor, q: Tensor, landmarks: Tensor, right: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _like_tokens(q), landmarks.new_empty(landmarks.shape), right.new_empty(right.shape)


def _save_apply(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_apply(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_apply_backward(grad, *ctx.saved_tensors), None


soft_apply.register_autograd(_differentiate_apply, setup_context=_save_apply)


@_operator("soft_mix", "(Tensor q, Tensor v, Tensor landmarks, Tensor z, Tensor? weight) -> (Tensor, Tensor)")
def soft_mix(q: Tensor, v: Tensor, landmarks: Tensor, z: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """P Z (P^T (w V)) in the dtype of `q`, and P^T (w V) in float32 or wider."""
    with torch.autocast(q.device.type, enabled=False):
        pieces, out = _Pieces(q, landmarks, weight), _like_tokens(q)
        total = pieces.summarise(v, pieces.weight, keep=out)
        return pieces.apply(z.to(pieces.dtype) @ total, out, kept=True), total


@soft_mix.register_fake
def _(q: Tensor, v: Tensor, landmarks: Tensor, z: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    return _like_tokens(q), landmarks.new_empty(landmarks.shape, dtype=_wide(q, landmarks))


@_operator(
    "soft_mix_backward",
    "(Tensor grad, Tensor grad_total, Tensor total, Tensor q, Tensor v, Tensor landmarks, Tensor z, Tensor? weight) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _mix_backward(
    grad: Tensor,
    grad_total: Tensor,
    total: Tensor,
    q: Tensor,
    v: Tensor,
    landmarks: Tensor,
    z: Tensor,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        pieces = _Pieces(q, landmarks, weight)
        dq, dv, dw = _like_tokens(q), _like_tokens(v), _like_weight(q, weight)
        wide = z.to(pieces.dtype)
        # R = Z S, so dZ = dR S^T and dS = Z^T dR
        dr = pieces.summarise(grad, keep=dq)
        ds = wide.mT @ dr + grad_total
        value, out = (v, ds), (grad, wide @ total)
        dl = _backward(pieces, dq, out=out, value=value, kept=True, grad_v=dv, grad_w=dw)
        return dq, dv, dl.to(landmarks.dtype), (dr @ total.mT).to(z.dtype), dw


@_mix_backward.register_fake
def _(
    grad: Tensor,
    grad_total: Tensor,
    total: Tensor,
    q: Tensor,
    v: Tensor,
    landmarks: Tensor,
    z: Tensor,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    small = landmarks.new_empty(landmarks.shape), z.new_empty(z.shape)
    return _like_tokens(q), _like_tokens(v), *small, _like_weight(q, weight)


def _save_mix(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs)


def _differentiate_mix(ctx: Any, grad: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    dq, dv, dl, dz, dw = _mix_backward(grad, grad_total, *saved)
    return dq, dv, dl, dz, _or_none(dw, saved[5])


soft_mix.register_autograd(_differentiate_mix, setup_context=_save_mix)


@_operator("soft_rows", "(Tensor q, Tensor landmarks, Tensor? weight) -> Tensor")
def soft_rows(q: Tensor, landmarks: Tensor, weight: Tensor | None) -> Tensor:
    """P itself as (b, n, h m), in float32 or wider; zero at tokens that are none."""
    with torch.autocast(q.device.type, enabled=False):
        pieces, (b, h, n, _) = _Pieces(q, landmarks, weight), q.shape
        out = q.new_empty(b, n, h, pieces.m, dtype=pieces.dtype).transpose(1, 2)
        for at in pieces:
            out[at[0], :, at[1]].copy_(pieces.kernel(at))
        return out.transpose(1, 2).flatten(2)


@soft_rows.register_fake
def _(q: Tensor, landmarks: Tensor, weight: Tensor | None) -> Tensor:
    b, h, n, _ = q.shape
    return q.new_empty(b, n, h * landmarks.shape[2], dtype=_wide(q, landmarks))


@_operator(
    "soft_rows_backward", "(Tensor grad, Tensor p, Tensor q, Tensor landmarks, Tensor? weight) -> (Tensor, Tensor)"
)
def _rows_backward(
    grad: Tensor, p: Tensor, q: Tensor, landmarks: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        pieces, dq, heads = _Pieces(q, landmarks, weight), _like_tokens(q), (q.shape[1], landmarks.shape[2])
        sums, grad, p = _landmark_sums(pieces), grad.unflatten(2, heads), p.unflatten(2, heads)
        for i, t in pieces:
            e = pieces.buffer("e", (i, t), pieces.m)
            torch.mul(grad[i, t].transpose(1, 2), p[i, t].transpose(1, 2), out=e)
            _through_kernel(pieces, (i, t), flat(pieces.clear(e, (i, t))), flat(pieces.tokens((i, t))), dq, sums)
        return dq, _of_landmarks(pieces, sums).to(landmarks.dtype)


@_rows_backward.register_fake
def _(grad: Tensor, p: Tensor, q: Tensor, landmarks: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    return _like_tokens(q), landmarks.new_empty(landmarks.shape)


def _save_rows(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(output, *inputs)


def _differentiate_rows(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_rows_backward(grad, *ctx.saved_tensors), None


soft_rows.register_autograd(_differentiate_rows, setup_context=_save_rows)


def _like_weight(q: Tensor, weight: Tensor | None) -> Tensor:
    """Room for the gradient by the weight; an operator returns tensors, so an empty one where there is none."""
    if weight is None or weight.dtype == torch.bool:
        return q.new_empty(0)
    return weight.new_empty(weight.shape)


def _like_tokens(x: Tensor) -> Tensor:
    """Room for a result like `x`, the heads of a token side by side in memory, as projections have them."""
    b, h, n, d = x.shape
    return x.new_empty(b, n, h, d).transpose(1, 2)


def _or_none(grad: Tensor, weight: Tensor | None) -> Tensor | None:
    return None if weight is None or weight.dtype == torch.bool else grad
