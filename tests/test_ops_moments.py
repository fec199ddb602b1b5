"""Counts, means and second moments: equal to the definition however the tokens are split, masked or weighted."""

import itertools

import pytest
import torch

from sansmax.ops import Mean, Moments

N, C = 11, 7


def definition(x, w):
    """Weighted moments of one set, token by token."""
    mean = sum(w[i] * x[i] for i in range(len(x))) / w.sum()
    scatter = sum(w[i] * torch.outer(x[i] - mean, x[i] - mean) for i in range(len(x)))
    return w.sum(), mean, scatter


def merged(states):
    total = states[0]
    for state in states[1:]:
        total = total.merge(state)
    return total


@pytest.mark.parametrize("kind", [None, "mask", "weight"])
def test_moments_equal_their_definition(kind, assert_same):
    x = torch.randn(3, N, C, dtype=torch.float64)
    weight = {None: None, "mask": torch.rand(3, N) < 0.6, "weight": torch.rand(3, N, dtype=torch.float64)}[kind]
    w = torch.ones(3, N) if weight is None else weight
    moments, mean = Moments.of(x, weight), Mean.of(x, weight)
    for i in range(3):
        slow = definition(x[i], w[i].double())
        for name, found, expected in zip(Moments._fields, moments, slow, strict=True):
            assert_same(found[i], expected, name)
        assert_same(moments.covariance()[i], slow[2] / slow[0], "covariance")
        assert_same(mean.n[i], slow[0], "count")
        assert_same(mean.value()[i], slow[1], "mean")


@pytest.mark.parametrize("state", [Mean, Moments])
@pytest.mark.parametrize("sizes", [(11,), (5, 6), (1, 10), (0, 11), (11, 0), (0, 0, 11, 0), (3, 0, 1, 2, 5)])
@pytest.mark.parametrize("weighted", [False, True])
def test_split_tokens_give_the_same_state(state, sizes, weighted, assert_same):
    x = torch.randn(2, N, C, dtype=torch.float64)
    weight = torch.rand(2, N, dtype=torch.float64) if weighted else None
    pieces = x.split(sizes, dim=1)
    weights = weight.split(sizes, dim=1) if weight is not None else itertools.repeat(None)
    parts = merged([state.of(*piece) for piece in zip(pieces, weights, strict=False)])
    for name, found, expected in zip(state._fields, parts, state.of(x, weight), strict=True):
        assert_same(found, expected, name)


@pytest.mark.parametrize("state", [Mean, Moments])
def test_merging_is_associative_and_commutative(state, assert_same):
    a, b, c = (state.of(torch.randn(2, n, C, dtype=torch.float64) + n) for n in (2, 3, 5))
    for other in ((a.merge(b)).merge(c), a.merge(c).merge(b), c.merge(b.merge(a))):
        for name, found, expected in zip(state._fields, other, a.merge(b.merge(c)), strict=True):
            assert_same(found, expected, name)


@pytest.mark.parametrize("state", [Mean, Moments])
def test_merging_keeps_the_gradient(state, assert_same):
    x = torch.randn(2, N, C, dtype=torch.float64, requires_grad=True)
    by = [torch.randn_like(t) for t in state.of(x)]

    def gradient(total):
        return torch.autograd.grad(sum((t * g).sum() for t, g in zip(total, by, strict=True)), x)[0]

    pieces = x.split((0, 4, 7), dim=1)
    assert_same(gradient(merged([state.of(piece) for piece in pieces])), gradient(state.of(x)))


def test_whole_weights_repeat_tokens(assert_same):
    x, times = torch.randn(N, C, dtype=torch.float64), torch.arange(N) % 4
    repeated = Moments.of(x.repeat_interleave(times, dim=0))
    for found, expected in zip(Moments.of(x, times.double()), repeated, strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("parts", [1, 2, 17])
def test_far_from_zero_no_digits_are_lost(parts):
    spread, away = 1.0, 1e4
    x = away + spread * torch.randn(1, 1009, C)
    exact = Moments.of(x.double()).covariance()
    found = merged([Moments.of(piece) for piece in x.tensor_split(parts, dim=1)]).covariance()
    # the tokens themselves are rounded to this much of their spread; sums of squares would lose its square
    allowed = torch.finfo(x.dtype).eps * away / spread * exact.abs().max()
    assert (found.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_kept_in_float32_at_least(dtype, assert_as_accurate):
    x = (torch.randn(1, 4001, C) + 1).to(dtype)
    exact, plain = Moments.of(x.double()), torch.cov(x[0].float().mT, correction=0)[None]
    found = Moments.of(x)
    assert {t.dtype for t in (*found, *Mean.of(x))} == {torch.float32}
    assert_as_accurate(found.covariance(), plain, exact.covariance())
    assert_as_accurate(Mean.of(x).value(), x.float().mean(1), exact.mean)
    assert Moments.of(x.double()).scatter.dtype == torch.float64


@pytest.mark.parametrize("weighted", [False, True])
def test_autocast_does_not_lower_the_precision(weighted):
    x = torch.randn(2, 101, C)
    weight = torch.rand(2, 101) if weighted else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = (*Moments.of(x, weight), *Mean.of(x, weight))
    for a, b in zip(inside, (*Moments.of(x, weight), *Mean.of(x, weight)), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("garbage", [7.0, float("nan"), float("inf")])
def test_padding_may_hold_anything(garbage, assert_same):
    x = torch.randn(1, N, C, dtype=torch.float64)
    real = torch.rand(1, N) < 0.5
    padded = x.masked_fill(~real[..., None], garbage).requires_grad_()
    alone = x[real][None].requires_grad_()
    gradients = []
    for state, tokens, mask in (
        (Moments, padded, real),
        (Moments, alone, None),
        (Mean, padded, real),
        (Mean, alone, None),
    ):
        total = state.of(tokens, mask)
        gradients.append(torch.autograd.grad(sum(t.square().sum() for t in total if t.requires_grad), tokens)[0])
    for name, found, expected in zip(Moments._fields, Moments.of(padded, real), Moments.of(alone), strict=True):
        assert_same(found, expected, name)
    for found, expected in (gradients[:2], gradients[2:]):
        assert_same(found[real], expected[0], "gradient")
        assert (found[~real] == 0).all()


@pytest.mark.parametrize("case", ["no tokens", "all masked", "all weights zero", "one token", "constant"])
def test_corner_cases_are_finite(case):
    x = torch.full((2, 5, C), 3.0)
    x, weight, n = {
        "no tokens": (x[:, :0], None, 0.0),
        "all masked": (x, torch.zeros(2, 5, dtype=torch.bool), 0.0),
        "all weights zero": (x, torch.zeros(2, 5), 0.0),
        "one token": (x[:, :1], None, 1.0),
        "constant": (x, None, 5.0),
    }[case]
    moments, mean = Moments.of(x, weight), Mean.of(x, weight)
    assert (moments.n == n).all()
    assert (mean.n == n).all()
    assert (moments.mean == (3.0 if n else 0.0)).all()
    assert (mean.value() == (3.0 if n else 0.0)).all()
    assert (moments.covariance() == 0).all()
    empty = moments.merge(moments)
    assert all(t.isfinite().all() for t in (*empty, empty.covariance()))


@pytest.mark.parametrize("n", [1, 1024, 1025, 2500])
@pytest.mark.parametrize("c", [1, 7, 200])
@pytest.mark.parametrize("masked", [False, True])
def test_moments_in_blocks_equal_plain_ones_with_their_gradients(n, c, masked, assert_same):
    x = (torch.randn(2, n, c, dtype=torch.float64) + 3).requires_grad_()
    mask = torch.rand(2, n) < 0.6 if masked else None
    by = [torch.randn(2, c, dtype=torch.float64), torch.randn(2, c, c, dtype=torch.float64)]
    results = []
    for impl in ("blocks", "torch"):
        count, *sums = Moments.of(x, mask, impl=impl)
        results.append([count, *sums, *torch.autograd.grad(sums, x, by)])
    for name, a, b in zip(("count", "mean", "scatter", "gradient"), *results, strict=True):
        assert_same(a, b, name, scale=max(1.0, b.abs().max().item()))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("masked", [False, True])
def test_moments_in_blocks_are_a_lawful_operation_of_torch(masked):
    x, mask = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True), torch.rand(2, 5) < 0.6
    torch.library.opcheck(torch.ops.sansmax.centred_moments.default, (x, mask if masked else None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_gradient_of_moments_is_as_accurate_as_plain_torch(dtype, assert_as_accurate):
    n, c = 1500, 11
    x, by = (torch.randn(1, n, c) + 1).to(dtype), torch.randn(1, c, c) / n

    def plain(x):
        centred = x - x.mean(1, keepdim=True)
        return centred.mT @ centred

    def gradient(scatter, x):
        return torch.autograd.grad(scatter, x, by.to(scatter.dtype))[0]

    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_(), x.double().requires_grad_()]
    found = gradient(Moments.of(inputs[0]).scatter, inputs[0])
    assert_as_accurate(found, gradient(plain(inputs[1]), inputs[1]), gradient(plain(inputs[2]), inputs[2]))


def test_moments_of_a_million_tokens_in_bfloat16():
    x = (torch.randn(1, 2**20, 3) + torch.tensor([0.0, 10.0, -100.0])).bfloat16()
    found, exact = Moments.of(x), Moments.of(x.double())
    for a, b in zip(found[1:], exact[1:], strict=True):
        assert (a.double() - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("kind", [None, "mask", "weight"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_moments_beside_tokens_have_the_gradients_of_both(kind, dtype, assert_same):
    x = (torch.randn(2, 13, C) + 1).to(dtype).requires_grad_()
    weight = {None: None, "mask": torch.rand(2, 13) < 0.6, "weight": torch.rand(2, 13, dtype=torch.float64)}[kind]
    w = torch.randn(2, 13, C, dtype=dtype)

    def loss(moments, x):
        return (moments.scatter**2).sum() + moments.mean.sum() + (w * x**2).sum().to(moments.mean.dtype)

    found = torch.autograd.grad(loss(*Moments.beside(x, weight)), x)[0]
    expected = torch.autograd.grad(loss(Moments.of(x, weight), x), x)[0]
    if dtype == torch.float64:
        assert_same(found, expected)
    else:
        assert (found - expected).abs().max() <= 2 * torch.finfo(dtype).eps * expected.abs().max()
