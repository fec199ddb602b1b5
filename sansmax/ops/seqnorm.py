"""Attention with sequence-normalised queries, keys and values: https://arxiv.org/abs/2406.01314.

    x^ = gamma (x - mean) / sqrt(var + eps) + beta    over the tokens, for each of Q, K, V and each channel
    out = (1/n) Q^ (K^^T V^)

Everything the output needs from the other tokens is their count, means and second moments, so the layer can be
computed in three orders that give the same numbers:

* quadratic, (Q^ K^^T) V^: the definition, 2 n^2 d; cheapest for very few tokens;
* linear, Q^ (K^^T V^): 2 n d^2 per head, the normalised Q, K and V folded into the d x d state and never made;
* moments, Y = X M + c: the whole multi-head layer with its projections from the mean and covariance of its input
  (`seqnorm_affine`); Q, K and V are never made, and backward needs X alone.

Projection biases of Q, K and V cancel, since a mean is subtracted.

Shapes: b images, h heads, n tokens, d channels per head, c = h d channels.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sansmax.ops.checks import check_choice, check_num_heads, check_tokens
from sansmax.ops.moments import Moments, Weight, at_least_float32, centred, nonzero

Gain = Float[Tensor, "h d"] | None
ORDERS = ("auto", "quadratic", "linear")


class SeqNormState(NamedTuple):
    """Sums over the tokens seen so far, in float32 or wider; every `_scatter` is centred on the means."""

    n: Float[Tensor, "*b"]
    q_mean: Float[Tensor, "*b d"]
    q_scatter: Float[Tensor, "*b d"]
    k_mean: Float[Tensor, "*b d"]
    k_scatter: Float[Tensor, "*b d"]
    v_mean: Float[Tensor, "*b d"]
    v_scatter: Float[Tensor, "*b d"]
    kv_scatter: Float[Tensor, "*b d d"]

    @classmethod
    def of(
        cls,
        q: Float[Tensor, "*b n d"],
        k: Float[Tensor, "*b n d"],
        v: Float[Tensor, "*b n d"],
        weight: Weight = None,
    ) -> "SeqNormState":
        """Sums of one set of tokens; `weight` is True (or 1) for real tokens."""
        with torch.autocast(q.device.type, enabled=False):
            count, q_mean, q, wq = centred(q, weight)
            _, k_mean, k, wk = centred(k, weight)
            _, v_mean, v, wv = centred(v, weight)
            sums = ((wq * q).sum(-2), (wk * k).sum(-2), (wv * v).sum(-2))
            return cls(count, q_mean, sums[0], k_mean, sums[1], v_mean, sums[2], wk.mT @ v)

    def merge(self, other: "SeqNormState") -> "SeqNormState":
        """Sums of the union of two disjoint sets of tokens."""
        count = self.n + other.n
        share = other.n / nonzero(count)
        between = (self.n * share).unsqueeze(-1)
        share = share.unsqueeze(-1)
        dq, dk, dv = other.q_mean - self.q_mean, other.k_mean - self.k_mean, other.v_mean - self.v_mean
        return SeqNormState(
            count,
            self.q_mean + share * dq,
            self.q_scatter + other.q_scatter + between * dq * dq,
            self.k_mean + share * dk,
            self.k_scatter + other.k_scatter + between * dk * dk,
            self.v_mean + share * dv,
            self.v_scatter + other.v_scatter + between * dv * dv,
            self.kv_scatter + other.kv_scatter + between.unsqueeze(-1) * (dk.unsqueeze(-1) * dv.unsqueeze(-2)),
        )


def seqnorm_attend(
    state: SeqNormState,
    q: Float[Tensor, "b h n d"],
    gamma_q: Gain = None,
    beta_q: Gain = None,
    gamma_k: Gain = None,
    beta_k: Gain = None,
    gamma_v: Gain = None,
    beta_v: Gain = None,
    *,
    eps: float = 1e-6,
) -> Float[Tensor, "b h n d"]:
    """Reads the output for queries `q` whose tokens are already counted in `state`; in the dtype of `q`."""
    with torch.autocast(q.device.type, enabled=False):
        n = nonzero(state.n).unsqueeze(-1)
        a_q, a_k, a_v = (
            _gain(gamma, scatter / n, eps)
            for gamma, scatter in (
                (gamma_q, state.q_scatter),
                (gamma_k, state.k_scatter),
                (gamma_v, state.v_scatter),
            )
        )
        s = (state.kv_scatter / n.unsqueeze(-1)) * a_k.unsqueeze(-1) * a_v.unsqueeze(-2)
        if beta_k is not None and beta_v is not None:
            s = s + beta_k.to(s.dtype).unsqueeze(-1) * beta_v.to(s.dtype).unsqueeze(-2)
        # no tokens, nothing to read: the biases are those of tokens
        s = s * (state.n != 0).to(s.dtype)[..., None, None]
        shift = -state.q_mean * a_q
        if beta_q is not None:
            shift = shift + beta_q
        out = at_least_float32(q) @ (a_q.unsqueeze(-1) * s) + shift.unsqueeze(-2) @ s
        return out.to(q.dtype)


def _gain(gamma: Tensor | None, variance: Tensor, eps: float) -> Tensor:
    # a variance from a difference of sums may be a rounding error below zero
    a = (variance.clamp_min(0.0) + eps).rsqrt()
    return a if gamma is None else a * gamma


def seqnorm_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n d"],
    gamma_q: Gain = None,
    beta_q: Gain = None,
    gamma_k: Gain = None,
    beta_k: Gain = None,
    gamma_v: Gain = None,
    beta_v: Gain = None,
    *,
    mask: Weight = None,
    order: str = "auto",
    eps: float = 1e-6,
) -> Float[Tensor, "b h n d"]:
    """Sequence-normalised attention over all tokens at once.

    Gains and biases are one per head and channel; None is gain 1 and bias 0. `mask` is True for real tokens
    (PyTorch's padding masks use the opposite); a floating mask is a weight per token. `order` is "quadratic", "linear"
    or "auto" (linear unless n < d). `eps` is added to each variance inside the root: a channel that is constant over
    the tokens gives its bias, and so does a single token. The output at masked tokens, and of an image without any
    real token, is zero. NaN in a real token is NaN in its whole image, and in no other.

    Raises ValueError for an order that the mechanism lacks, shapes or types that do not fit, and no tokens.
    """
    check_tokens(mask, q=q, k=k, v=v)
    check_choice("order", order, ORDERS, "seqnorm attention")
    _check_gains(q, gamma_q, beta_q, gamma_k, beta_k, gamma_v, beta_v)
    weight = None if mask is None else mask.unsqueeze(1).expand(q.shape[:3])
    gains = (gamma_q, beta_q, gamma_k, beta_k, gamma_v, beta_v)
    if order == "quadratic" or (order == "auto" and q.shape[-2] < q.shape[-1]):
        out = _quadratic(q, k, v, gains, weight, eps)
    else:
        real = q if weight is None or weight.dtype != torch.bool else q.masked_fill(~weight.unsqueeze(-1), 0.0)
        out = seqnorm_attend(SeqNormState.of(q, k, v, weight), real, *gains, eps=eps)
    if weight is None or weight.dtype != torch.bool:
        return out
    return out.masked_fill(~weight.unsqueeze(-1), 0.0)


def _check_gains(q: Tensor, *gains: Gain) -> None:
    names = ("gamma_q", "beta_q", "gamma_k", "beta_k", "gamma_v", "beta_v")
    for name, gain in zip(names, gains, strict=True):
        if gain is not None and gain.shape != q.shape[1::2]:
            raise ValueError(
                f"{name} must have one value per head and channel, {tuple(q.shape[1::2])}, got {tuple(gain.shape)}"
            )


def _quadratic(q: Tensor, k: Tensor, v: Tensor, gains: tuple[Gain, ...], weight: Weight, eps: float) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):
        count = None
        normalised = []
        for x, gamma, beta in zip((q, k, v), gains[::2], gains[1::2], strict=True):
            count, _, x, weighted = centred(x, weight)
            variance = (weighted * x).sum(-2) / nonzero(count).unsqueeze(-1)
            x = x * _gain(gamma, variance, eps).unsqueeze(-2)
            normalised.append(x if beta is None else x + beta.unsqueeze(-2))
        qn, kn, vn = normalised
        if weight is not None:
            vn = vn * weight.to(vn.dtype).unsqueeze(-1)
        assert count is not None
        return ((qn @ kn.mT) @ vn / nonzero(count)[..., None, None]).to(q.dtype)


def seqnorm_affine(
    moments: Moments,
    w_q: Float[Tensor, "c c_in"],
    w_k: Float[Tensor, "c c_in"],
    w_v: Float[Tensor, "c c_in"],
    w_out: Float[Tensor, "c_out c"],
    b_out: Float[Tensor, "c_out"] | None,
    num_heads: int,
    *,
    gamma_q: Gain = None,
    beta_q: Gain = None,
    gamma_k: Gain = None,
    beta_k: Gain = None,
    gamma_v: Gain = None,
    beta_v: Gain = None,
    eps: float = 1e-6,
) -> tuple[Float[Tensor, "b c_in c_out"], Float[Tensor, "b c_out"]]:
    """The whole multi-head layer as one affine map: `Y = X @ M + c`, returned as `(M, c)`.

    With mean mu and covariance G of the tokens (`moments`), per head: var(Q) = diag(W_q G W_q^T), likewise K and V;
    S = diag(gamma_k/sd_k) W_k G W_v^T diag(gamma_v/sd_v) + beta_k beta_v^T; M = sum over heads of
    W_q^T diag(gamma_q/sd_q) S W_out^T; c = sum of beta_q S W_out^T + b_out - mu M. Weights are (out, in), as in
    `nn.Linear`. One token has G = 0: the map gives the biases, and is finite. None gives M = 0 and c = b_out.
    """
    with torch.autocast(moments.mean.device.type, enabled=False):
        g = moments.covariance()
        check_num_heads(w_q.shape[0], num_heads)
        d = w_q.shape[0] // num_heads
        w_q, w_k, w_v, w_out = (w.to(g.dtype) for w in (w_q, w_k, w_v, w_out))
        wg_q, wg_k, wg_v = (w @ g for w in (w_q, w_k, w_v))
        a_q, a_k, a_v = (
            _gain(None if gamma is None else gamma.flatten(), (wg * w).sum(-1), eps)
            for gamma, w, wg in ((gamma_q, w_q, wg_q), (gamma_k, w_k, wg_k), (gamma_v, w_v, wg_v))
        )
        # (b, h, d, c_in) @ (h, c_in, d)
        s = wg_k.unflatten(-2, (num_heads, d)) @ w_v.unflatten(0, (num_heads, d)).mT
        s = s * a_k.unflatten(-1, (num_heads, d)).unsqueeze(-1) * a_v.unflatten(-1, (num_heads, d)).unsqueeze(-2)
        if beta_k is not None and beta_v is not None:
            s = s + beta_k.to(s.dtype).unsqueeze(-1) * beta_v.to(s.dtype).unsqueeze(-2)
        s = s * (moments.n != 0).to(s.dtype)[:, None, None, None]
        read = (s @ w_out.mT.unflatten(0, (num_heads, d))).flatten(-3, -2)
        m = w_q.mT @ (a_q.unsqueeze(-1) * read)
        shift = -(moments.mean.unsqueeze(-2) @ m).squeeze(-2)
        if beta_q is not None:
            shift = shift + beta_q.flatten().to(g.dtype) @ read
        if b_out is not None:
            shift = shift + b_out
        return m, shift
