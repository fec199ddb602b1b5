"""SimA on XCiT equals the authors' code and its formulas written out, on images of any size."""

import math

import pytest
import timm
import torch
from networks import GRID, images, small
from published import difference, manifest, manifest_names, picture, reference, weights

from benchmarks.published_sima import forward as published_forward
from sansmax.models.class_attention import ClassAttentionBlock
from sansmax.models.xcit import SimAXCiT, checkpoint_filter_fn
from sansmax.models.xcit_layers import FourierPositions, XCiTBlock

NAMES = [name for name in manifest_names() if name.startswith("sima_")]
# what the authors' code answered for
LOGITS = [
    "sima_nano_12_p16_224",
    "sima_nano_12_p16_256",
    "sima_small_12_p16_224",
    "sima_small_12_p16_512",
    "sima_tiny_12_p8_224",
]


def filled(name, dtype=torch.float64, **changes):
    model = timm.create_model(name, dtype=dtype, **changes).eval()
    model.load_state_dict(checkpoint_filter_fn(weights(manifest(name), dtype), model))
    return model


# The published networks


def test_all_published_networks_are_there():
    assert len(NAMES) == 14
    assert set(NAMES) <= set(timm.list_models())


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_are_the_published_ones(name):
    model = timm.create_model(name, device="meta")
    found = {n: tuple(x.shape) for n, x in model.state_dict().items()}
    assert found == checkpoint_filter_fn(manifest(name), model)
    buffers = {n for n, _ in model.named_buffers()}
    count = sum(
        math.prod(shape) for n, shape in manifest(name).items() if n.replace("pos_embeder", "pos_embed") not in buffers
    )
    assert sum(p.numel() for p in model.parameters()) == count
    assert checkpoint_filter_fn(found, model) == found


def test_the_default_configuration_describes_the_network():
    for name in NAMES:
        cfg = timm.get_pretrained_cfg(name)
        assert (cfg.license, cfg.paper_ids, cfg.num_classes, cfg.input_size) == (
            "mit",
            "arXiv:2206.08898",
            1000,
            (3, 224, 224),
        )
        patch = int(name.rsplit("p", 1)[1])
        assert cfg.min_input_size == (3, patch, patch)
        model = timm.create_model(name, device="meta")
        assert model.get_submodule(cfg.first_conv).in_channels == 3
        assert model.get_submodule(cfg.classifier) is model.get_classifier()
        assert {m.eta for m in model.modules() if hasattr(m, "eta")} == {1.0 if "_12_" in name else 1e-5}
        assert {m.tokens_norm for m in model.cls_attn_blocks} == {"nano" not in name}
        assert {b.attn.num_heads for b in (*model.blocks, *model.cls_attn_blocks)} == {HEADS[name.split("_")[1]]}


HEADS = {"nano": 4, "tiny": 4, "small": 8, "medium": 8, "large": 16}


# in float32 the authors' own code is this far from its own float64
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
@pytest.mark.parametrize("case", LOGITS)
def test_logits_are_those_of_the_authors_code(case, dtype, allowed):
    name, size = case.rsplit("_", 1)
    with torch.no_grad():
        found = filled(name, dtype)(picture(int(size)).to(dtype))
    assert difference(found, reference(f"logits/{case}")["logits64"]) <= allowed


@pytest.mark.parametrize(
    ("case", "block", "grid"),
    [
        ("sima_block", lambda: XCiTBlock(64, 2), (16, 16)),
        ("sima_cls_block_tokens_norm_True", lambda: ClassAttentionBlock(64, 2, tokens_norm=True), ()),
    ],
    ids=["block", "class block"],
)
def test_blocks_and_all_their_gradients_are_those_of_the_authors_code(case, block, grid):
    expected, block = reference(f"blocks/{case}"), block().double().eval()
    block.load_state_dict(
        weights({n: x.shape for n, x in block.state_dict().items()}, prefix=expected["meta"]["prefix"])
    )
    x = torch.from_numpy(expected["x"]).double().requires_grad_()
    y = block(x, *grid)
    assert difference(y.detach(), expected["y"]) <= 1e-9
    named = {"grad_x": x} | {f"grad.{n}": p for n, p in block.named_parameters()}
    found = torch.autograd.grad((y * torch.from_numpy(expected["R"])).sum(), list(named.values()))
    assert {n for n in expected if n.startswith("grad")} == set(named)
    for name, gradient in zip(named, found, strict=True):
        assert difference(gradient, expected[name]) <= 1e-9, name


def test_the_positions_are_those_of_the_authors_code():
    expected = reference("blocks/sima_pos_14x14")
    layer = FourierPositions(64).double()
    layer.load_state_dict(
        weights({n: x.shape for n, x in layer.state_dict().items()}, prefix=expected["meta"]["prefix"])
    )
    assert difference(layer(14, 14).mT.unflatten(1, (14, 14))[None], expected["y64_float32_table"]) <= 1e-9
    assert difference(layer.float()(14, 14).mT.unflatten(1, (14, 14))[None], expected["y32"]) <= 1e-6


@pytest.mark.parametrize("grid", [(3, 5), (1, 1), (2, 9)])
@pytest.mark.parametrize("name", ["sima_nano_12_p16", "sima_tiny_12_p8"])
def test_the_network_is_its_formulas_written_out(name, grid, assert_same):
    model = small(name)
    x = images(model, grid=grid)
    assert_same(model(x), published_forward(model, x))


def test_a_single_head_is_as_good_as_many(assert_same):
    model = small("sima_tiny_12_p16", num_heads=1)
    x = images(model)
    assert_same(model(x), published_forward(model, x))
    assert (model(x) - small_heads(model, 2)(x)).abs().max() > 1e-3


def small_heads(model, num_heads):
    other = small("sima_tiny_12_p16", num_heads=num_heads)
    other.load_state_dict(model.state_dict())
    return other


def test_autocast_in_16_bit_stays_within_a_hundredth():
    model = filled("sima_small_12_p16", torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model(picture(224).float())
    assert difference(found, reference("logits/sima_small_12_p16_224")["logits64"]) <= 1e-2


def test_autocast_leaves_positions_class_token_and_head_as_they_are():
    model = small("sima_tiny_12_p16", dtype=torch.float32)
    tokens = torch.randn(2, 16, 22)
    block = model.cls_attn_blocks[0]
    results = []
    with torch.no_grad():
        for enabled in (True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                results.append([model.pos_embed(*GRID), model.forward_head(tokens), block(tokens, only_class=True)])
    for (found, expected), allowed in zip(zip(*results, strict=True), (0.0, 0.0, 1e-3), strict=True):
        assert found.dtype == torch.float32
        assert difference(found, expected) <= allowed


# What an image may be


@pytest.mark.parametrize("size", [(224, 230), (230, 224), (0, 224), (8, 8)])
def test_both_sides_of_an_image_must_be_a_multiple_of_the_patch(size):
    height, width = size
    with pytest.raises(ValueError, match=rf"image of {height} x {width} pixels.*multiple of 16: resize, crop or pad"):
        SimAXCiT(img_size=size, depth=1, device="meta")
    model = SimAXCiT(depth=1, embed_dim=16, num_heads=2)
    with pytest.raises(ValueError, match=rf"image of {height} x {width} pixels.*multiple of 16: resize, crop or pad"):
        model(torch.zeros(1, 3, height, width))


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (7, 2), (3, 11)])
def test_images_of_any_size_do_not_see_each_other(grid, assert_same):
    model = small("sima_tiny_12_p16")
    x = images(model, b=3, grid=grid)
    logits = model(x)
    for i in range(3):
        assert_same(logits[i : i + 1], model(x[i : i + 1]))
    x[1] = math.nan
    assert model(x)[[0, 2]].isfinite().all() and model(x)[1].isnan().all()
