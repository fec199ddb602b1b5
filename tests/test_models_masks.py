"""Blocks in two phases, the order that is chosen, masks, and the errors of arguments that do not fit."""

import pytest
import torch
from networks import GRID, gradients, images, perturbed, small
from torch.utils.flop_counter import FlopCounterMode

from sansmax.models.attention import SeqNormAttention, SoftmaxAttention
from sansmax.models.blocks import ATTENTIONS, Block
from sansmax.models.orders import ORDERS, choose_order


@pytest.mark.parametrize("attention", ["seqnorm", "sima"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n", [5, 61])
def test_mapping_by_the_summary_is_the_block(attention, order, n, assert_same):
    block = perturbed(
        Block(22, 2, attention=attention, order=order, init_values=0.5, qkv_bias=True, dtype=torch.float64)
    )
    x = torch.randn(2, n, 22, dtype=torch.float64)
    summary = block.summarise(x)
    assert_same(block.map(summary, x), block(x), "whole")
    assert_same(block.map(block.finish(summary), x), block(x), "finished")
    parts = x.split((2, n - 2), dim=1)
    merged = block.summarise(parts[0]).merge(block.summarise(parts[1]))
    assert_same(torch.cat([block.map(merged, part) for part in parts], dim=1), block(x), "in parts")


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_layer_gives_zero_at_masked_tokens_in_every_order(attention, assert_same):
    options = {"num_landmarks": 5} if attention == "soft" else {}
    layer = perturbed(ATTENTIONS[attention](22, num_heads=2, dtype=torch.float64, **options))
    x, mask = torch.randn(2, 13, 22, dtype=torch.float64), torch.rand(2, 13) < 0.6
    mask[1] = False
    expected = layer(x, mask)
    assert (expected[~mask] == 0).all()
    for order in layer.orders:
        layer.order = order
        if attention in ("relu", "squared_relu", "sigmoid") and order == "linear":
            continue
        assert_same(layer(x, mask), expected, order)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_layer_without_tokens_is_an_error(attention):
    layer = ATTENTIONS[attention](22, num_heads=2)
    for order in layer.orders:
        layer.order = order
        with pytest.raises(ValueError, match=r"there are no tokens, shape \(2, 0, 22\)"):
            layer(torch.randn(2, 0, 22))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_weights_of_zero_are_no_tokens_in_any_order(attention, assert_same):
    layer = perturbed(ATTENTIONS[attention](22, num_heads=2, dtype=torch.float64))
    x, weight = torch.randn(2, 13, 22, dtype=torch.float64), torch.rand(2, 13, dtype=torch.float64)
    weight[1] = 0
    for order in layer.orders:
        layer.order = order
        if attention in ("relu", "squared_relu", "sigmoid") and order == "linear":
            continue
        assert_same(layer(x, weight)[1], layer.proj.bias.expand(13, 22), order)


@pytest.mark.parametrize("n", [2, 40, 400])
@pytest.mark.parametrize(("dim", "heads"), [(96, 2), (96, 12), (32, 1)])
def test_auto_takes_the_order_that_is_chosen_and_says_why(n, dim, heads):
    x, block = torch.randn(1, n, dim), SeqNormAttention(dim, heads)
    operations = {}
    for order in ORDERS:
        block.order = order
        with FlopCounterMode(display=False) as counter:
            block(x)
        operations[order] = counter.get_total_flops()
    choice = choose_order(n, dim, dim // heads)
    assert operations["auto"] == operations[choice.order]
    assert f"{n} tokens, {dim} channels, heads of {dim // heads}" in choice.reason


def test_each_order_is_the_cheapest_somewhere():
    assert choose_order(4, 96, 48).order == "quadratic"
    assert choose_order(100, 96, 8).order == "linear"
    assert choose_order(4000, 96, 48).order == "moments"
    # the fixed part of the cost is paid once for a batch
    assert choose_order(300, 96, 48).order == "linear"
    assert choose_order(300, 96, 48, batch=64).order == "moments"


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("garbage", [7.0, float("nan"), float("inf")])
def test_padding_of_a_block_may_hold_anything(attention, garbage, assert_same):
    block = perturbed(Block(22, 2, attention=attention, dtype=torch.float64))
    x, real = torch.randn(1, 13, 22, dtype=torch.float64), torch.arange(13)[None] % 3 > 0
    padded = x.masked_fill(~real[..., None], garbage)
    inside, alone = block(padded, real)[real], block(x[real][None])[0]
    assert_same(inside, alone, "output")
    by = torch.randn_like(alone)
    pairs = [torch.autograd.grad(out, list(block.parameters()), by) for out in (inside, alone)]
    for found, expected in zip(*pairs, strict=True):
        assert_same(found, expected, "gradient", scale=max(1.0, expected.abs().max().item()))


# Masks


VARIANTS = [
    {},
    {"class_token": True, "global_pool": "token"},
    {"class_token": True, "reg_tokens": 2},
    {"fc_norm": True},
]
VARIANTS += [{"class_token": True, "pool_include_prefix": True}, {"attention": "softmax"}]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a_masked_image_is_the_smaller_image(changes, assert_same):
    model = small("seqnorm_vit_pico_patch8_128", **changes)
    x = images(model)
    mask = (torch.arange(15) < 10).expand(2, 15)
    cut = x[:, :, : 2 * 8]
    assert_same(model(x, mask), model(cut), "masked")
    assert_same(model(x, mask.double()), model(cut), "weighted")
    assert_same(model(x, torch.ones_like(mask)), model(x), "mask of ones")
    assert_same(
        model.forward_head(model.forward_features(x, mask), True, mask),
        model.forward_head(model.forward_features(cut), True),
    )
    inside, outside = (gradients(model, out.square().sum()) for out in (model(x, mask), model(cut)))
    for found, expected in zip(inside, outside, strict=True):
        assert_same(found, expected, "gradient", scale=max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("name", ["seqnorm_vit_tiny_patch16_224", "seqnorm_vit_pico_patch8_128"])
def test_pixels_under_the_mask_do_not_matter(name, assert_same):
    model = small(name, class_token=True)
    x, mask = images(model), torch.rand(2, 15) < 0.6
    patch = model.patch_embed.patch_size[0]
    pixels = mask.view(2, 1, *GRID).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    other = torch.where(pixels, x, 1e3 * torch.randn_like(x))
    assert_same(model(other, mask), model(x, mask), "logits")
    assert (model(other) - model(x)).abs().max() > 1e-3
    found, expected = (gradients(model, model(t, mask).square().sum()) for t in (other, x))
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b, "gradient", scale=max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("name", ["seqnorm_vit_tiny_patch16_224", "seqnorm_vit_pico_patch8_128"])
def test_a_masked_batch_is_finite_where_an_image_has_no_patch(name, assert_same):
    model = small(name)
    x, mask = images(model), torch.rand(2, 15) < 0.6
    mask[1] = False
    logits = model(x, mask)
    assert logits.isfinite().all()
    assert_same(logits[:1], model(x[:1], mask[:1]))
    assert all(g.isfinite().all() for g in gradients(model, logits.sum()))


def test_apply_is_the_method_of_modules():
    model = small("seqnorm_vit_pico_patch8_128")
    seen = []
    assert model.apply(lambda module: seen.append(module)) is model
    assert set(map(id, seen)) == set(map(id, model.modules()))


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention": "linear"}, "attention must be one of softmax, seqnorm, sima, soft, relu, .* got 'linear'"),
        ({"stem": "pool"}, "stem must be one of patch, conv, got 'pool'"),
        (
            {"attn_order": "cubic"},
            "order of seqnorm attention must be one of auto, quadratic, linear, moments, got 'cubic'",
        ),
        (
            {"attention": "softmax", "attn_order": "linear"},
            "order of softmax attention must be one of auto, quadratic, got 'linear'",
        ),
        ({"attention": "relu", "attn_order": "linear"}, "with relu, .* must be one of auto, quadratic, got 'linear'"),
        ({"attn_options": {"degree": 3}}, "seqnorm attention does not take these options.*degree"),
        (
            {"attention": "soft", "attn_options": {"num_landmarks": 0}},
            "num_landmarks of soft attention must be at least 1",
        ),
        (
            {"attention": "soft", "attn_options": {"inverse": "lu"}},
            "inverse of soft attention must be one of .* got 'lu'",
        ),
        (
            {"attention": "soft", "attn_options": {"ratio": 2}},
            "ratio asks for landmarks by convolution, .* use num_land",
        ),
        ({"qk_norm": True}, "qk_norm cannot be used with seqnorm attention; leave it out"),
        ({"attn_drop_rate": 0.1}, "attn_drop_rate cannot be used with seqnorm attention"),
        ({"scale_attn_norm": True, "scale_mlp_norm": True}, "scale_attn_norm, scale_mlp_norm cannot be used"),
        ({"num_heads": 3}, "embed_dim 22 is not divisible by num_heads 3"),
        ({"num_heads": 3, "attention": "softmax"}, "embed_dim 22 is not divisible by num_heads 3"),
    ],
)
def test_arguments_that_do_not_fit_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        small("seqnorm_vit_tiny_patch16_224", **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_pool": "max"}, 'a mask needs global_pool "avg" or "token", this network pools by \'max\''),
        ({"global_pool": ""}, "this network pools by ''"),
        ({"patch_drop_rate": 0.5}, "a mask cannot be used together with patch_drop_rate in training"),
    ],
)
def test_masks_that_cannot_be_honoured_are_errors(arguments, message):
    model = small("seqnorm_vit_tiny_patch16_224", **arguments).train()
    with pytest.raises(ValueError, match=message):
        model(images(model), torch.ones(2, 15, dtype=torch.bool))


def test_a_mask_with_patch_drop_works_in_evaluation(assert_same):
    model, plain = (small("seqnorm_vit_tiny_patch16_224", patch_drop_rate=rate) for rate in (0.5, 0.0))
    plain.load_state_dict(model.state_dict())
    x, mask = images(model), torch.rand(2, 15) < 0.6
    assert_same(model(x, mask), plain(x, mask))


@pytest.mark.parametrize("shape", [(2, 1), (2, 14), (1, 15)])
def test_a_mask_of_another_shape_is_an_error(shape):
    model = small("seqnorm_vit_tiny_patch16_224", class_token=True)
    with pytest.raises(ValueError, match=r"\(2, 15\) for 2 images of 3 x 5 patches, got"):
        model(images(model), torch.ones(shape, dtype=torch.bool))


def test_softmax_has_no_summary():
    block = Block(22, 2, attention="softmax")
    assert isinstance(block.attn, SoftmaxAttention)
    assert not block.streams
    with pytest.raises(ValueError, match=r'SoftmaxAttention has no summary of fixed size.*use attention="seqnorm"'):
        block.summarise(torch.randn(1, 3, 22))
