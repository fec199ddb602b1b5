"""Multi-head attention layers: projections, an operation of `sansmax.ops`, and nothing else.

Every layer is called `layer(x, mask)` with `mask` True for real tokens, or a weight per token; its output at tokens
that are masked is zero. Those whose summary of the tokens has a fixed size (`streams`) also have the two phases,

    layer(x) == layer.map(layer.finish(layer.summarise(x)), x)

and summaries of disjoint sets of tokens merge. A layer of several `rounds` (SOFT: landmarks first) summarises again
with what the round before gave, `layer.summarise(x, mask, known)` and `layer.finish(state, known)`.

Shapes: b images, n tokens, c channels, h heads, d channels per head.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sansmax.models.orders import ORDERS, Choice, choose_order
from sansmax.ops import (
    L1State,
    Moments,
    ProjectedL1State,
    l1_affine,
    pointwise_attention,
    seqnorm_affine,
    seqnorm_attention,
    sima_affine,
    sima_attention,
    softmax_attention,
)
from sansmax.ops.checks import check_choice, check_layer, check_num_heads
from sansmax.ops.moments import Weight, without_padding
from sansmax.ops.pointwise import check_form
from sansmax.ops.sima import check_reference

Finished = tuple[Float[Tensor, "b c c"], Float[Tensor, "b c"]]


@runtime_checkable
class Others(Protocol):
    """Who holds the rest of the tokens, where a layer is given only its own (`sansmax.engine.parallel`)."""

    @property
    def place(self) -> Any:
        """Where one's own tokens stand among all (`sansmax.models.attention_soft.Place`), for pooled landmarks."""
        ...

    def whole(self, state: Any) -> Any:
        """The summary of all tokens from that of one's own."""
        ...


class Attention(nn.Module):
    """What every layer has: a mechanism, its orders, and whether and in how many rounds it can be summarised.

    Raises ValueError if `dim` is not a multiple of `num_heads`, or for an order that the mechanism lacks.
    """

    mechanism = ""
    orders: tuple[str, ...] = ("auto", "quadratic")
    rounds = 1
    # whether what the heads give is of the size of their values, however many tokens there are
    fits_float16 = True

    def __init__(self, dim: int, num_heads: int, order: str) -> None:
        super().__init__()
        check_num_heads(dim, num_heads)
        check_choice("order", order, self.orders, f"{self.mechanism} attention")
        self.num_heads, self.order = num_heads, order

    @property
    def streams(self) -> bool:
        """Whether the layer has the two phases."""
        return False

    def in_range(self, *heads: Tensor) -> tuple[Any, ...]:
        """Queries, keys and values; under float16 autocast in float32, where the output would leave float16's range."""
        x = heads[0]
        if self.fits_float16 or x.dtype != torch.float16 or not torch.is_autocast_enabled(x.device.type):
            return heads
        return tuple(x.float() for x in heads)

    def out_of(self, proj: Callable[[Tensor], Tensor], heads: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """The output projection of the heads side by side, in float32 where `in_range` made them that."""
        kind = heads.device.type
        wide = heads.dtype == torch.float32 and not self.fits_float16 and torch.is_autocast_enabled(kind)
        if not wide or torch.get_autocast_dtype(kind) != torch.float16:
            return proj(heads)
        with torch.autocast(kind, enabled=False):
            return proj(heads)

    def summarise_to_send(
        self, x: Float[Tensor, "b n c"], mask: Weight = None, known: Any = None, place: Any = None
    ) -> Any:
        """The summary of fewest numbers, where it travels between processes; `finish` takes it, too."""
        raise NotImplementedError


def attend_among(layer: Any, x: Float[Tensor, "b n c"], mask: Weight, others: Others) -> Float[Tensor, "b n c"]:
    """Attention of the tokens that are here to all tokens, of which others hold the rest."""
    known: Any = None
    for _ in range(layer.rounds):
        state = layer.summarise_to_send(x, mask, known, others.place)
        known = layer.finish(others.whole(state), known)
    return without_padding(layer.map(known, x), mask)


class HeadsAttention(Attention):
    """A layer with one projection `qkv` and another `proj`, named and shaped as in timm's attention."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        order: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, order)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Float[Tensor, "b n c"], mask: Weight = None) -> Float[Tensor, "b n c"]:
        """Attention over all tokens at once."""
        check_layer(x, mask)
        return without_padding(self.project(without_padding(x, mask), mask, self.order), mask)

    def project(self, x: Float[Tensor, "b n c"], mask: Weight, order: str) -> Float[Tensor, "b n c"]:
        """The operation between the projections to heads and from them."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k, v = self.in_range(q, k, v)
        out = self.attend(q, k, v, mask, order).transpose(1, 2).flatten(2)
        return self.proj_drop(self.out_of(self.proj, out))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Weight, order: str) -> Tensor:
        """The operation over heads (b, h, n, d)."""
        raise NotImplementedError


class SoftmaxAttention(HeadsAttention):
    """Softmax attention, the baseline."""

    mechanism = "softmax"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Weight, order: str) -> Tensor:
        """PyTorch's fused kernel."""
        del order
        return softmax_attention(q, k, v, mask=mask)


class AffineAttention(HeadsAttention):
    """A layer that can be computed as one affine map of its input, `Y = X M + c`, made of sums over the tokens.

    `order` forces one order of computation; the numbers are the same up to rounding.
    """

    orders = ORDERS

    @property
    def streams(self) -> bool:
        """Always: the summary has a fixed size."""
        return True

    def summarise(self, x: Float[Tensor, "b n c"], mask: Weight = None, known: None = None) -> Any:
        """All that the layer needs to know of the other tokens."""
        raise NotImplementedError

    def summarise_to_send(
        self, x: Float[Tensor, "b n c"], mask: Weight = None, known: None = None, place: Any = None
    ) -> Any:
        """The summary of fewest numbers; where a token stands does not matter."""
        return self.summarise(x, mask)

    def summarise_beside(self, x: Float[Tensor, "b n c"], mask: Weight) -> tuple[Any, Float[Tensor, "b n c"]]:
        """`summarise`, and `x` to be used instead of `x` afterwards."""
        return self.summarise(x, mask), x

    def finish(self, state: Any, known: None = None) -> Finished:
        """The affine map `(M, c)` that the layer applies to each token, from the summary of all of them."""
        raise NotImplementedError

    def map(self, finished: Finished, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """The layer's output for tokens that are counted in the finished state."""
        m, c = finished
        kind = x.device.type
        # the small matrices were formed in float32; the large product runs in the type of any linear layer
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
        narrow = None
        if dtype == torch.float16 and not self.fits_float16:
            dtype, narrow = torch.float32, None if autocast else dtype
        with torch.autocast(kind, enabled=False):
            out = torch.baddbmm(c.to(dtype).unsqueeze(-2), x.to(dtype), m.to(dtype))
        return self.proj_drop(out if narrow is None else out.to(narrow))

    def choose(self, x: Float[Tensor, "b n c"]) -> Choice:
        """The order in which this layer is computed for these tokens, and why."""
        if self.order != "auto":
            return Choice(self.order, "forced")
        b, n, c = x.shape
        choose = choose_order if torch.compiler.is_compiling() else _remembered_choice
        return choose(n, c, c // self.num_heads, b, x.device, self.mechanism)

    def forward(self, x: Float[Tensor, "b n c"], mask: Weight = None) -> Float[Tensor, "b n c"]:
        """Attention over all tokens at once, in the cheapest order unless one is forced."""
        check_layer(x, mask)
        order, x = self.choose(x).order, without_padding(x, mask)
        if order == "moments":
            state, x = self.summarise_beside(x, mask)
            return without_padding(self.map(self.finish(state), x), mask)
        return without_padding(self.project(x, mask, order), mask)


# the reason is a sentence, which takes as long to write as a small layer to run
_remembered_choice = lru_cache(maxsize=4096)(choose_order)


class SeqNormAttention(AffineAttention):
    """Q, K and V normalised over the tokens (https://arxiv.org/abs/2406.01314).

    Beside `qkv` and `proj` there are a gain and a bias per channel for each of Q, K and V. Biases of `qkv` cancel in
    the normalisation; they are accepted so that weights of other transformers load.
    """

    mechanism = "seqnorm"

    def __init__(self, dim: int, num_heads: int = 8, *, eps: float = 1e-6, **arguments: Any) -> None:
        super().__init__(dim, num_heads, **arguments)
        self.eps = eps
        factory = {"device": arguments.get("device"), "dtype": arguments.get("dtype")}
        for name in ("q", "k", "v"):
            # one axis, so that optimisers leave them out of weight decay as they do any gain and bias
            self.register_parameter(f"gamma_{name}", nn.Parameter(torch.empty(dim, **factory)))
            self.register_parameter(f"beta_{name}", nn.Parameter(torch.empty(dim, **factory)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gains 1 and biases 0, but for the bias of the values."""
        for name in ("q", "k", "v"):
            nn.init.ones_(getattr(self, f"gamma_{name}"))
            nn.init.zeros_(getattr(self, f"beta_{name}"))
        # the output knows beta_k and beta_v by their product: were both 0, so were both gradients, for ever
        nn.init.normal_(self.get_parameter("beta_v"), std=0.02)

    def _gains(self) -> dict[str, Tensor]:
        names = ("gamma_q", "beta_q", "gamma_k", "beta_k", "gamma_v", "beta_v")
        return {name: getattr(self, name).unflatten(0, (self.num_heads, -1)) for name in names}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Weight, order: str) -> Tensor:
        """The quadratic or the linear order."""
        return seqnorm_attention(q, k, v, **self._gains(), mask=mask, order=order, eps=self.eps)

    def summarise(self, x: Float[Tensor, "b n c"], mask: Weight = None, known: None = None) -> Moments:
        """All that the layer needs to know of the other tokens."""
        return Moments.of(x, mask)

    def summarise_beside(self, x: Float[Tensor, "b n c"], mask: Weight) -> tuple[Moments, Float[Tensor, "b n c"]]:
        """The moments, and `x` to be used instead of `x` afterwards: backward then needs less memory."""
        return Moments.beside(x, mask)

    def finish(self, state: Moments, known: None = None) -> Finished:
        """The affine map `(M, c)` that the layer applies to each token, from the moments of all of them."""
        w_q, w_k, w_v = self.qkv.weight.chunk(3)
        proj = self.proj
        m, c = seqnorm_affine(
            state, w_q, w_k, w_v, proj.weight, proj.bias, self.num_heads, **self._gains(), eps=self.eps
        )
        bias = self.qkv.bias
        if bias is not None and bias.requires_grad and torch.is_grad_enabled():
            # biases cancel: their gradient is zero, which is not the same as none to who waits for all of them (DDP)
            c = c + 0.0 * bias.sum().to(c.dtype)
        return m, c


class SimAAttention(AffineAttention):
    """Queries and keys normalised by their l1 norm over the tokens (https://arxiv.org/abs/2206.08898).

    `reference_tokens` multiplies the output by n / reference_tokens: it shrinks as 1 / n otherwise, so a network that
    was trained at that many tokens changes its balance at others. None is the paper.
    """

    mechanism = "sima"
    # it shrinks with the number of tokens: at 10^5 of them float16 has no digits left
    fits_float16 = False

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        eps: float = 1e-12,
        reference_tokens: int | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(dim, num_heads, **arguments)
        check_reference(reference_tokens)
        self.eps, self.reference_tokens = eps, reference_tokens

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Weight, order: str) -> Tensor:
        """The quadratic or the linear order."""
        return sima_attention(q, k, v, mask=mask, order=order, eps=self.eps, reference_tokens=self.reference_tokens)

    def summarise(self, x: Float[Tensor, "b n c"], mask: Weight = None, known: None = None) -> ProjectedL1State:
        """All that the layer needs to know of the other tokens."""
        c = x.shape[-1]
        bias = None if self.qkv.bias is None else self.qkv.bias[: 2 * c]
        return ProjectedL1State.of(x, self.qkv.weight[: 2 * c], bias, mask)

    def summarise_to_send(
        self, x: Float[Tensor, "b n c"], mask: Weight = None, known: None = None, place: Any = None
    ) -> ProjectedL1State | L1State:
        """The sums of the heads: 2 c + c d numbers, where the moments of the input are c^2 / 2."""
        if self.num_heads == 1:
            return self.summarise(x, mask)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return L1State.of(q, k, v, None if mask is None else mask.unsqueeze(1).expand(q.shape[:3]))

    def finish(self, state: ProjectedL1State | L1State, known: None = None) -> Finished:
        """The affine map `(M, c)` that the layer applies to each token, from the sums over all of them."""
        proj = self.proj
        if isinstance(state, L1State):
            w_q, b_q = (None if p is None else p.chunk(3)[0] for p in (self.qkv.weight, self.qkv.bias))
            assert w_q is not None
            options = {"eps": self.eps, "reference_tokens": self.reference_tokens}
            return l1_affine(state, w_q, b_q, proj.weight, proj.bias, **options)
        return sima_affine(
            state,
            self.qkv.weight,
            self.qkv.bias,
            proj.weight,
            proj.bias,
            self.num_heads,
            eps=self.eps,
            reference_tokens=self.reference_tokens,
        )


class PointwiseAttention(HeadsAttention):
    """A function of each product of a query and a key by itself, over the number of tokens: block-wise, memory O(n).

    `activation` is that of `sansmax.ops.pointwise_attention`; so are `degree`, `length_exponent` and `bias`.
    """

    mechanism = "pointwise"
    # products of queries and keys stand there as they are
    fits_float16 = False
    orders = ("auto", "quadratic", "linear")

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        activation: str = "relu",
        degree: int = 2,
        length_exponent: float = 1.0,
        bias: float = 0.0,
        **arguments: Any,
    ) -> None:
        super().__init__(dim, num_heads, **arguments)
        check_form(activation, degree, self.order)
        self.options: dict[str, Any] = {
            "activation": activation,
            "degree": degree,
            "length_exponent": length_exponent,
            "bias": bias,
        }

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Weight, order: str) -> Tensor:
        """The order asked for, or the cheaper one."""
        return pointwise_attention(q, k, v, mask=mask, order=order, **self.options)
