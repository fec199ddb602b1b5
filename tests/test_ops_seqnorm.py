"""Sequence-normalised attention: every order of computation equals the definition, in output and gradients."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

from sansmax.ops import Moments, SeqNormState, seqnorm_affine, seqnorm_attend, seqnorm_attention

B, HEADS, D, C_IN, C_OUT = 3, 2, 7, 11, 17
GAINS = ("gamma_q", "beta_q", "gamma_k", "beta_k", "gamma_v", "beta_v")
ORDERS = ("quadratic", "linear", "moments")

every_order = pytest.mark.parametrize("order", ORDERS)
direct_order = pytest.mark.parametrize("order", ORDERS[:2])
some_gains = pytest.mark.parametrize(
    "gains",
    [GAINS, (), ("beta_q", "beta_k", "beta_v"), ("gamma_q", "beta_k"), ("gamma_k", "gamma_v", "beta_v")],
    ids=str,
)


def definition(q, k, v, gains, w, eps):
    """One image, one head, the slow way: normalise over tokens of weight w, then an explicit n x n matrix."""

    def normalised(x, gamma, beta):
        mean = (w[:, None] * x).sum(0) / w.sum()
        variance = (w[:, None] * (x - mean) ** 2).sum(0) / w.sum()
        x = (x - mean) / (variance + eps).sqrt()
        return (1 if gamma is None else gamma) * x + (0 if beta is None else beta)

    gamma_q, beta_q, gamma_k, beta_k, gamma_v, beta_v = (gains.get(name) for name in GAINS)
    matrix = normalised(q, gamma_q, beta_q) @ normalised(k, gamma_k, beta_k).T / w.sum()
    return (matrix * w) @ normalised(v, gamma_v, beta_v)


def attention_by_definition(q, k, v, gains, weight=None, eps=1e-6):
    weight = q.new_ones(q.shape[0], q.shape[2]) if weight is None else weight.to(q.dtype)
    heads = [
        definition(q[i, h], k[i, h], v[i, h], {n: g[h] for n, g in gains.items()}, weight[i], eps)
        for i in range(q.shape[0])
        for h in range(q.shape[1])
    ]
    return torch.stack(heads).view(q.shape)


def project(x, p):
    return ((x @ p[f"w_{n}"].mT + p[f"b_{n}"]).unflatten(-1, (HEADS, D)).transpose(1, 2) for n in "qkv")


def layer(order, x, p, weight=None, eps=1e-6):
    """The multi-head layer with its projections, by the definition or in one of the orders."""
    gains = {n: p[n] for n in GAINS if n in p}
    if order == "moments":
        weights = (p["w_q"], p["w_k"], p["w_v"], p["w_out"], p["b_out"])
        m, c = seqnorm_affine(Moments.of(x, weight), *weights, HEADS, **gains, eps=eps)
        return x @ m + c.unsqueeze(1)
    q, k, v = project(x, p)
    if order == "definition":
        out = attention_by_definition(q, k, v, gains, weight, eps)
    else:
        out = seqnorm_attention(q, k, v, **gains, mask=weight, order=order, eps=eps)
    return out.transpose(1, 2).flatten(2) @ p["w_out"].mT + p["b_out"]


def draw_parameters(gains=GAINS, dtype=torch.float64):
    shapes = {f"w_{n}": (HEADS * D, C_IN) for n in "qkv"} | {f"b_{n}": (HEADS * D,) for n in "qkv"}
    shapes |= {"w_out": (C_OUT, HEADS * D), "b_out": (C_OUT,)} | dict.fromkeys(gains, (HEADS, D))
    return {n: torch.randn(shape, dtype=dtype, requires_grad=True) for n, shape in shapes.items()}


def draw_heads(n, b=B, dtype=torch.float64):
    return [torch.randn(b, HEADS, n, D, dtype=dtype) for _ in "qkv"]


def draw_gains(dtype=torch.float64):
    return {n: torch.randn(HEADS, D, dtype=dtype) for n in GAINS}


def draw_weight(kind, n):
    if kind == "mask":
        # never without a real token: that has a test of its own
        return (torch.rand(B, n) < 0.6).index_fill(1, torch.tensor(0), True)
    return torch.rand(B, n, dtype=torch.float64, requires_grad=True) if kind == "weight" else None


def attend(order, q, k, v, gains, mask=None, **options):
    """Attention in a direct order, or by the moments of q, k and v side by side with projections that pick them out."""
    if order != "moments":
        return seqnorm_attention(q, k, v, **gains, mask=mask, order=order, **options)
    x = torch.cat([t.transpose(1, 2).flatten(2) for t in (q, k, v)], dim=2)
    eye = torch.eye(3 * HEADS * D, dtype=q.dtype).split(HEADS * D)
    w_out = torch.eye(HEADS * D, dtype=q.dtype)
    m, c = seqnorm_affine(Moments.of(x, mask), *eye, w_out, None, HEADS, **gains, **options)
    if mask is not None:
        x = x.masked_fill(~mask[..., None], 0.0)
    return (x @ m + c.unsqueeze(1)).unflatten(-1, (HEADS, D)).transpose(1, 2)


def gradients(out, by, inputs):
    return torch.autograd.grad(out, inputs, by, allow_unused=True, materialize_grads=True)


@every_order
@some_gains
@pytest.mark.parametrize("kind", [None, "mask", "weight"])
@pytest.mark.parametrize("n", [5, 13])
def test_each_order_equals_the_definition_in_output_and_gradients(order, gains, kind, n, assert_same):
    p, x = draw_parameters(gains), torch.randn(B, n, C_IN, dtype=torch.float64, requires_grad=True)
    weight = draw_weight(kind, n)
    real = weight if kind == "mask" else torch.ones(B, n, dtype=torch.bool)
    # a large eps, so that one in the wrong place shows
    found, expected = (layer(o, x, p, weight, eps=0.03)[real] for o in (order, "definition"))
    assert_same(found, expected, "output")
    inputs = {"x": x, **p} | ({"weight": weight} if kind == "weight" else {})
    by = torch.randn_like(found)
    pairs = (gradients(out, by, list(inputs.values())) for out in (found, expected))
    for name, a, b in zip(inputs, *pairs, strict=True):
        # biases of the projections cancel, and so does a single bias of keys or values: their gradient is 0, beside
        # the others' of 1 and more
        assert_same(a, b, f"gradient of {name}", scale=max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("n", [29, 251])
def test_orders_agree_in_float32(n, assert_same):
    p, x = draw_parameters(dtype=torch.float32), torch.randn(B, n, C_IN, requires_grad=True)
    by = torch.randn(B, n, C_OUT)
    names = [name for name in p if name not in ("b_q", "b_k", "b_v")]
    results = []
    for order in ORDERS:
        out = layer(order, x, p)
        results.append([out, *gradients(out, by, [x, *(p[name] for name in names)])])
    for other in results[1:]:
        for name, a, b in zip(["output", "x", *names], other, results[0], strict=True):
            assert_same(a, b, name)


@every_order
@pytest.mark.parametrize("kind", [None, "mask", "weight"])
def test_gradients_equal_finite_differences(order, kind):
    n = 5
    p, x = draw_parameters(), torch.randn(1, n, C_IN, dtype=torch.float64, requires_grad=True)
    weight = draw_weight(kind, n)
    weight = weight if weight is None else weight[:1].detach().requires_grad_(kind == "weight")
    real = weight if kind == "mask" else torch.ones(1, n, dtype=torch.bool)
    # along a random line through all parameters, and every entry of x and of the weight
    directions = {name: torch.randn_like(t) for name, t in p.items()}
    t = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)

    def out(t, x, *w):
        moved = {name: p[name].detach() + t * directions[name] for name in p}
        return layer(order, x, moved, w[0] if w else weight, eps=0.03)[real].sum(-1)

    inputs = (t, x, weight) if kind == "weight" else (t, x)
    assert gradcheck(out, inputs)


@direct_order
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_as_accurate_as_plain_torch_in_float32(order, dtype, masked, assert_as_accurate):
    n = 1009
    q, k, v = (x.to(dtype) for x in draw_heads(n, dtype=torch.float32))
    gains = {name: g.to(dtype) for name, g in draw_gains(torch.float32).items()}
    mask = draw_weight("mask", n) if masked else None
    real = torch.ones(B, n, dtype=torch.bool) if mask is None else mask

    def by_definition(wide):
        gained = {name: g.to(wide) for name, g in gains.items()}
        return attention_by_definition(q.to(wide), k.to(wide), v.to(wide), gained, mask)

    found = seqnorm_attention(q, k, v, **gains, mask=mask, order=order)
    # narrow types may lose the rounding of the result, no more
    plain, exact = by_definition(torch.float32).to(dtype), by_definition(torch.float64)
    assert_as_accurate(*(t.transpose(1, 2)[real] for t in (found, plain, exact)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_affine_map_is_as_accurate_as_plain_torch_in_float32(dtype, assert_as_accurate):
    x = torch.randn(B, 1009, C_IN).to(dtype)
    p = {name: t.detach().to(dtype) for name, t in draw_parameters(dtype=torch.float32).items()}
    weights, gains = [p[n] for n in ("w_q", "w_k", "w_v", "w_out", "b_out")], {n: p[n] for n in GAINS}

    def affine(wide):
        wider = {n: g.to(wide) for n, g in gains.items()}
        return seqnorm_affine(Moments.of(x.to(wide)), *(w.to(wide) for w in weights), HEADS, **wider)

    for found, plain, exact in zip(
        seqnorm_affine(Moments.of(x), *weights, HEADS, **gains),
        affine(torch.float32),
        affine(torch.float64),
        strict=True,
    ):
        assert_as_accurate(found, plain, exact)


@pytest.mark.parametrize("masked", [False, True])
def test_autocast_does_not_lower_the_precision(masked):
    n = 101
    q, k, v = draw_heads(n, dtype=torch.float32)
    gains, mask = draw_gains(torch.float32), draw_weight("mask", n) if masked else None
    x, p = torch.randn(B, n, C_IN), draw_parameters(dtype=torch.float32)

    def everything():
        moments = Moments.of(x, mask)
        yield from SeqNormState.of(q, k, v, None if mask is None else mask.unsqueeze(1).expand(B, HEADS, n))
        yield from (seqnorm_attention(q, k, v, **gains, mask=mask, order=order) for order in ORDERS[:2])
        weights = [p[name] for name in ("w_q", "w_k", "w_v", "w_out", "b_out")]
        yield from seqnorm_affine(moments, *weights, HEADS, **gains)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = list(everything())
    for a, b in zip(inside, everything(), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@direct_order
def test_far_from_zero_no_digits_are_lost(order):
    away, n = 1e4, 1009
    q, k, v = (x + away for x in draw_heads(n, dtype=torch.float32))
    exact = attention_by_definition(q.double(), k.double(), v.double(), {})
    # q, k and v themselves are rounded to this much of their spread of 1; sums of squares would lose its square
    allowed = 3 * torch.finfo(torch.float32).eps * away * exact.abs().max()
    assert (seqnorm_attention(q, k, v, order=order).double() - exact).abs().max() <= allowed
    pieces = zip(*(x.split((0, 500, 9, 500), dim=2) for x in (q, k, v)), strict=True)
    total, *rest = (SeqNormState.of(*piece) for piece in pieces)
    for state in rest:
        total = total.merge(state)
    assert (seqnorm_attend(total, q).double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("sizes", [(13,), (6, 7), (0, 13), (13, 0), (0, 0, 13, 0), (3, 0, 1, 2, 7)])
@pytest.mark.parametrize("weighted", [False, True])
def test_split_tokens_give_the_same_state_output_and_gradients(sizes, weighted, assert_same):
    heads = [x.requires_grad_() for x in draw_heads(13)]
    weight = torch.rand(B, HEADS, 13, dtype=torch.float64, requires_grad=True) if weighted else None
    gains, by = draw_gains(), torch.randn(B, HEADS, 13, D, dtype=torch.float64)

    def run(sizes):
        pieces = list(zip(*(x.split(sizes, dim=2) for x in heads), strict=True))
        weights = weight.split(sizes, dim=2) if weight is not None else [None] * len(sizes)
        states = [SeqNormState.of(*piece, w) for piece, w in zip(pieces, weights, strict=True)]
        total = states[0]
        for state in states[1:]:
            total = total.merge(state)
        out = torch.cat([seqnorm_attend(total, piece[0], **gains) for piece in pieces], dim=2)
        inputs = [*heads, weight] if weight is not None else heads
        return [*total, out, *gradients(out, by, inputs)]

    for i, (found, expected) in enumerate(zip(run(sizes), run((13,)), strict=True)):
        assert_same(found, expected, f"result {i}")


def test_merging_is_associative_and_commutative(assert_same):
    a, b, c = (SeqNormState.of(*(x + n for x in draw_heads(n))) for n in (2, 3, 5))
    for other in ((a.merge(b)).merge(c), a.merge(c).merge(b), c.merge(b.merge(a))):
        for name, found, expected in zip(SeqNormState._fields, other, a.merge(b.merge(c)), strict=True):
            assert_same(found, expected, name)


@every_order
def test_permuted_tokens_give_the_permuted_output(order, assert_same):
    q, k, v = draw_heads(13)
    gains, permutation = draw_gains(), torch.randperm(13)
    found = attend(order, *(x[:, :, permutation] for x in (q, k, v)), gains)
    assert_same(found, attend(order, q, k, v, gains)[:, :, permutation])


@every_order
def test_whole_weights_repeat_tokens(order, assert_same):
    p, x = draw_parameters(), torch.randn(1, 13, C_IN, dtype=torch.float64)
    times = torch.arange(13) % 4
    repeated = layer(order, x.repeat_interleave(times, dim=1), p)
    found = layer(order, x, p, times.double()[None]).repeat_interleave(times, dim=1)
    assert_same(found, repeated)


@every_order
def test_images_do_not_see_each_other(order, assert_same):
    q, k, v = draw_heads(13)
    gains = draw_gains()
    together = attend(order, q, k, v, gains)
    for i in range(B):
        assert_same(together[i : i + 1], attend(order, q[i : i + 1], k[i : i + 1], v[i : i + 1], gains))


@every_order
def test_nan_in_a_real_token_shows_in_its_own_image_only(order):
    q, k, v = draw_heads(13)
    gains, mask = draw_gains(), draw_weight("mask", 13)
    for spoilt in (q, k, v):
        before = spoilt[1, 0, 0, 3].clone()
        spoilt[1, 0, 0, 3] = float("nan")
        out = attend(order, q, k, v, gains, mask).transpose(1, 2)
        assert out[1][mask[1]].isnan().any(-1).any(-1).all()
        assert out[[0, 2]].isfinite().all()
        spoilt[1, 0, 0, 3] = before


@every_order
@pytest.mark.parametrize("garbage", [7.0, float("nan"), float("inf")])
def test_padding_may_hold_anything(order, garbage, assert_same):
    real = draw_weight("mask", 13)[:1]
    heads = draw_heads(13, b=1)
    gains = {name: g.requires_grad_() for name, g in draw_gains().items()}
    padded = [x.masked_fill(~real[:, None, :, None], garbage).requires_grad_() for x in heads]
    alone = [x[:, :, real[0]].detach().requires_grad_() for x in heads]
    inside, bag = attend(order, *padded, gains, real)[:, :, real[0]], attend(order, *alone, gains)
    assert_same(inside, bag, "output")
    by = torch.randn_like(bag)
    of_padded, of_bag = (
        gradients(out, by, [*inputs, *gains.values()]) for out, inputs in ((inside, padded), (bag, alone))
    )
    for a, b in zip(of_padded[:3], of_bag[:3], strict=True):
        assert_same(a[:, :, real[0]], b, "gradient")
        assert (a[:, :, ~real[0]] == 0).all()
    for name, a, b in zip(gains, of_padded[3:], of_bag[3:], strict=True):
        assert_same(a, b, name)


@direct_order
def test_the_output_at_masked_tokens_is_zero(order):
    mask = draw_weight("mask", 13)
    out = seqnorm_attention(*draw_heads(13), **draw_gains(), mask=mask, order=order)
    assert (out.transpose(1, 2)[~mask] == 0).all()
    assert (out.transpose(1, 2)[mask] != 0).all()


@every_order
@pytest.mark.parametrize("case", ["constant", "one token", "one real token"])
def test_tokens_without_variance_give_the_biases(order, case, assert_same):
    q, k, v = (x[:, :, :1] for x in draw_heads(1))
    gains, mask = draw_gains(), None
    if case == "constant":
        q, k, v = (x.expand(B, HEADS, 13, D) for x in (q, k, v))
    if case == "one real token":
        q, k, v = (torch.cat((x, torch.randn(B, HEADS, 12, D)), dim=2) for x in (q, k, v))
        mask = (torch.arange(13) == 0).expand(B, 13)
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = attend(order, *inputs, gains, mask)
    dot = (gains["beta_q"] * gains["beta_k"]).sum(-1, keepdim=True)
    expected = (dot * gains["beta_v"])[None, :, None]
    real = out if mask is None else out[:, :, :1]
    # a mean in floating point differs from a constant by its rounding, which 1 / sqrt(eps) magnifies
    assert_same(real, expected.expand_as(real), scale=expected.abs().max().item() * 1e-6**-0.5)
    assert all(g.isfinite().all() for g in gradients(real.sum(), None, inputs))


@every_order
@pytest.mark.parametrize("garbage", [7.0, float("nan")])
def test_an_image_without_real_tokens_is_finite_and_spares_the_others(order, garbage, assert_same):
    mask = draw_weight("mask", 13)
    mask[1] = False
    heads = draw_heads(13)
    for x in heads:
        x[1] = garbage
    heads, gains = [x.requires_grad_() for x in heads], draw_gains()
    out = attend(order, *heads, gains, mask)
    assert out.isfinite().all()
    if order != "moments":
        assert (out[1] == 0).all()
    assert_same(out[[0, 2]], attend(order, *(x[[0, 2]] for x in heads), gains, mask[[0, 2]]))
    for g in gradients(out.sum(), None, heads):
        assert g.isfinite().all()
        assert (g[1] == 0).all()


@pytest.mark.parametrize("n", [2, 3, 6, 7, 8, 29])
def test_auto_takes_the_order_of_fewer_operations(n):
    def operations(order):
        with FlopCounterMode(display=False) as counter:
            seqnorm_attention(*draw_heads(n), order=order)
        return counter.get_total_flops()

    # the linear order also reads the shift, one row more
    assert operations("auto") == (operations("quadratic") if n < D else operations("linear"))
    if n < D - 1:
        assert operations("auto") < operations("linear")
    if n > D + 1:
        assert operations("auto") < operations("quadratic")


def test_an_unknown_order_is_an_error_that_lists_the_orders():
    with pytest.raises(
        ValueError, match=r"order of seqnorm attention must be one of auto, quadratic, linear, got 'cubic'"
    ):
        seqnorm_attention(*draw_heads(3), order="cubic")
