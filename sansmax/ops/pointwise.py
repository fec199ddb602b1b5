"""Attention with a point-wise function in place of the softmax, and its linear form for polynomials.

    out = phi(Q K^T / sqrt(d) + bias) V / n^a    n = number of real tokens, phi entry by entry

phi is relu or squared relu (https://arxiv.org/abs/2309.08586, a = 1), sigmoid (https://arxiv.org/abs/2409.04431, with
bias = -log n and a = 0) or a power (https://arxiv.org/abs/2410.18613). No row is normalised, so blocks of keys add up
as they are:

* quadratic: 2 n^2 d, block by block in both passes, so that the n x n matrix never exists; any phi;
* linear, for powers: (x . y)^p = f(x) . f(y) with the C(d + p - 1, p) distinct products of p channels of x as features,
  each by the square root of how often it occurs; 2 n features d, and a state of features x d (`PointwiseState`).
  A bias is one more channel. d = 64: 2,080 features for p = 2, 45,760 for p = 3, 766,480 for p = 4, the last allowed.

The operators here recompute in backward and keep q, k, v and weights only. They have first derivatives, not second.

Shapes: b images, h heads, n tokens, d channels per head, f features.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sansmax.ops.checks import IMPLEMENTATIONS, check_choice, check_tokens
from sansmax.ops.moments import Weight, at_least_float32, nonzero, without_padding
from sansmax.ops.powers import count_features, power_read, power_sums

ORDERS = ("auto", "quadratic", "linear")
ACTIVATIONS = ("relu", "squared_relu", "sigmoid", "polynomial")
LAST_LINEAR_DEGREE = 4
# queries and keys of a block on a CPU: two blocks stay in the cache, and products fill the cores
BLOCK = 512
# a matrix of no more blocks than this for all heads together is made whole: blocks save no time there, nor much memory
WHOLE = 8


def pointwise_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n d"],
    *,
    mask: Weight = None,
    order: str = "auto",
    activation: str = "relu",
    degree: int = 2,
    length_exponent: float = 1.0,
    bias: float = 0.0,
    impl: str = "auto",
) -> Float[Tensor, "b h n d"]:
    """Attention whose weights are `activation` of the scores, divided by the number of tokens to `length_exponent`.

    `activation` is "relu", "squared_relu", "sigmoid" or "polynomial", the power `degree` (the others ignore it).
    `mask` is True for real tokens (PyTorch's padding masks use the opposite); a floating mask is a weight per token,
    and the number of tokens is its sum. `order` is "quadratic", "linear" (polynomials of degree 1 to 4) or "auto", the
    one of fewer multiplications; while exporting, "auto" is linear where it may, for the length is not known then.
    `impl` says how the quadratic order is carried out: "blocks" (memory linear in the tokens, first derivatives only),
    "torch" (the matrix whole, any derivative), or "auto", blocks where the matrix has more than a few of them.
    Sums are in float32 or wider, and results in the dtype of `q`. The output at masked tokens, and of an image without
    any real token, is zero. NaN in a real key or value is NaN in its whole image, and in no other.

    Raises ValueError for an order that the mechanism lacks, shapes or types that do not fit, and no tokens.
    """
    check_tokens(mask, q=q, k=k, v=v)
    allowed = check_form(activation, degree, order)
    check_choice("impl", impl, IMPLEMENTATIONS, "pointwise attention")
    real = mask[:, None, :, None] if mask is not None and mask.dtype == torch.bool else None
    if real is not None:
        # the padding may hold anything, NaN included, and 0 * NaN is NaN
        q, k, v = (x.masked_fill(~real, 0.0) for x in (q, k, v))
    if order == "linear" or (order == "auto" and "linear" in allowed and _linear_is_cheaper(q, degree, bias)):
        weight = None if mask is None else mask.unsqueeze(1).expand(q.shape[:3])
        state = PointwiseState.of(k, v, weight, degree=degree, bias=bias)
        out = pointwise_attend(state, q, degree=degree, length_exponent=length_exponent, bias=bias)
    else:
        # the length is only a name while a graph is traced; the operator looks at it when it runs
        small = not torch.compiler.is_compiling() and q.shape[:3].numel() * q.shape[2] <= WHOLE * _block(q) ** 2
        f = _direct if impl == "torch" or (impl == "auto" and small) else _blockwise
        out = f(q, k, v, mask, activation, degree, length_exponent, bias)
    return out if real is None else out.masked_fill(~real, 0.0)


def check_form(activation: str, degree: int, order: str) -> tuple[str, ...]:
    """The orders that this activation has; raises ValueError where `order` is none of them, or for no activation."""
    check_choice("activation", activation, ACTIVATIONS, "pointwise attention")
    if activation == "polynomial":
        _check_degree(degree)
        allowed = ORDERS if degree <= LAST_LINEAR_DEGREE else ORDERS[:2]
        check_choice("order", order, allowed, f"pointwise attention with a polynomial of degree {degree}")
    else:
        allowed = ORDERS[:2]
        check_choice("order", order, allowed, f"pointwise attention with {activation}, which is no polynomial,")
    return allowed


class PointwiseState(NamedTuple):
    """Sums over the tokens seen so far, for a polynomial, in float32 or wider."""

    n: Float[Tensor, "*b"]
    products: Float[Tensor, "*b f d"]

    @classmethod
    def of(
        cls,
        k: Float[Tensor, "*b n d"],
        v: Float[Tensor, "*b n d"],
        weight: Weight = None,
        *,
        degree: int = 2,
        bias: float = 0.0,
    ) -> "PointwiseState":
        """Sums of one set of tokens; `weight` is True (or 1) for real tokens; any `bias` but 0 is a channel of ones."""
        _check_degree(degree, LAST_LINEAR_DEGREE)
        with torch.autocast(k.device.type, enabled=False):
            k, v = (at_least_float32(without_padding(x, weight)) for x in (k, v))
            w = v.new_ones(v.shape[:-1]) if weight is None else weight.to(v.dtype)
            if bias != 0:
                k = torch.cat((k, torch.ones_like(k[..., :1])), dim=-1)
            return cls(w.sum(-1), power_sums(k, v * w.unsqueeze(-1), degree))

    def merge(self, other: "PointwiseState") -> "PointwiseState":
        """Sums of the union of two disjoint sets of tokens."""
        return PointwiseState(self.n + other.n, self.products + other.products)


def pointwise_attend(
    state: PointwiseState,
    q: Float[Tensor, "*b n d"],
    *,
    degree: int = 2,
    length_exponent: float = 1.0,
    bias: float = 0.0,
) -> Float[Tensor, "*b n d"]:
    """Reads the output for queries `q` from a state of the same `degree` and `bias`; in the dtype of `q`."""
    _check_degree(degree, LAST_LINEAR_DEGREE)
    d, found = q.shape[-1], state.products.shape[-2]
    if found != count_features(d + (bias != 0), degree):
        raise ValueError(
            f"state has {found} features, but queries of {d} channels with degree {degree} and bias {bias} have "
            f"{count_features(d + (bias != 0), degree)}; give the degree and the bias that the state was made with"
        )
    with torch.autocast(q.device.type, enabled=False):
        x = at_least_float32(q) * d**-0.5
        if bias != 0:
            x = torch.cat((x, torch.full_like(x[..., :1], bias)), dim=-1)
        share = nonzero(state.n).pow(-length_exponent)[..., None, None]
        return power_read(x, state.products * share, degree).to(q.dtype)


def _check_degree(degree: int, last: int | None = None) -> None:
    if isinstance(degree, bool) or not isinstance(degree, int) or degree < 1:
        raise ValueError(f"degree of a polynomial must be a whole number from 1 on, got {degree!r}")
    if last is not None and degree > last:
        raise ValueError(f"degree of a polynomial in linear order must be at most {last}, got {degree}")


def _linear_is_cheaper(q: Tensor, degree: int, bias: float) -> bool:
    if torch.compiler.is_exporting():
        return True
    n, d = q.shape[-2:]
    # a feature is one multiplication to make and d to use
    return count_features(d + (bias != 0), degree) * (d + 1) < n * d


def _block(x: Tensor) -> int:
    return BLOCK if x.device.type == "cpu" else 8 * BLOCK


def _share(mask: Weight, x: Tensor, length_exponent: float) -> Float[Tensor, "b n"]:
    """The weight of each token over n^a, in float32 or wider."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight = x.new_ones(x.shape[0], x.shape[2], dtype=dtype) if mask is None else mask.to(dtype)
    return weight * nonzero(weight.sum(-1, keepdim=True)).pow(-length_exponent)


def _direct(
    q: Tensor, k: Tensor, v: Tensor, mask: Weight, activation: str, degree: int, length_exponent: float, bias: float
) -> Tensor:
    """The formula, for so few tokens that the matrix is one block."""
    # at some tens of tokens the time is that of the calls: none without need
    autocast = torch.is_autocast_enabled(q.device.type)
    with torch.autocast(q.device.type, enabled=False) if autocast else nullcontext():
        dtype = q.dtype
        if dtype not in (torch.float32, torch.float64):
            q, k, v = (at_least_float32(x) for x in (q, k, v))
        if mask is None:
            v = v * q.shape[2] ** -length_exponent
        else:
            v = v * _share(mask, q, length_exponent)[:, None, :, None]
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        if bias != 0:
            scores.add_(bias)
        if activation == "sigmoid":
            scores = scores.sigmoid_()
        elif activation == "polynomial":
            scores = scores.pow(degree)
        else:
            scores = scores.relu_() if activation == "relu" else scores.relu_().square()
        return (scores @ v).to(dtype)


def _blockwise(
    q: Tensor, k: Tensor, v: Tensor, mask: Weight, activation: str, degree: int, length_exponent: float, bias: float
) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):
        weight = _share(mask, q, length_exponent)
    return _attention(q, k, v, weight, activation, degree, float(bias))


def _heads(weight: Tensor | None, *tensors: Tensor) -> tuple[list[Tensor], list[slice], int]:
    """Tensors (and the weight) with one axis for images and heads, the groups of heads at once, and the block's side.

    As many heads go together as fit in one block.
    """
    b, h, n, _ = tensors[0].shape
    side = min(_block(tensors[0]), n)
    together = max(1, _block(tensors[0]) ** 2 // side**2)
    flat = [x.reshape(b * h, n, -1) for x in tensors]
    if weight is not None:
        flat.append(weight[:, None].expand(b, h, n).reshape(b * h, n, 1))
    return flat, [slice(i, min(i + together, b * h)) for i in range(0, b * h, together)], side


def _parts(n: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def _buffer(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))


def _scores(q: Tensor, k: Tensor, bias: float, room: Tensor) -> Tensor:
    """Scores of queries that are scaled already, in the room for one block."""
    out = room[: q.shape[0] * q.shape[1] * k.shape[1]].view(q.shape[0], q.shape[1], k.shape[1])
    torch.bmm(q, k.mT, out=out)
    return out.add_(bias) if bias else out


@torch.library.custom_op("sansmax::pointwise_attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, activation: str, degree: int, bias: float) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):
        (qs, ks, vs, ws), groups, side = _heads(weight, q, k, v)
        n, d = q.shape[-2:]
        out = q.new_empty(qs.shape)
        room = _buffer(q, (groups[0].stop * side * side,))
        for g in groups:
            query, key = at_least_float32(qs[g]) * d**-0.5, at_least_float32(ks[g])
            value = at_least_float32(vs[g]) * ws[g]
            total = torch.zeros_like(value)
            for i in _parts(n, side):
                for j in _parts(n, side):
                    p = _scores(query[:, i], key[:, j], bias, room)
                    if activation == "sigmoid":
                        p.sigmoid_()
                    elif activation == "polynomial":
                        p.pow_(degree)
                    else:
                        p.relu_()
                        if activation == "squared_relu":
                            p.square_()
                    total[:, i].baddbmm_(p, value[:, j])
            out[g] = total
        return out.view(q.shape)


@_attention.register_fake
def _(q, k, v, weight, activation, degree, bias):
    return q.new_empty(q.shape)


@torch.library.custom_op("sansmax::pointwise_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, activation: str, degree: int, bias: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        (gs, qs, ks, vs, ws), groups, side = _heads(weight, grad, q, k, v)
        n, d = q.shape[-2:]
        of_q, of_k, of_v = (q.new_empty(qs.shape) for _ in "qkv")
        of_weight = weight.new_empty(qs.shape[:2])
        room, more = (_buffer(q, (groups[0].stop * side * side,)) for _ in range(2))
        for g in groups:
            by, query, key = at_least_float32(gs[g]), at_least_float32(qs[g]) * d**-0.5, at_least_float32(ks[g])
            value = at_least_float32(vs[g]) * ws[g]
            to_q = torch.zeros_like(value)
            # channels first: a product by the transpose of a whole block is a third slower
            to_k, to_v = (torch.zeros_like(value.mT, memory_format=torch.contiguous_format) for _ in "kv")
            for i in _parts(n, side):
                for j in _parts(n, side):
                    s = _scores(query[:, i], key[:, j], bias, room)
                    p = _activate_twice(s, activation, degree, more)
                    to_v[:, :, j].baddbmm_(by[:, i].mT, p)
                    if p is s:
                        slope = _scores(by[:, i], value[:, j], 0.0, more)
                    else:
                        slope = torch.bmm(by[:, i], value[:, j].mT, out=p)
                    _chain(slope, s, activation)
                    to_q[:, i].baddbmm_(slope, key[:, j])
                    to_k[:, :, j].baddbmm_(query[:, i].mT, slope)
            factor = {"squared_relu": 2.0, "polynomial": float(degree)}.get(activation, 1.0)
            of_q[g], of_k[g], of_v[g] = to_q * (factor * d**-0.5), to_k.mT * factor, to_v.mT * ws[g]
            of_weight[g] = (to_v.mT * vs[g]).sum(-1)
        of_weight = of_weight.view(q.shape[:3]).sum(1)
        return of_q.view(q.shape), of_k.view(q.shape), of_v.view(q.shape), of_weight


def _activate_twice(s: Tensor, activation: str, degree: int, room: Tensor) -> Tensor:
    """phi of the scores, with what its slope needs left in `s`: in `s` itself, or in the room beside it."""
    if activation == "relu":
        return s.relu_()
    if activation == "sigmoid":
        return s.sigmoid_()
    p = room[: s.numel()].view(s.shape)
    if activation == "squared_relu":
        return torch.mul(s.relu_(), s, out=p)
    torch.pow(s, degree, out=p)
    if degree != 2:
        s.pow_(degree - 1)
    return p


def _chain(slope: Tensor, s: Tensor, activation: str) -> None:
    """Multiplies `slope` by phi' less its constant factor, from what `_activate_twice` left in `s`."""
    if activation == "relu":
        torch.ops.aten.threshold_backward.grad_input(slope, s, 0.0, grad_input=slope)
    elif activation == "sigmoid":
        torch.ops.aten.sigmoid_backward.grad_input(slope, s, grad_input=slope)
    else:
        slope.mul_(s)


@_attention_backward.register_fake
def _(grad, q, k, v, weight, activation, degree, bias):
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape), weight.new_empty(weight.shape)


def _keep(ctx, inputs, output):
    ctx.activation, ctx.degree, ctx.bias = inputs[4:]
    ctx.save_for_backward(*inputs[:4])


def _backward(ctx, grad):
    grads = _attention_backward(grad, *ctx.saved_tensors, ctx.activation, ctx.degree, ctx.bias)
    return *grads, None, None, None


_attention.register_autograd(_backward, setup_context=_keep)
