"""The SOFT layer equals its formula written out, with pooled and with convolved landmarks, in every order."""

import pytest
import torch
import torch.nn.functional as F
from networks import perturbed

from sansmax.models.attention_soft import Landmarks, Place, SoftAttention

C, HEADS, M = 22, 2, 5
D = C // HEADS
GRID = (6, 7)
N = GRID[0] * GRID[1]


def build(**options):
    return perturbed(SoftAttention(C, HEADS, qkv_bias=True, dtype=torch.float64, **{"num_landmarks": M, **options}))


def draw(b=2, n=N):
    return torch.randn(b, n, C, dtype=torch.float64, requires_grad=True)


def heads(x):
    return x.unflatten(-1, (HEADS, D)).transpose(1, 2)


def kernel(a, b):
    return torch.exp(-(a[..., :, None, :] - b[..., None, :, :]).square().sum(-1) / (2 * D**0.5))


def formula(layer, x, landmarks, normalized=False):
    """P inv(A + 0.01 I) P^T V with an explicit n x n matrix, the exact inverse, scaled from both sides for SOFT++."""
    q, v = heads(layer.q(x)), heads(layer.v(x))
    a = kernel(landmarks, landmarks)
    z = torch.linalg.inv(a + 0.01 * torch.eye(a.shape[-1], dtype=a.dtype))
    if normalized:
        scale = a.sum(-1) ** -0.5
        z = scale[..., :, None] * z * scale[..., None, :]
    p = kernel(q, landmarks)
    return layer.proj(((p @ z @ p.mT) @ v).transpose(1, 2).flatten(2))


def pooled(layer, x):
    """The averages of the queries in stretches of the sequence whose lengths differ by one at most."""
    group = torch.arange(x.shape[1]) * M // x.shape[1]
    q = heads(layer.q(x))
    return torch.stack([q[:, :, group == j].mean(2) for j in range(M)], dim=2)


def convolved(layer, x):
    """As published: queries over d^(1/4), a convolution that all heads share, LayerNorm, GELU."""
    q = heads(layer.q(x)) / D**0.25
    rows = []
    for b in range(q.shape[0]):
        of_heads = []
        for h in range(HEADS):
            picture = q[b, h].T.reshape(1, D, *GRID)
            out = F.conv2d(picture, layer.landmark_conv.weight, stride=layer.ratio)[0].flatten(1).T
            norm = layer.landmark_norm
            of_heads.append(F.gelu(F.layer_norm(out, (D,), norm.weight, norm.bias, 1e-5)))
        rows.append(torch.stack(of_heads))
    # the formula's kernel divides the distances by d^(1/2), the published one the points by d^(1/4)
    return torch.stack(rows) * D**0.25


def same_with_gradients(found, expected, inputs, assert_same):
    assert_same(found, expected, "output")
    by = torch.randn_like(expected)
    pairs = (torch.autograd.grad(out, inputs, by) for out in (found, expected))
    for i, (a, b) in enumerate(zip(*pairs, strict=True)):
        # the inverse magnifies rounding by 100
        assert_same(a, b, f"gradient {i}", scale=100 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("order", ["auto", "quadratic", "linear", "folded"])
@pytest.mark.parametrize("normalized", [False, True])
def test_pooled_landmarks_give_the_formula(order, normalized, assert_same):
    layer, x = build(order=order, normalized=normalized), draw()
    assert layer.folds == (order in ("auto", "folded"))
    expected = formula(layer, x, pooled(layer, x), normalized)
    same_with_gradients(layer(x), expected, [x, *layer.parameters()], assert_same)


@pytest.mark.parametrize("order", ["auto", "quadratic", "linear", "folded"])
@pytest.mark.parametrize("ratio", [2, 3])
def test_convolved_landmarks_give_the_formula(order, ratio, assert_same):
    layer, x = build(order=order, ratio=ratio), draw()
    assert not layer.streams
    expected = formula(layer, x, convolved(layer, x))
    same_with_gradients(layer(x, grid=GRID), expected, [x, *layer.parameters()], assert_same)


@pytest.mark.parametrize("num_landmarks", [M, 2 * D])
def test_the_layer_folds_where_landmarks_are_fewer_than_channels_of_a_head(num_landmarks):
    assert build(num_landmarks=num_landmarks).folds == (num_landmarks < D)


@pytest.mark.parametrize("order", ["linear", "folded"])
def test_two_rounds_of_chunks_are_the_layer(order, assert_same):
    layer, x = build(order=order), draw()
    mask = (torch.rand(2, N) < 0.6).index_fill(1, torch.tensor(0), True)
    chunks = [slice(0, 10), slice(10, 11), slice(11, N)]
    known = None
    for _ in range(layer.rounds):
        state = None
        for c in chunks:
            place = Place(mask[:, : c.start].sum(1), mask.sum(1))
            part = layer.summarise(x[:, c], mask[:, c], known, place)
            state = part if state is None else part.merge(state)
        known = layer.finish(state, known)
    out = torch.cat([layer.map(known, x[:, c]) for c in chunks], dim=1)
    assert_same(out[mask], layer(x, mask)[mask])


@pytest.mark.parametrize("masked", [False, True])
def test_queries_a_chunk_at_a_time_give_the_same(masked, assert_same, monkeypatch):
    monkeypatch.setattr("sansmax.models.attention_soft.CHUNK_TOKENS", 5)
    layer, x = build(), draw()
    mask = (torch.rand(2, N) < 0.6).index_fill(1, torch.tensor(0), True) if masked else None
    with torch.no_grad():
        found = layer(x, mask)
    assert_same(found, layer(x, mask))


def test_fewer_tokens_than_landmarks_use_as_many_as_there_are(assert_same):
    layer, x = build(num_landmarks=D - 1), draw(n=3)
    landmarks = heads(layer.q(x))
    known = layer.finish(layer.summarise(x))
    assert isinstance(known, Landmarks)
    assert known.real.sum() == 2 * 3
    assert_same(layer(x), formula(layer, x, landmarks))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"need the grid of the 42 tokens as grid=\(height, width\), got None"),
        ({"grid": (6, 8)}, r"got \(6, 8\)"),
        ({"grid": (1, 42)}, "a token grid of 1 x 42 is smaller than the landmark ratio 3"),
        ({"grid": GRID, "mask": torch.ones(2, N, dtype=torch.bool)}, "cannot leave out masked tokens"),
    ],
)
def test_what_a_convolution_cannot_do_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(ratio=3)(draw(), **arguments)
