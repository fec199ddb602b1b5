"""SimA on XCiT against the authors' code, against its definition, and under timm's contract."""

import math

import pytest
import timm
import timm.optim
import torch
import torch.nn.functional as F
from apart import assert_nothing_wrong
from networks import GRID, gradients, images, perturbed, small
from published import difference, manifest, manifest_names, picture, reference, weights
from timm.models import group_parameters
from torch import nn

from benchmarks.published_sima import forward as published_forward
from sansmax.models.class_attention import ClassAttention, ClassAttentionBlock
from sansmax.models.linear import LARGE, Linear, choose_linear
from sansmax.models.xcit import SimAXCiT, checkpoint_filter_fn
from sansmax.models.xcit_layers import FourierPositions, LocalPatchInteraction, PatchStem, XCiTBlock
from sansmax.ops.sima import sima_attention, sima_class_attention

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


# Definitions of the layers


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


# timm's contract


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


def test_arguments_of_timm_are_taken():
    model = small("sima_small_24_p8", num_classes=3, in_chans=2, drop_path_rate=0.3, global_pool="avg", drop_rate=0.1)
    assert model(images(model)).shape == (2, 3)
    assert [b.drop_path.drop_prob for b in model.blocks] == [0.3, 0.3]
    assert (model.head_drop.p, model.patch_embed.grid_size, model.patch_embed.num_patches) == (0.1, GRID, 15)
    assert (model.num_features, model.head_hidden_size, model.embed_dim, model.in_chans) == (22, 22, 22, 2)
    with pytest.raises(ValueError, match=r"global_pool must be one of 'token', 'avg', .*, got 'mean'"):
        small("sima_small_24_p8", global_pool="mean")
    with pytest.raises(ValueError, match="embed_dim 22 is not divisible by num_heads 3"):
        small("sima_small_24_p8", num_heads=3)
    with pytest.raises(ValueError, match="patch_size of 2, 4, 8, 16 or 32, got 12"):
        SimAXCiT(patch_size=12)


@pytest.mark.parametrize("pool", ["token", "avg", "max"])
def test_the_stages_of_the_forward_pass_fit_together(pool, assert_same):
    model = small("sima_tiny_12_p16", global_pool=pool)
    x = images(model)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 16, 22)
    pooled = {"token": tokens[:, 0], "avg": tokens[:, 1:].mean(1), "max": tokens[:, 1:].amax(1)}[pool]
    assert_same(model.forward_head(tokens, pre_logits=True), pooled)
    assert_same(model(x), model.head(pooled))
    final, maps = model.forward_intermediates(x)
    assert_same(final, tokens)
    assert [m.shape for m in maps] == [(2, 22, *GRID)] * 2
    (first,) = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True, output_fmt="NLC")
    assert_same(model.blocks[1](first, *GRID), maps[1].flatten(2).mT)
    (normed,) = model.forward_intermediates(x, indices=[0], norm=True, intermediates_only=True)
    assert_same(normed.flatten(2).mT, model.norm(first))
    with pytest.raises(ValueError, match='must be "NCHW" or "NLC", got \'NHWC\''):
        model.forward_intermediates(x, output_fmt="NHWC")
    with pytest.raises(ValueError, match="return_prefix_tokens cannot be had"):
        model.forward_intermediates(x, return_prefix_tokens=True)


def test_features_only_gives_maps_of_the_blocks(assert_same):
    model = small("sima_tiny_12_p16")
    features = small("sima_tiny_12_p16", features_only=True, out_indices=(0, 1))
    assert (features.feature_info.channels(), features.feature_info.reduction()) == ([22, 22], [16, 16])
    loaded = features.load_state_dict({f"model.{n}": p for n, p in model.state_dict().items()}, strict=False)
    assert loaded.missing_keys == []
    x = images(model)
    for found, expected in zip(features(x), model.forward_intermediates(x, intermediates_only=True), strict=True):
        assert_same(found, expected)
    assert_same(features.model(x), features.model.forward_features(x))


def test_the_classifier_can_be_replaced(assert_same):
    model = small("sima_tiny_12_p16")
    x = images(model)
    tokens = model.forward_features(x)
    model.reset_classifier(0)
    assert_same(model(x), tokens[:, 0])
    model.reset_classifier(5, global_pool="avg")
    assert_same(model(x), model.get_classifier()(tokens[:, 1:].mean(1)))
    assert (model.num_classes, model.head.out_features, model.head.weight.dtype) == (5, 5, torch.float64)


def test_training_gives_the_logits_once_and_drops_paths():
    model = small("sima_tiny_12_p16", drop_path_rate=0.5, pos_drop_rate=0.2, proj_drop_rate=0.2)
    x = images(model, b=32)
    assert torch.equal(model(x), model(x))
    for module in model.modules():
        if getattr(module, "drop_prob", 0.0) or getattr(module, "p", 0.0):
            module.train()
            assert not torch.equal(model(x), model(x)), f"{type(module).__name__} drops nothing"
            module.eval()
    assert model.train()(x).shape == (32, 7)


def test_grad_checkpointing_changes_neither_gradients_nor_statistics(assert_same):
    results = []
    model = small("sima_tiny_12_p16").train()
    start = {n: x.clone() for n, x in model.state_dict().items()}
    x = images(model)
    for enable in (False, True):
        model.load_state_dict(start)
        model.set_grad_checkpointing(enable)
        calls = []
        handles = [b.norm1.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1)) for b in model.blocks]
        loss = model(x).square().sum()
        found = [loss, *gradients(model, loss)]
        assert len(calls) == 2 * (1 + enable)
        for handle in handles:
            handle.remove()
        results.append(found + [b.clone() for n, b in model.named_buffers() if n.endswith("running_var")])
        assert {int(b) for n, b in model.named_buffers() if n.endswith("tracked")} == {1}
    for found, expected in zip(*results, strict=True):
        assert_same(found, expected, scale=max(1.0, expected.abs().max().item()))


def test_weight_decay_spares_gains_biases_and_the_class_token():
    model = small("sima_tiny_12_p16")
    by_decay = timm.optim.param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for group in by_decay if group["weight_decay"] for p in group["params"]}
    assert decayed == {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def test_the_group_matcher_orders_all_parameters_by_layer():
    model = small("sima_tiny_12_p16")
    groups = group_parameters(model, model.group_matcher(coarse=False))
    of = {n: number for number, names in groups.items() for n in names}
    assert sorted(of) == sorted(n for n, _ in model.named_parameters())
    assert {of[n] for n in of if n.startswith(("patch_embed", "cls_token", "pos_embed"))} == {0}
    layers = [{of[n] for n in of if n.startswith(p)} for p in ("blocks.0.", "blocks.1.", "cls_attn_blocks.0.")]
    assert layers == [{1}, {2}, {3}]
    assert of["head.weight"] > 4


def test_every_parameter_learns():
    model = timm.create_model(
        "sima_tiny_24_p16", embed_dim=24, depth=2, num_heads=2, num_classes=7, dtype=torch.float64, eta=0.1
    )
    x, labels = images(model, b=5), torch.arange(5)
    for _ in range(2):
        grads = gradients(model, F.cross_entropy(model(x), labels))
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p -= 0.1 * g
    dead = [n for (n, _), g in zip(model.named_parameters(), grads, strict=True) if not (g.abs().max() > 1e-12)]
    assert dead == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_device_and_dtype_reach_every_parameter(dtype):
    with torch.device("cpu"):
        model = timm.create_model("sima_nano_12_p16", device="meta", dtype=dtype)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", dtype)}
    assert {b.dtype for b in model.buffers() if b.is_floating_point()} == {dtype}
    model = small("sima_nano_12_p16", dtype=dtype)
    assert model(images(model)).dtype == dtype


def test_weights_made_on_no_device_can_be_initialised():
    model = small("sima_small_24_p8", device="meta", dtype=torch.float32)
    # deterministic mode fills the new memory with NaN
    model.to_empty(device="cpu").init_weights()
    assert all(x.isfinite().all() for x in model.state_dict().values())
    assert all((p == 1e-5).all() for n, p in model.named_parameters() if "gamma" in n)
    for linear in (m for m in model.modules() if isinstance(m, nn.Linear)):
        assert 0.015 < linear.weight.std() < 0.025
        assert (linear.bias == 0).all()


def test_it_says_why_it_cannot_stream():
    assert "neighbours" in small("sima_nano_12_p16").stream_obstacle


COMPILED = """
import json, traceback
import torch, timm, sansmax
import sansmax.models.xcit

torch.manual_seed(0)
wrong = {}

def compare(name, found, expected):
    for a, b in zip(found, expected, strict=True):
        if not (a - b).abs().max() <= 1e-9 * max(1.0, b.abs().max()):
            wrong[name] = f"differs by {(a - b).abs().max()}"

arguments = {"embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 5, "cls_attn_layers": 1}
model = timm.create_model("sima_tiny_12_p8", dtype=torch.float64, **arguments)
x = torch.randn(3, 3, 24, 16, dtype=torch.float64)
with torch.no_grad():
    for p in model.parameters():
        p += 0.2 * torch.randn_like(p)
try:
    results = []
    for f in (torch.compile(model.train(), backend="aot_eager", fullgraph=True), model):
        y = f(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))])
    compare("training", *results)
    torch._dynamo.reset()
    with torch.no_grad():
        compare("inference", [torch.compile(model.eval(), backend="eager", fullgraph=True)(x)], [model(x)])
except Exception:
    wrong["compiled"] = traceback.format_exc()
try:
    model.eval()
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("b")}}).module()
    for b in (2, 5):
        some = torch.randn(b, 3, 24, 16, dtype=torch.float64)
        compare("export", [program(some)], [model(some)])
except Exception:
    wrong["export"] = traceback.format_exc()
print(json.dumps(wrong))
"""


def test_the_network_compiles_whole_and_exports_for_any_batch():
    assert_nothing_wrong(COMPILED)
