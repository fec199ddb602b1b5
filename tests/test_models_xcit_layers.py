"""The layers of SimA's XCiT by themselves: class attention, local interaction, positions, stem and linear layers."""

import math

import pytest
import torch
import torch.nn.functional as F
from networks import perturbed
from published import difference
from torch import nn

from sansmax.models.class_attention import ClassAttention, ClassAttentionBlock
from sansmax.models.linear import LARGE, Linear, choose_linear
from sansmax.models.xcit_layers import FourierPositions, LocalPatchInteraction, PatchStem
from sansmax.ops.sima import sima_attention, sima_class_attention


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("heads", [1, 3])
def test_class_attention_is_the_first_row_of_attention(heads, bias, assert_same):
    x = torch.randn(2, 11, 15, dtype=torch.float64, requires_grad=True)
    w = torch.randn(45, 15, dtype=torch.float64, requires_grad=True)
    b = torch.randn(45, dtype=torch.float64, requires_grad=True) if bias else None
    found = sima_class_attention(x, w, b, heads)
    q, k, v = F.linear(x, w, b).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    expected = sima_attention(q, k, v, order="quadratic", eps=1e-6, impl="torch")[:, :, 0].flatten(1)
    assert_same(found, expected)
    leaves, g = [x, w, b] if bias else [x, w], torch.randn_like(expected)
    for a, e in zip(torch.autograd.grad(found, leaves, g), torch.autograd.grad(expected, leaves, g), strict=True):
        assert_same(a, e)


def test_a_silent_channel_of_class_attention_gives_nothing_and_no_nan():
    w = torch.randn(30, 10)
    w[[3, 14]] = 0.0
    x = torch.randn(2, 7, 10)
    out = sima_class_attention(x, w, None, 2)
    assert out.isfinite().all()
    # channel 3 of the queries and 4 of the keys: without them the others read on
    assert (out != 0).all()
    w[:20] = 0.0
    assert (sima_class_attention(x, w, None, 2) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_class_attention_in_narrow_types_is_as_accurate_as_the_plain_one(dtype, assert_as_accurate):
    x, w = torch.randn(3, 101, 24).to(dtype), (torch.randn(72, 24) / 5).to(dtype)
    exact = sima_class_attention(x.double(), w.double(), None, 3)
    q, k, v = F.linear(x, w).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    plain = (F.normalize(q, p=1.0, dim=-2, eps=1e-6)[:, :, :1] * F.normalize(k, p=1.0, dim=-2, eps=1e-6)).sum(-1)
    plain = (plain.unsqueeze(2) @ v).flatten(1)
    assert_as_accurate(sima_class_attention(x, w, None, 3), plain, exact)


def test_class_attention_does_not_care_for_the_order_of_the_patches(assert_same):
    layer = ClassAttention(15, 3).double()
    x = torch.randn(2, 12, 15, dtype=torch.float64)
    order = torch.cat((torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(11)))
    assert_same(layer(x[:, order]), layer(x))


@pytest.mark.parametrize("tokens_norm", [True, False])
def test_a_class_block_norms_and_doubles_the_patch_tokens(tokens_norm, assert_same):
    block = perturbed(ClassAttentionBlock(15, 3, tokens_norm=tokens_norm).double())
    x = torch.randn(2, 8, 15, dtype=torch.float64)
    before = x.clone()
    y = block(x)
    assert torch.equal(x, before)
    patches = x + block.gamma1 * block.norm1(x)
    patches = block.norm2(patches) if tokens_norm else patches
    assert_same(y[:, 1:], 2 * patches[:, 1:])
    assert_same(block(x, only_class=True), y[:, :1])


def test_the_local_interaction_reads_two_steps_around(assert_same):
    layer = perturbed(LocalPatchInteraction(3).double())
    x = torch.zeros(1, 9 * 7, 3, dtype=torch.float64, requires_grad=True)
    out = layer(x, 9, 7).unflatten(1, (9, 7))
    (reached,) = torch.autograd.grad(out[0, 4, 3].sum(), x)
    rows, columns = reached.unflatten(1, (9, 7))[0].abs().sum(-1).nonzero().unbind(-1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 6, 1, 5)
    y = torch.randn(2, 9 * 7, 3, dtype=torch.float64)
    maps = y.mT.reshape(2, 3, 9, 7).contiguous()
    expected = layer.conv2(layer.bn(F.gelu(layer.conv1(maps)))).flatten(2).mT
    assert_same(layer(y, 9, 7), expected)


def test_positions_are_waves_of_the_share_of_the_image():
    layer = FourierPositions(64).double()
    with torch.no_grad():
        layer.token_projection.weight.copy_(torch.eye(64).view(64, 64, 1, 1))
        layer.token_projection.bias.zero_()
    table = layer(5, 7).unflatten(0, (5, 7))
    for row, column, size, at, first in [(2, 4, 5, 3, 0), (2, 4, 7, 5, 32)]:
        for i in range(16):
            angle = 2 * math.pi * at / (size + 1e-6) / 10000 ** (2 * i / 32)
            expected = torch.tensor([math.sin(angle), math.cos(angle)], dtype=torch.float64)
            # the table is made in float32
            torch.testing.assert_close(table[row, column, first + 2 * i :][:2], expected, rtol=0, atol=2e-6)


def test_the_stem_in_evaluation_is_the_stem_with_batch_norm_by_itself(assert_same):
    stem = perturbed(PatchStem((48, 32), embed_dim=24).double())
    with torch.no_grad():
        for norm in (m for m in stem.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
    x = torch.randn(2, 3, 48, 32, dtype=torch.float64)
    found, expected = stem(x), stem.proj(x)
    assert_same(found, expected)
    g, leaves = torch.randn_like(expected), list(stem.parameters())
    for a, e in zip(torch.autograd.grad(found, leaves, g), torch.autograd.grad(expected, leaves, g), strict=True):
        assert_same(a, e)


@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
def test_linear_layers_are_the_same_by_onednn(gelu, monkeypatch):
    layer, x = Linear(61, 101, gelu=gelu), torch.randn(3, 1 + LARGE // (3 * 61 * 101), 61)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    exact = F.gelu(exact, approximate=gelu) if gelu else exact
    calls, product = [], torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *a: calls.append(a) or product(*a))
    with torch.no_grad():
        fast = layer(x)
    slow = layer(x)
    assert len(calls) == 1
    for found in (fast, slow):
        assert difference(found, exact.detach()) <= 1e-6
    assert torch.autograd.grad(slow.sum(), layer.weight)[0].isfinite().all()


def test_linear_layers_say_what_computes_them_and_why(monkeypatch):
    w, x = torch.randn(512, 512), torch.randn(64, 512)
    assert "gradients" in choose_linear(x, w).reason and choose_linear(x, w).name == "torch"
    with torch.no_grad():
        assert choose_linear(x, w).name == "onednn"
        for other, why in [((x[:1], w), "small"), ((x.double(), w.double()), "float32"), ((x, w.half()), "float32")]:
            assert choose_linear(*other).name == "torch" and why in choose_linear(*other).reason
        with torch.autocast("cpu", torch.bfloat16):
            assert "autocast" in choose_linear(x, w).reason
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert "without oneDNN" in choose_linear(x, w).reason
