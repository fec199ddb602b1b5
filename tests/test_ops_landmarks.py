"""Landmarks pooled from tokens: averages over groups, however the tokens are split, masked or weighted."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from sansmax.ops.landmarks import LandmarkSums, grid_groups, grid_landmarks, sequence_groups, sequence_landmarks

B, C, N, GRID = 3, 5, 30, (5, 6)
KINDS = {
    "sequence": lambda x, weight=None: sequence_landmarks(x, 7, weight),
    "grid": lambda x, weight=None: grid_landmarks(x, GRID, (2, 3), weight),
}

every_kind = pytest.mark.parametrize("kind", KINDS)


def draw(n=N, b=B):
    return torch.randn(b, n, C, dtype=torch.float64, requires_grad=True)


def draw_weight(which):
    if which == "mask":
        return torch.rand(B, N) < 0.6
    return torch.rand(B, N, dtype=torch.float64, requires_grad=True) if which == "weight" else None


def groups_of(kind, mask):
    """Group of each token of one image, token by token; None for padding."""
    real = [i for i in range(N) if mask[i]]
    for i in range(N):
        if i not in real:
            yield None
        elif kind == "sequence":
            yield real.index(i) * 7 // len(real)
        else:
            y, x = divmod(i, GRID[1])
            yield (y * 2 // GRID[0]) * 3 + x * 3 // GRID[1]


def definition(kind, x, weight):
    w = torch.ones(B, N, dtype=x.dtype) if weight is None else weight.to(x.dtype)
    images = []
    for i in range(B):
        groups = list(groups_of(kind, w[i] != 0))
        rows = []
        for j in range(7 if kind == "sequence" else 6):
            members = [t for t in range(N) if groups[t] == j]
            total = sum(w[i, t] * x[i, t] for t in members)
            rows.append(total / w[i, members].sum() if members else torch.zeros(C, dtype=x.dtype))
        images.append(torch.stack(rows))
    return torch.stack(images)


@every_kind
@pytest.mark.parametrize("which", [None, "mask", "weight"])
def test_equals_the_definition_in_value_and_gradients(kind, which, assert_same):
    x, weight = draw(), draw_weight(which)
    found, expected = KINDS[kind](x, weight)[0], definition(kind, x, weight)
    assert_same(found, expected)
    inputs, by = [x, weight] if which == "weight" else [x], torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad(y, inputs, by) for y in (found, expected)), strict=True):
        assert_same(a, b, "gradient")


@every_kind
def test_gradients_equal_finite_differences(kind):
    x, weight = draw(b=1), draw_weight("weight")[:1].detach().requires_grad_()
    assert gradcheck(lambda x, w: KINDS[kind](x, w)[0], (x, weight))


def test_a_grid_that_the_cells_divide_is_adaptive_average_pooling(assert_same):
    x = torch.randn(B, 6 * 8, C, dtype=torch.float64)
    found, real = grid_landmarks(x, (6, 8), (3, 4))
    expected = F.adaptive_avg_pool2d(x.mT.unflatten(-1, (6, 8)), (3, 4)).flatten(2).mT
    assert real.all()
    assert_same(found, expected)


@pytest.mark.parametrize("n", [1, 6, 7, 8, 30])
def test_groups_of_a_sequence_are_stretches_of_one_length_but_for_one_token(n):
    group = sequence_groups(torch.randn(n, C), 7)
    assert (group.diff() >= 0).all()
    sizes = group.bincount(minlength=7)
    assert sizes.max() - sizes.min() <= 1
    assert sizes.sum() == n


@every_kind
@pytest.mark.parametrize("which", [None, "mask", "weight"])
@pytest.mark.parametrize("sizes", [(30,), (13, 17), (0, 30, 0), (1, 2, 11, 16)])
def test_split_tokens_give_the_same_landmarks(kind, which, sizes, assert_same):
    x, weight = draw(), draw_weight(which)
    state, first, start = None, 0, 0
    total = N if weight is None else (weight != 0).sum(-1)
    for size in sizes:
        piece, w = x[:, start : start + size], None if weight is None else weight[:, start : start + size]
        if kind == "sequence":
            group = sequence_groups(piece, 7, w, first=first, total=total)
            first = first + (size if w is None else (w != 0).sum(-1))
        else:
            group = grid_groups(piece, GRID, (2, 3), first=start)
        more = LandmarkSums.of(piece, group, 7 if kind == "sequence" else 6, w)
        state, start = more if state is None else state.merge(more), start + size
    whole, real = KINDS[kind](x, weight)
    assert_same(state.value(), whole)
    assert torch.equal(state.real(), real)


def test_a_padded_set_gives_what_the_set_alone_gives(assert_same):
    x, mask = draw(), draw_weight("mask")
    padded = x.detach().masked_fill(~mask[..., None], float("nan")).requires_grad_()
    found, real = sequence_landmarks(padded, 7, mask)
    (grad,) = torch.autograd.grad(found.square().sum(), padded)
    assert (grad[~mask] == 0).all()
    for i in range(B):
        alone = x[i : i + 1, mask[i]].detach().requires_grad_()
        expected, real_alone = sequence_landmarks(alone, 7)
        assert_same(found[i : i + 1], expected)
        assert torch.equal(real[i : i + 1], real_alone)
        assert_same(grad[i : i + 1, mask[i]], torch.autograd.grad(expected.square().sum(), alone)[0], "gradient")


@every_kind
def test_weight_zero_is_an_absent_token(kind, assert_same):
    x, mask = draw(), draw_weight("mask")
    for a, b in zip(KINDS[kind](x, mask.double()), KINDS[kind](x, mask), strict=True):
        assert_same(a.double(), b.double())


@every_kind
def test_groups_without_real_tokens_are_zero_and_not_real(kind):
    x, mask = draw(), torch.arange(N).expand(B, N) < 2
    mask = mask.clone()
    mask[1] = False
    found, real = KINDS[kind](x, mask)
    assert (found[~real] == 0).all()
    assert (found[real] != 0).all()
    assert not real[1].any()
    assert real[0].sum() == (2 if kind == "sequence" else 1)
    assert torch.autograd.grad(found.sum(), x)[0].isfinite().all()


def test_fewer_tokens_than_landmarks_are_their_own_landmarks(assert_same):
    x = draw(4)
    found, real = sequence_landmarks(x, 7)
    assert (real.sum(-1) == 4).all()
    assert_same(found[real].view_as(x), x)
    # a grid of one row on two rows of cells
    found, real = grid_landmarks(x, (1, 4), (2, 4))
    assert_same(found[real].view_as(x), x)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_in_float32_whatever_the_type_and_autocast(kind, dtype, assert_same):
    x = draw().detach().to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = KINDS[kind](x)
    assert found.dtype == torch.float32
    assert_same(found, KINDS[kind](x.double())[0].float())


def test_a_grid_of_another_size_is_an_error_that_tells_both():
    with pytest.raises(ValueError, match=r"grid 5 x 5 has 25 tokens, but x has 30; give \(height, width\)"):
        grid_landmarks(draw(), (5, 5), (2, 2))
