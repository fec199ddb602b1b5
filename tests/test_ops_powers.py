"""Powers of scalar products from features: sums that merge, and operators that PyTorch may trace."""

import math
from itertools import product

import pytest
import torch

from sansmax.ops import powers
from sansmax.ops.pointwise import PointwiseState, pointwise_attend, pointwise_attention

B, HEADS, N, D = 3, 2, 13, 7


def draw():
    return [torch.randn(B, HEADS, N, D, dtype=torch.float64, requires_grad=True) for _ in "qkv"]


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_features_are_the_distinct_products_and_few_enough(degree, assert_same):
    d, n = 5, 3
    x, v = torch.randn(n, d, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    # each row of the sums of one-hot values is the features of one token
    features = powers.power_sums(x, v, degree).T
    assert features.shape == (n, math.comb(d + degree - 1, degree))
    chosen = sorted({tuple(sorted(c)) for c in product(range(d), repeat=degree)})
    for found, token in zip(features, x, strict=True):
        by_hand = [math.prod(token[i] for i in c) for c in chosen]
        times = [sum(tuple(sorted(c)) == own for c in product(range(d), repeat=degree)) ** 0.5 for own in chosen]
        assert_same(found, torch.stack(by_hand) * torch.tensor(times, dtype=torch.float64))


# PyTorch's own check looks at it
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("degree", [1, 3])
def test_the_operators_of_features_keep_their_promises_to_pytorch(degree):
    x, y = (torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    sums = torch.randn(2, powers.count_features(3, degree), 3, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.sansmax.power_sums.default, (x, y, degree))
    torch.library.opcheck(torch.ops.sansmax.power_read.default, (x, sums, degree))
    tensors = [t.detach() for t in (x, y, sums)]
    torch.library.opcheck(torch.ops.sansmax.power_slope.default, (*tensors, degree))


@pytest.mark.parametrize("sizes", [(N,), (6, 7), (0, N), (0, 0, N, 0), (3, 0, 1, 2, 7)])
@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_split_tokens_give_the_same_state_output_and_gradients(sizes, degree, weighted, assert_same):
    q, k, v = draw()
    weight = torch.rand(B, N, dtype=torch.float64, requires_grad=True) if weighted else None
    by, phi = torch.randn_like(q), {"degree": degree, "bias": 0.4}

    def run(sizes):
        weights = [None] * len(sizes)
        if weight is not None:
            weights = weight[:, None].expand(B, HEADS, N).split(sizes, dim=2)
        pieces = zip(k.split(sizes, dim=2), v.split(sizes, dim=2), weights, strict=True)
        total, *states = (PointwiseState.of(*piece, **phi) for piece in pieces)
        for state in states:
            total = state.merge(total)
        out = torch.cat([pointwise_attend(total, piece, **phi) for piece in q.split(sizes, dim=2)], dim=2)
        inputs = [q, k, v] if weight is None else [q, k, v, weight]
        return [*total, out, *torch.autograd.grad(out, inputs, by)]

    whole = run((N,))
    for i, (found, expected) in enumerate(zip(run(sizes), whole, strict=True)):
        assert_same(found, expected, f"result {i}")
    at_once = pointwise_attention(q, k, v, mask=weight, activation="polynomial", order="quadratic", **phi)
    assert_same(whole[2], at_once, "output at once")


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_merging_is_associative_and_commutative(degree, assert_same):
    sets = ([torch.randn(B, n, D, dtype=torch.float64) for _ in "kv"] for n in (2, 3, 5))
    a, b, c = (PointwiseState.of(*kv, degree=degree) for kv in sets)
    for other in (a.merge(b).merge(c), a.merge(c).merge(b), c.merge(b.merge(a))):
        for name, found, expected in zip(PointwiseState._fields, other, a.merge(b.merge(c)), strict=True):
            assert_same(found, expected, name)


def test_a_state_is_kept_in_float32_and_read_in_the_type_of_the_queries():
    q, k, v = (x.detach().bfloat16() for x in draw())
    state = PointwiseState.of(k, v)
    assert {x.dtype for x in state} == {torch.float32}
    assert pointwise_attend(state, q).dtype == torch.bfloat16


def test_a_state_of_another_degree_or_bias_is_an_error():
    q, k, v = draw()
    state = PointwiseState.of(k, v, degree=2)
    for options in ({"degree": 3}, {"bias": 1.0}):
        with pytest.raises(ValueError, match=r"state has 28 features, but queries of 7 channels .* have (84|36)"):
            pointwise_attend(state, q, **options)
    with pytest.raises(ValueError, match="in linear order must be at most 4, got 5"):
        PointwiseState.of(k, v, degree=5)
