"""Softmax attention, the baseline: equal to its definition, with the same masks and weights as the others."""

import pytest
import torch

from sansmax.ops import softmax_attention

B, HEADS, N, D = 3, 2, 13, 7


def definition(q, k, v, weight=None):
    """The slow way: explicit exponentials, a row at a time, each key counted by its weight."""
    out = torch.zeros_like(v)
    for i in range(q.shape[0]):
        w = q.new_ones(q.shape[2]) if weight is None else weight[i].to(q.dtype)
        for h in range(q.shape[1]):
            rows = []
            for row in q[i, h]:
                e = w * torch.exp(k[i, h] @ row / q.shape[3] ** 0.5)
                rows.append((e / e.sum()) @ v[i, h])
            out[i, h] = torch.stack(rows)
    return out


def draw(n=N, b=B):
    return [torch.randn(b, HEADS, n, D, dtype=torch.float64, requires_grad=True) for _ in "qkv"]


def draw_mask(n=N):
    return (torch.rand(B, n) < 0.6).index_fill(1, torch.tensor(0), True)


@pytest.mark.parametrize("kind", [None, "mask", "weight"])
def test_equals_the_definition_in_output_and_gradients(kind, assert_same):
    q, k, v = draw()
    weight = {None: None, "mask": draw_mask(), "weight": torch.rand(B, N, dtype=torch.float64, requires_grad=True)}[
        kind
    ]
    real = weight if kind == "mask" else torch.ones(B, N, dtype=torch.bool)
    found, expected = (
        f.transpose(1, 2)[real] for f in (softmax_attention(q, k, v, mask=weight), definition(q, k, v, weight))
    )
    assert_same(found, expected, "output")
    by = torch.randn_like(found)
    inputs = [q, k, v, weight] if kind == "weight" else [q, k, v]
    pairs = (torch.autograd.grad(out, inputs, by) for out in (found, expected))
    for name, a, b in zip(["q", "k", "v", "weight"], *pairs, strict=False):
        assert_same(a, b, f"gradient of {name}")


def test_weight_zero_is_an_absent_token(assert_same):
    q, k, v = draw()
    mask = draw_mask()
    weighted, masked = (softmax_attention(q, k, v, mask=m) for m in (mask.double(), mask))
    assert_same(weighted.transpose(1, 2)[mask], masked.transpose(1, 2)[mask])


@pytest.mark.parametrize("garbage", [7.0, float("nan"), float("inf")])
def test_padding_may_hold_anything(garbage, assert_same):
    heads, real = draw(b=1), draw_mask()[:1]
    padded = [x.detach().masked_fill(~real[:, None, :, None], garbage).requires_grad_() for x in heads]
    alone = [x.detach()[:, :, real[0]].requires_grad_() for x in heads]
    inside, bag = softmax_attention(*padded, mask=real), softmax_attention(*alone)
    assert_same(inside[:, :, real[0]], bag, "output")
    assert (inside[:, :, ~real[0]] == 0).all()
    by = torch.randn_like(bag)
    pairs = (torch.autograd.grad(o, i, by) for o, i in ((inside[:, :, real[0]], padded), (bag, alone)))
    for a, b in zip(*pairs, strict=True):
        assert_same(a[:, :, real[0]], b, "gradient")
        assert (a[:, :, ~real[0]] == 0).all()


@pytest.mark.parametrize("kind", ["mask", "weight"])
def test_an_image_without_real_tokens_is_zero_and_spares_the_others(kind, assert_same):
    heads, mask = draw(), draw_mask()
    mask[1] = False
    weight = mask if kind == "mask" else mask.double()
    out = softmax_attention(*heads, mask=weight)
    assert (out[1] == 0).all()
    assert_same(out[[0, 2]], softmax_attention(*(x[[0, 2]] for x in heads), mask=weight[[0, 2]]))
    for g in torch.autograd.grad(out.sum(), heads):
        assert g.isfinite().all()


def test_nan_in_a_real_token_shows_in_its_own_image_only():
    mask = draw_mask()
    q, k, v = (x.detach() for x in draw())
    k[1, 0, 0, 3] = float("nan")
    out = softmax_attention(q, k, v, mask=mask)
    assert out[1, 0][mask[1]].isnan().all()
    assert out[[0, 2]].isfinite().all()


def test_one_token_gives_its_value(assert_same):
    q, k, v = draw(n=1)
    assert_same(softmax_attention(q, k, v), v)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_is_as_accurate_as_plain_torch(dtype, assert_as_accurate):
    q, k, v = (x.detach().to(dtype) for x in draw(n=101))
    plain = definition(q.float(), k.float(), v.float()).to(dtype)
    assert_as_accurate(softmax_attention(q, k, v), plain, definition(q.double(), k.double(), v.double()))
