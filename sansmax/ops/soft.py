"""SOFT and SOFT++ attention, linear in the tokens: https://arxiv.org/abs/2110.11945, https://arxiv.org/abs/2207.03341.

    out = P Z P^T V,   P = k(Q, L),  Z = inverse of k(L, L),  k(a, b) = exp(-|a - b|^2 / (2 sqrt d))

Keys are the queries; L are m landmarks, made of them by the caller. SOFT (`inverse="newton"`) takes Newton's iteration
for the inverse. SOFT++ (`inverse="halved", normalized=True`) takes another one, and D^-1/2 Z D^-1/2 with
D = diag(k(L, L) 1) in place of Z. The first Tiny weights of SOFT were trained with SOFT++'s inverse and without D
(`inverse="halved"`). `inverse="cholesky"` is the exact inverse, for new networks. See `sansmax.ops.inverse`.

Two orders give the same numbers:

* linear, P (Z (P^T V)): 4 n m d per head; all that the output needs from the other tokens is P^T V (`SoftState`);
* quadratic, (P Z P^T) V: the definition, 2 n^2 (m + d), in pieces of rows.

Shapes: b images, h heads, n tokens, d channels per head, m landmarks, c channels of the layer.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sansmax.ops.checks import IMPLEMENTATIONS, check_choice, check_tokens
from sansmax.ops.inverse import cholesky_inverse, newton_inverse, newton_inverse_halved
from sansmax.ops.moments import Weight, at_least_float32, without_padding
from sansmax.ops.soft_pieces import soft_apply, soft_mix, soft_rows, soft_summarise
from sansmax.ops.sums import fields_of, row_of

ORDERS = ("auto", "linear", "quadratic")
INVERSES = ("newton", "halved", "cholesky")

LandmarkMask = Bool[Tensor, "b m"] | None

# rows of the n x n matrix that the quadratic order makes at once
ROWS = 1024


def soft_kernel(a: Float[Tensor, "*b n d"], b: Float[Tensor, "*b m d"]) -> Float[Tensor, "*b n m"]:
    """exp(-|a - b|^2 / (2 sqrt d)) of each pair, in float32 or wider."""
    with torch.autocast(a.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        a, b = a.to(dtype), b.to(dtype)
        # distances do not change when all points move; near zero their squares lose no digits
        centre = b.mean(-2, keepdim=True)
        a, b = a - centre, b - centre
        squares = a.square().sum(-1, keepdim=True) + b.square().sum(-1).unsqueeze(-2)
        return ((a @ b.mT - 0.5 * squares) * a.shape[-1] ** -0.5).exp()


def landmark_inverse(
    landmarks: Float[Tensor, "b h m d"],
    landmark_mask: LandmarkMask = None,
    *,
    normalized: bool = False,
    inverse: str = "newton",
    steps: int = 20,
    ridge: float = 0.01,
) -> Float[Tensor, "b h m m"]:
    """The matrix Z between P and P^T, in float32 or wider; zero in the rows and columns of landmarks that are none.

    `inverse` is "newton" (`steps`, `ridge`), "halved" (`steps`) or "cholesky" (`ridge`); `normalized` scales it from
    both sides by the row sums of the kernel. A landmark that is none is as if it were not there.

    Raises ValueError for an inverse that is none of them.
    """
    check_choice("inverse", inverse, INVERSES, "soft attention")
    with torch.autocast(landmarks.device.type, enabled=False):
        landmarks = at_least_float32(landmarks)
        dtype = landmarks.dtype
        if inverse == "cholesky" and landmarks.device.type != "mps":
            # near landmarks make the kernel singular to float32, and m is small
            landmarks = landmarks.double()
        eye = torch.eye(landmarks.shape[2], dtype=torch.bool, device=landmarks.device)
        pair, others = None, ~eye
        if landmark_mask is not None:
            landmarks = landmarks.masked_fill(~landmark_mask[:, None, :, None], 0.0)
            pair = (landmark_mask.unsqueeze(-1) & landmark_mask.unsqueeze(-2)).unsqueeze(1)
            others = pair & others
        a = soft_kernel(landmarks, landmarks)
        # ones on the diagonal to the last digit: 2^20 times its rounding would be left where SOFT++'s iteration gives
        # 0. And rows of the identity for what is none: they do not touch the others, whose row sums are 1 or more
        a = torch.where(others, a, eye.to(a.dtype))
        if inverse == "newton":
            z = newton_inverse(a, steps, ridge)
        elif inverse == "halved":
            z = newton_inverse_halved(a, steps)
        else:
            z = cholesky_inverse(a, ridge)
        if normalized:
            scale = a.sum(-1).rsqrt()
            z = z * scale.unsqueeze(-1) * scale.unsqueeze(-2)
        if pair is not None:
            z = z.masked_fill(~pair, 0.0)
        return z.to(dtype)


class SoftState(NamedTuple):
    """P^T V over the tokens seen so far, for landmarks that all of them share; in float32 or wider."""

    pv: Float[Tensor, "b h m d"]

    @classmethod
    def of(
        cls,
        q: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n d"],
        landmarks: Float[Tensor, "b h m d"],
        weight: Bool[Tensor, "b n"] | Float[Tensor, "b n"] | None = None,
        *,
        impl: str = "auto",
    ) -> "SoftState":
        """Sums of one set of tokens; `weight` is True (or 1) for real tokens."""
        check_choice("impl", impl, IMPLEMENTATIONS, "soft attention")
        if impl != "torch":
            return cls(soft_summarise(q, v, landmarks, weight))
        with torch.autocast(q.device.type, enabled=False):
            wv, p = _plain(q, landmarks, weight, v)
            return cls(p.mT @ wv)

    def merge(self, other: "SoftState") -> "SoftState":
        """Sums of the union of two disjoint sets of tokens."""
        return SoftState(self.pv + other.pv)

    def to_sum(self, part: int, parts: int) -> Float[Tensor, "s"]:
        """The sums as a row that adds up over sets of tokens: m c numbers per image, c = h d."""
        return row_of(self)

    def of_sum(self, total: Float[Tensor, "s"], parts: int) -> "SoftState":
        """The sums of all sets from the sum of their rows."""
        return SoftState(*fields_of(total, self))


def soft_attend(
    state: SoftState,
    q: Float[Tensor, "b h n d"],
    landmarks: Float[Tensor, "b h m d"],
    *,
    mask: Bool[Tensor, "b n"] | Float[Tensor, "b n"] | None = None,
    landmark_mask: LandmarkMask = None,
    normalized: bool = False,
    inverse: str = "newton",
    steps: int = 20,
    ridge: float = 0.01,
    impl: str = "auto",
) -> Float[Tensor, "b h n d"]:
    """Reads the output for queries `q` whose tokens are already counted in `state`; in the dtype of `q`."""
    check_choice("impl", impl, IMPLEMENTATIONS, "soft attention")
    z = landmark_inverse(landmarks, landmark_mask, normalized=normalized, inverse=inverse, steps=steps, ridge=ridge)
    with torch.autocast(q.device.type, enabled=False):
        right = z.to(state.pv.dtype) @ state.pv
        if impl != "torch":
            return soft_apply(q, landmarks, right, mask)
        _, p = _plain(q, landmarks, mask)
        return (p @ right).to(q.dtype)


def soft_attention(
    q: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n d"],
    landmarks: Float[Tensor, "b h m d"],
    *,
    mask: Weight = None,
    landmark_mask: LandmarkMask = None,
    order: str = "auto",
    normalized: bool = False,
    inverse: str = "newton",
    steps: int = 20,
    ridge: float = 0.01,
    impl: str = "auto",
) -> Float[Tensor, "b h n d"]:
    """SOFT attention over all tokens at once, for given landmarks.

    The kernel divides the squared distance by 2 sqrt(d), so `q` and `landmarks` come unscaled (the published code
    divides q by d^(1/4) and the distance by 2). `mask` is True for real tokens (PyTorch's padding masks use the
    opposite); a floating mask is a weight per token inside P^T V: its gradient at 1 is the effect of removing it,
    landmarks held. `landmark_mask` is False for landmarks that are none (`sansmax.ops.landmarks`): they have no part
    in anything. The output at masked tokens, and of an image without any real token or landmark, is zero. NaN in a
    real token's v or q, or in a landmark, is NaN in its head of its image, and in no other image. For `normalized`,
    `inverse`, `steps` and `ridge` see `landmark_inverse`.

    `order` is "linear" or "quadratic"; "auto" is linear, as quadratic is cheaper only where n < m and both are nothing.
    `impl` is "blocks" (`sansmax.ops.soft_pieces`, memory beside the result for one piece of tokens, first derivatives
    only), or "torch" (plain PyTorch, P in memory, any derivative); "auto" is blocks in the linear order.

    Raises ValueError for a choice that the mechanism lacks, shapes or types that do not fit, and no tokens.
    """
    check_tokens(mask, q=q, v=v)
    check_landmarks(q, landmarks, landmark_mask)
    check_choice("order", order, ORDERS, "soft attention")
    check_choice("impl", impl, IMPLEMENTATIONS, "soft attention")
    if order == "quadratic" and impl == "blocks":
        raise ValueError('impl "blocks" of soft attention has the linear order only; use impl="torch" with "quadratic"')
    if mask is not None and mask.dtype == torch.bool:
        # landmarks of an image of padding may hold anything
        some = mask.any(-1, keepdim=True)
        landmark_mask = some.expand(landmarks.shape[::2]) if landmark_mask is None else landmark_mask & some
    if landmark_mask is not None:
        landmarks = landmarks.masked_fill(~landmark_mask[:, None, :, None], 0.0)
    z = landmark_inverse(landmarks, landmark_mask, normalized=normalized, inverse=inverse, steps=steps, ridge=ridge)
    if order != "quadratic" and impl != "torch":
        return soft_mix(q, v, landmarks, z, mask)[0]
    with torch.autocast(q.device.type, enabled=False):
        wv, p = _plain(q, landmarks, mask, v)
        if order != "quadratic":
            return (p @ (z.to(p.dtype) @ (p.mT @ wv))).to(q.dtype)
        rows = (p @ z.to(p.dtype)).split(ROWS, dim=2)
        return torch.cat([(r @ p.mT) @ wv for r in rows], dim=2).to(q.dtype)


class SoftLayerState(NamedTuple):
    """P^T X and P^T 1 over the tokens seen so far, k = h m rows for all heads; in float32 or wider."""

    px: Float[Tensor, "b k c"]
    p: Float[Tensor, "b k"]

    @classmethod
    def of(
        cls,
        rows: Float[Tensor, "b n k"],
        x: Float[Tensor, "b n c"],
        weight: Bool[Tensor, "b n"] | Float[Tensor, "b n"] | None = None,
    ) -> "SoftLayerState":
        """Sums of one set of tokens `x` (the layer's input) and their `rows` of P."""
        with torch.autocast(x.device.type, enabled=False):
            x = without_padding(x, weight).to(rows.dtype)
            if weight is not None:
                rows = rows * weight.to(rows.dtype).unsqueeze(-1)
            return cls(rows.mT @ x, rows.sum(1))

    def merge(self, other: "SoftLayerState") -> "SoftLayerState":
        """Sums of the union of two disjoint sets of tokens."""
        return SoftLayerState(self.px + other.px, self.p + other.p)

    def to_sum(self, part: int, parts: int) -> Float[Tensor, "s"]:
        """The sums as a row that adds up over sets of tokens: h m (c + 1) numbers per image."""
        return row_of(self)

    def of_sum(self, total: Float[Tensor, "s"], parts: int) -> "SoftLayerState":
        """The sums of all sets from the sum of their rows."""
        return SoftLayerState(*fields_of(total, self))


def soft_layer_rows(
    q: Float[Tensor, "b h n d"],
    landmarks: Float[Tensor, "b h m d"],
    mask: Bool[Tensor, "b n"] | Float[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b n k"]:
    """The rows of P of each token, those of all heads side by side (k = h m); zero at masked tokens."""
    return soft_rows(q, landmarks, mask)


def soft_affine(
    state: SoftLayerState,
    z: Float[Tensor, "b h m m"],
    w_v: Float[Tensor, "e c"],
    b_v: Float[Tensor, "e"] | None,
    w_out: Float[Tensor, "c_out e"],
) -> Float[Tensor, "b k c_out"]:
    """The multi-head layer after its kernel as one matrix R: Y = rows @ R + b_out, V and head outputs never made.

    Per head: P^T V = (P^T X) W_v^T + (P^T 1) b_v, R_h = Z (P^T V) W_out^T; with `rows` from `soft_layer_rows`, `state`
    their `SoftLayerState`, `z` from `landmark_inverse`, and weights (out, in) as in `nn.Linear`, e = h d. Products of
    2 n h m (c + c_out) in place of 2 n (e c + e c_out + 2 e m): it pays where m < d.
    """
    with torch.autocast(state.px.device.type, enabled=False):
        h, m = z.shape[1:3]
        dtype = state.px.dtype
        pv = state.px.unflatten(1, (h, m)) @ w_v.to(dtype).unflatten(0, (h, -1)).mT
        if b_v is not None:
            pv = pv + state.p.unflatten(1, (h, m)).unsqueeze(-1) * b_v.to(dtype).view(h, 1, -1)
        return (z.to(dtype) @ pv @ w_out.to(dtype).mT.unflatten(0, (h, -1))).flatten(1, 2)


def _plain(q: Tensor, landmarks: Tensor, weight: Tensor | None, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The weighted values (the queries where there are none) and P, both zero at tokens that are none."""
    v = at_least_float32(q if v is None else v)
    if weight is not None and weight.dtype == torch.bool:
        real = weight[:, None, :, None]
        p = soft_kernel(q.masked_fill(~real, 0.0), landmarks).masked_fill(~real, 0.0)
        return v.masked_fill(~real, 0.0).to(p.dtype), p
    p = soft_kernel(q, landmarks)
    v = v.to(p.dtype)
    return v if weight is None else v * weight.to(p.dtype)[:, None, :, None], p


def check_landmarks(q: Tensor, landmarks: Tensor, landmark_mask: Tensor | None) -> None:
    """Raises ValueError unless landmarks (b, h, m, d) and their mask (b, m) fit the queries `q`."""
    b, h, _, d = q.shape
    if landmarks.ndim != 4 or (landmarks.shape[0], landmarks.shape[1], landmarks.shape[3]) != (b, h, d):
        raise ValueError(
            f"landmarks must be (batch, heads, landmarks, head_dim) = ({b}, {h}, m, {d}) to fit q, "
            f"got {tuple(landmarks.shape)}"
        )
    if landmarks.shape[2] == 0:
        raise ValueError(f"landmarks are none, shape {tuple(landmarks.shape)}; attention needs at least one")
    if not landmarks.is_floating_point():
        raise ValueError(f"landmarks must be of a floating type, got {landmarks.dtype}; convert them with .float()")
    if landmark_mask is not None and (
        landmark_mask.dtype != torch.bool or landmark_mask.shape != (b, landmarks.shape[2])
    ):
        raise ValueError(
            f"landmark_mask must be boolean with one value per image and landmark, ({b}, {landmarks.shape[2]}), got "
            f"{landmark_mask.dtype} of shape {tuple(landmark_mask.shape)}; True = real landmark, for all heads alike"
        )
