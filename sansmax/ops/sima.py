"""Attention with l1-normalised queries and keys: SimA, https://arxiv.org/abs/2206.08898, equation 2.

    out = (Q / |Q|_1) (K / |K|_1)^T V          norms over the tokens, one per channel

Everything the output needs from the other tokens is three sums (`L1State`), and three orders give the same numbers:

* quadratic, (Q^ K^^T) V: the definition, 2 n^2 d; cheapest for very few tokens;
* linear, Q (diag(1 / (|Q|_1 |K|_1)) K^T V): 2 n d^2, the norms folded into the d x d state. Q^ and K^ are of size 1/n
  and would underflow in 16 bit; they are never made;
* moments, Y = X M + c: the whole multi-head layer with its projections (`sima_affine`). K^T V follows from the second
  moments of the layer's input, the norms from `projected_l1`, which makes Q and K of one block of tokens at a time.

The output shrinks as 1/n. `reference_tokens` multiplies it by n / reference_tokens, so that a network trained at that
many tokens keeps the balance of attention and residual at any length; the paper has no such factor.

Shapes: b images, h heads, n tokens, d channels per head, c = h d channels.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sansmax.ops.checks import IMPLEMENTATIONS, check_choice, check_num_heads, check_tokens
from sansmax.ops.moments import Moments, Weight, at_least_float32, without_padding
from sansmax.ops.sima_blocked import l1_sums, projected_l1_norm
from sansmax.ops.sums import fields_of, row_of

ORDERS = ("auto", "quadratic", "linear")


# entries of Q below which plain PyTorch is quicker than the kernel, whose call alone takes 0.1 ms
FEW = 2**20


def _few(q: Tensor) -> bool:
    # a graph holds for any size: it takes the kernel
    return not torch.compiler.is_compiling() and q.numel() < FEW


class L1State(NamedTuple):
    """Sums over the tokens seen so far, in float32 or wider."""

    n: Float[Tensor, "*b"]
    q_norm: Float[Tensor, "*b d"]
    k_norm: Float[Tensor, "*b d"]
    kv: Float[Tensor, "*b d d"]

    @classmethod
    def of(
        cls,
        q: Float[Tensor, "*b n d"],
        k: Float[Tensor, "*b n d"],
        v: Float[Tensor, "*b n d"],
        weight: Weight = None,
        *,
        impl: str = "auto",
    ) -> "L1State":
        """Sums of one set of tokens; `weight` is True (or 1) for real tokens, `impl` as in `sima_attention`."""
        check_choice("impl", impl, IMPLEMENTATIONS, "sima attention")
        by_weight = weight is not None and weight.dtype != torch.bool
        if by_weight and impl == "blocks":
            raise ValueError('impl "blocks" of sima attention takes boolean masks; use impl="torch" with weights')
        # autocast would keep the sum over all tokens in half precision
        with torch.autocast(q.device.type, enabled=False):
            wide = torch.promote_types(q.dtype, torch.float32)
            if impl == "blocks" or (impl == "auto" and not by_weight and not _few(q)):
                lead = q.shape[:-2]
                # a layer's heads come as they are: they may be strided, and flattening would copy them
                heads = (q, k, v) if q.ndim == 4 else (x.reshape(-1, 1, *x.shape[-2:]) for x in (q, k, v))
                mask = weight if weight is None or q.ndim == 4 else weight.reshape(-1, 1, weight.shape[-1])
                q_norm, k_norm, kv = (x.reshape(lead + x.shape[2:]) for x in l1_sums(*heads, mask))
                count = q_norm.new_full(lead, q.shape[-2]) if weight is None else weight.sum(-1).to(wide)
                return cls(count, q_norm, k_norm, kv)
            q, k, v = (without_padding(x, weight).to(wide) for x in (q, k, v))
            if weight is None or weight.dtype == torch.bool:
                q_norm, k_norm = q.abs().sum(-2), k.abs().sum(-2)
                count = q_norm.new_full(q.shape[:-2], q.shape[-2]) if weight is None else weight.sum(-1).to(wide)
                return cls(count, q_norm, k_norm, k.mT @ v)
            w = weight.to(wide)
            q_norm, k_norm = ((w.unsqueeze(-2) @ x.abs()).squeeze(-2) for x in (q, k))
            return cls(w.sum(-1), q_norm, k_norm, k.mT @ (v * w.unsqueeze(-1)))

    def merge(self, other: "L1State") -> "L1State":
        """Sums of the union of two disjoint sets of tokens."""
        return L1State(*(a + b for a, b in zip(self, other, strict=True)))

    def to_sum(self, part: int, parts: int) -> Float[Tensor, "s"]:
        """The sums as a row that adds up over sets of tokens: 2 c + c d + h numbers per image, c = h d."""
        return row_of(self)

    def of_sum(self, total: Float[Tensor, "s"], parts: int) -> "L1State":
        """The sums of all sets from the sum of their rows."""
        return L1State(*fields_of(total, self))

    def folded(self, eps: float, reference_tokens: int | None = None) -> Float[Tensor, "*b d d"]:
        """The matrix S of `out = Q S`."""
        s = self.kv / self.k_norm.clamp_min(eps).unsqueeze(-1) / self.q_norm.clamp_min(eps).unsqueeze(-1)
        return s if reference_tokens is None else s * (self.n / reference_tokens)[..., None, None]


def sima_attend(
    state: L1State, q: Float[Tensor, "*b n d"], *, eps: float = 1e-12, reference_tokens: int | None = None
) -> Float[Tensor, "*b n d"]:
    """Reads the output for queries `q` whose tokens are already counted in `state`; in the dtype of `q`."""
    with torch.autocast(q.device.type, enabled=False):
        return (at_least_float32(q) @ state.folded(eps, reference_tokens)).to(q.dtype)


def sima_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n d"],
    *,
    mask: Weight = None,
    order: str = "auto",
    eps: float = 1e-12,
    reference_tokens: int | None = None,
    impl: str = "auto",
) -> Float[Tensor, "b h n d"]:
    """SimA attention over all tokens at once.

    `mask` is True for real tokens (PyTorch's padding masks use the opposite); a floating mask is a weight per token.
    `order` is "quadratic", "linear" or "auto" (linear unless n < d). `eps` is the smallest norm a channel may have:
    1e-12 in the published self-attention, 1e-6 in its class attention; a channel that is zero on every token adds
    nothing. `impl` is "blocks" (`sansmax.ops.sima_blocked`, no copy of the tokens, first derivatives only) or "torch"
    (plain PyTorch, any derivative); "auto" is blocks for many tokens. The output at masked tokens, and of an image
    without any real token, is zero. NaN in a real token is NaN in its own image, and in no other.

    Raises ValueError for an order that the mechanism lacks, shapes or types that do not fit, and no tokens.
    """
    check_tokens(mask, q=q, k=k, v=v)
    check_choice("order", order, ORDERS, "sima attention")
    check_choice("impl", impl, IMPLEMENTATIONS, "sima attention")
    check_reference(reference_tokens)
    if order == "quadratic" and impl == "blocks":
        raise ValueError('impl "blocks" of sima attention has the linear order only; use impl="torch" with "quadratic"')
    weight = None if mask is None else mask.unsqueeze(1).expand(q.shape[:3])
    if order == "quadratic" or (order == "auto" and impl != "blocks" and q.shape[-2] < q.shape[-1]):
        return _quadratic(q, k, v, weight, eps, reference_tokens)
    state = L1State.of(q, k, v, weight, impl=impl)
    out = sima_attend(state, without_padding(q, weight), eps=eps, reference_tokens=reference_tokens)
    return without_padding(out, weight)


def sima_of_keys(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m d"]
) -> Float[Tensor, "b h n d"]:
    """(Q / |Q|_1) (K / |K|_1)^T V for queries and keys of different numbers, each normalised over its own tokens."""
    # autocast would keep the sums over all tokens in half precision
    with torch.autocast(q.device.type, enabled=False):
        wide = torch.promote_types(q.dtype, torch.float32)
        k, v = k.to(wide), v.to(wide)
        k_norm = k.abs().sum(-2)
        state = L1State(k_norm.new_full(k.shape[:2], k.shape[2]), q.to(wide).abs().sum(-2), k_norm, k.mT @ v)
    return sima_attend(state, q)


def check_reference(reference_tokens: int | None) -> None:
    """Raises ValueError for a reference of no tokens."""
    if reference_tokens is not None and reference_tokens < 1:
        raise ValueError(f"reference_tokens must be at least 1, or None for the paper's output, got {reference_tokens}")


def _quadratic(q: Tensor, k: Tensor, v: Tensor, weight: Weight, eps: float, reference_tokens: int | None) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):
        q_hat, k_hat, v_wide = (at_least_float32(without_padding(x, weight)) for x in (q, k, v))
        w = None if weight is None else weight.to(v_wide.dtype).unsqueeze(-1)
        if w is not None:
            v_wide = v_wide * w
        q_hat, k_hat = (
            x / (x.abs() if w is None else x.abs() * w).sum(-2, keepdim=True).clamp_min(eps) for x in (q_hat, k_hat)
        )
        out = (q_hat @ k_hat.mT) @ v_wide
        if reference_tokens is not None:
            n = q.shape[-2] if w is None else w.sum(-2, keepdim=True)
            out = out * (n / reference_tokens)
        return out.to(q.dtype)


class ProjectedL1State(NamedTuple):
    """What a multi-head layer needs to know of its input: its moments, and the l1 norms of its queries and keys."""

    n: Float[Tensor, "*b"]
    mean: Float[Tensor, "*b c"]
    scatter: Float[Tensor, "*b c c"]
    qk_norm: Float[Tensor, "*b e"]

    @classmethod
    def of(
        cls,
        x: Float[Tensor, "b n c_in"],
        w_qk: Float[Tensor, "e c_in"],
        b_qk: Float[Tensor, "e"] | None,
        weight: Weight = None,
    ) -> "ProjectedL1State":
        """Sums of one set of tokens; `w_qk` and `b_qk` project to queries, then keys."""
        return cls(*Moments.of(x, weight), projected_l1(x, w_qk, b_qk, weight))

    def merge(self, other: "ProjectedL1State") -> "ProjectedL1State":
        """Sums of the union of two disjoint sets of tokens."""
        return ProjectedL1State(*Moments(*self[:3]).merge(Moments(*other[:3])), self.qk_norm + other.qk_norm)

    def to_sum(self, part: int, parts: int) -> Float[Tensor, "s"]:
        """The state as a row that adds up over `parts` sets of tokens: that of its moments, and 2 c norms."""
        return torch.cat((Moments(*self[:3]).to_sum(part, parts), self.qk_norm.flatten()))

    def of_sum(self, total: Float[Tensor, "s"], parts: int) -> "ProjectedL1State":
        """The state of all sets from the sum of their rows."""
        norms = self.qk_norm.numel()
        moments = Moments(*self[:3]).of_sum(total[:-norms], parts)
        return ProjectedL1State(*moments, total[-norms:].view(self.qk_norm.shape))


def projected_l1(
    x: Float[Tensor, "b n c_in"], w: Float[Tensor, "e c_in"], b: Float[Tensor, "e"] | None, weight: Weight = None
) -> Float[Tensor, "b e"]:
    """`sum over tokens of |x W^T + b|` per image, in float32 or wider; `weight` is True (or 1) for real tokens.

    Without a floating weight the projection is made of one block of tokens at a time, forward and backward.
    """
    with torch.autocast(x.device.type, enabled=False):
        if weight is None or weight.dtype == torch.bool:
            return projected_l1_norm(x, w, b, weight)
        q = torch.nn.functional.linear(x, w.to(x.dtype), None if b is None else b.to(x.dtype)).abs()
        return (weight.to(torch.promote_types(x.dtype, torch.float32)).unsqueeze(-2) @ at_least_float32(q)).squeeze(-2)


def sima_affine(
    state: ProjectedL1State,
    w_qkv: Float[Tensor, "c3 c_in"],
    b_qkv: Float[Tensor, "c3"] | None,
    w_out: Float[Tensor, "c_out c"],
    b_out: Float[Tensor, "c_out"] | None,
    num_heads: int,
    *,
    eps: float = 1e-12,
    reference_tokens: int | None = None,
) -> tuple[Float[Tensor, "b c_in c_out"], Float[Tensor, "b c_out"]]:
    """The whole multi-head layer as one affine map: `Y = X @ M + c`, returned as `(M, c)`.

    With mean mu, scatter G and count n of the tokens, per head: K^T V = W_k G W_v^T + n (W_k mu + b_k)(W_v mu + b_v)^T;
    S = diag(1 / (|Q|_1 |K|_1)) K^T V; M = sum over heads of W_q^T S W_out^T; c = sum of b_q S W_out^T + b_out. Weights
    are (out, in), as in `nn.Linear`; `w_qkv` and `b_qkv` hold queries, keys and values one after the other.
    """
    with torch.autocast(state.qk_norm.device.type, enabled=False):
        n, mean, scatter, qk_norm = state
        w_q, w_k, w_v, w_out = (w.to(scatter.dtype) for w in (*w_qkv.chunk(3), w_out))
        check_num_heads(w_q.shape[0], num_heads)
        d = w_q.shape[0] // num_heads
        k_mean, v_mean = mean @ w_k.mT, mean @ w_v.mT
        b_q, b_k, b_v = (None, 0.0, 0.0) if b_qkv is None else b_qkv.to(scatter.dtype).chunk(3)
        k_mean, v_mean = k_mean + b_k, v_mean + b_v
        kv = (w_k @ scatter).unflatten(-2, (num_heads, d)) @ w_v.unflatten(0, (num_heads, d)).mT
        k_mean, v_mean = (m.unflatten(-1, (num_heads, d)) for m in (k_mean, v_mean))
        kv = kv + n[:, None, None, None] * (k_mean.unsqueeze(-1) * v_mean.unsqueeze(-2))
        q_norm, k_norm = (m.unflatten(-1, (num_heads, d)) for m in qk_norm.chunk(2, dim=-1))
        heads = L1State(n.unsqueeze(-1), q_norm, k_norm, kv)
        return l1_affine(heads, w_q, b_q, w_out, b_out, eps=eps, reference_tokens=reference_tokens)


def l1_affine(
    state: L1State,
    w_q: Float[Tensor, "c c_in"],
    b_q: Float[Tensor, "c"] | None,
    w_out: Float[Tensor, "c_out c"],
    b_out: Float[Tensor, "c_out"] | None,
    *,
    eps: float = 1e-12,
    reference_tokens: int | None = None,
) -> tuple[Float[Tensor, "b c_in c_out"], Float[Tensor, "b c_out"]]:
    """The layer as one affine map `Y = X @ M + c` from the sums of its heads, returned as `(M, c)`.

    M = sum over heads of W_q^T S W_out^T; c = sum of b_q S W_out^T + b_out, with S of `state`.
    """
    with torch.autocast(state.kv.device.type, enabled=False):
        h, d = state.kv.shape[1:3]
        w_q, w_out = w_q.to(state.kv.dtype), w_out.to(state.kv.dtype)
        s = state.folded(eps, reference_tokens)
        read = (s @ w_out.mT.unflatten(0, (h, d))).flatten(-3, -2)
        m = w_q.mT @ read
        c = read.new_zeros(read.shape[0], read.shape[-1]) if b_q is None else b_q.to(read.dtype) @ read
        return m, c if b_out is None else c + b_out


def sima_class_attention(
    x: Float[Tensor, "b n c"],
    w_qkv: Float[Tensor, "c3 c"],
    b_qkv: Float[Tensor, "c3"] | None,
    num_heads: int,
    *,
    eps: float = 1e-6,
) -> Float[Tensor, "b c_out"]:
    """What the first token reads from all tokens, in all heads side by side, before the output projection.

    The first row of `sima_attention` on the projections of `x`, with fewer products: queries and keys are made for
    their norms alone, a block of tokens at a time, and values never. Per head, with the first query q:

        u = q / (|Q|_1 |K|_1),   a_n = u . K_n = (W_k^T u) . x_n + u . b_k
        sum_n a_n V_n = W_v (sum_n a_n x_n) + (sum_n a_n) b_v

    `w_qkv` and `b_qkv` hold queries, keys and values one after the other, (out, in) as in `nn.Linear`; `eps` is the
    smallest norm a channel may have. In the dtype of `x`, with sums in float32 or wider; autocast narrows the queries
    and keys that are made for the norms, and nothing else.

    Raises ValueError if the width is not a multiple of `num_heads`.
    """
    kind = x.device.type
    for_norms = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
    with torch.autocast(kind, enabled=False):
        wide = at_least_float32(x)
        width = w_qkv.shape[0] // 3
        check_num_heads(width, num_heads)
        bias = None if b_qkv is None else b_qkv[: 2 * width]
        q_norm, k_norm = projected_l1(for_norms, w_qkv[: 2 * width], bias).clamp_min(eps).chunk(2, dim=-1)
        w_q, w_k, w_v = w_qkv.to(wide.dtype).chunk(3)
        b_q, b_k, b_v = (None,) * 3 if b_qkv is None else b_qkv.to(wide.dtype).chunk(3)
        u = torch.nn.functional.linear(wide[:, 0], w_q, b_q) / q_norm / k_norm
        by_head = u.unflatten(-1, (num_heads, -1)).transpose(0, 1)
        w_k, w_v = (w.unflatten(0, (num_heads, -1)) for w in (w_k, w_v))
        scores = wide @ (by_head @ w_k).permute(1, 2, 0)
        if b_k is not None:
            scores = scores + (u * b_k).unflatten(-1, (num_heads, -1)).sum(-1).unsqueeze(1)
        read = ((scores.mT @ wide).transpose(0, 1) @ w_v.mT).transpose(0, 1)
        if b_v is not None:
            read = read + scores.sum(1).unsqueeze(-1) * b_v.unflatten(0, (num_heads, -1))
        return read.flatten(1).to(x.dtype)
