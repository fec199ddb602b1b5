"""SimA on DeiT against its definition and DeiT's own network, and the other vision transformers by patch size."""

import pytest
import timm
import torch
import torch.nn.functional as F
from published import picture, weights

import sansmax.models.deit
from sansmax.models.orders import ORDERS

SIZES = [("tiny", 192, 3), ("small", 384, 6), ("base", 768, 12)]


def shapes_of(model):
    return {name: tuple(x.shape) for name, x in model.state_dict().items()}


def filled(name, **changes):
    model = timm.create_model(name, dtype=torch.float64, **changes).eval()
    state = weights(shapes_of(model))
    model.load_state_dict(state)
    return model, state


def definition(w, x, num_heads, patch=16):
    """DeiT in float64 with l1 norms over all tokens, the class token among them, and explicit n x n attention."""
    x = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=patch).flatten(2).mT
    x = torch.cat((w["cls_token"].expand(len(x), -1, -1), x), dim=1) + w["pos_embed"]
    b, n, c = x.shape

    def norm(x, name):
        return F.layer_norm(x, (c,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    for i in range(sum(name.endswith("attn.qkv.weight") for name in w)):
        block = f"blocks.{i}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").reshape(b, n, 3, num_heads, c // num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = (y / y.abs().sum(dim=2, keepdim=True) for y in (q, k))
        attended = ((q @ k.mT) @ v).transpose(1, 2).reshape(b, n, c)
        x = x + linear(attended, f"{block}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    return linear(norm(x, "norm")[:, 0], "head")


@pytest.mark.parametrize(("order", "num_heads"), [("auto", 3), ("auto", 1), *((order, 3) for order in ORDERS)])
def test_logits_are_those_of_the_definition(order, num_heads, assert_same):
    small = {"num_heads": num_heads, "depth": 3, "img_size": (48, 80), "num_classes": 13, "attn_order": order}
    model, w = filled("sima_deit_tiny_patch16_224", **small)
    with torch.no_grad():
        assert_same(model(picture(48, 80)), definition(w, picture(48, 80), num_heads))


@pytest.mark.parametrize("num_heads", [6, 1])
def test_logits_of_the_whole_network_are_those_of_the_definition(num_heads, assert_same):
    model, w = filled("sima_deit_small_patch16_224", num_heads=num_heads)
    with torch.no_grad():
        assert_same(model(picture(224)), definition(w, picture(224), num_heads))


def test_attention_weighs_in_the_logits():
    # or its comparison with the definition would say little
    model, w = filled("sima_deit_small_patch16_224", depth=3)
    without = {n: torch.zeros_like(x) if n.endswith("attn.proj.weight") else x for n, x in w.items()}
    with torch.no_grad():
        expected = model(picture(224))
        model.load_state_dict(without)
        assert (model(picture(224)) - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize(("name", "width", "heads"), SIZES)
def test_names_and_shapes_are_those_of_deit(name, width, heads):
    model = timm.create_model(f"sima_deit_{name}_patch16_224", device="meta")
    twin = timm.create_model(f"deit_{name}_patch16_224", device="meta")
    assert list(shapes_of(model).items()) == list(shapes_of(twin).items())
    assert (model.embed_dim, len(model.blocks), {b.attn.num_heads for b in model.blocks}) == (width, 12, {heads})
    assert {b.attn.num_heads for b in twin.blocks} == {heads}


@pytest.mark.parametrize("size", [(224, 224), (160, 304)])
def test_with_softmax_in_its_place_the_logits_are_those_of_deit(size, assert_same):
    twin = timm.create_model("deit_tiny_patch16_224", dynamic_img_size=True).double().eval()
    state = weights(shapes_of(twin))
    twin.load_state_dict(state)
    model = timm.create_model("sima_deit_tiny_patch16_224", attention="softmax", dtype=torch.float64).eval()
    model.load_state_dict(sansmax.models.deit.checkpoint_filter_fn(state, model))
    with torch.no_grad():
        assert_same(model(picture(*size)), twin(picture(*size)))


def test_averaging_the_tokens_leaves_the_names_as_they_are(assert_same):
    averaged, w = filled("sima_deit_tiny_patch16_224", depth=2, global_pool="avg")
    assert list(w) == list(timm.create_model("deit_tiny_patch16_224", depth=2, device="meta").state_dict())
    with torch.no_grad():
        tokens = averaged.forward_features(picture(224))
        assert_same(averaged.forward_head(tokens, pre_logits=True), tokens[:, 1:].mean(1))


def test_single_heads_mix_all_channels_and_need_no_other_weights():
    one, three = (timm.create_model("sima_deit_tiny_patch16_224", num_heads=h, device="meta") for h in (1, 3))
    assert shapes_of(one) == shapes_of(three)


@pytest.mark.parametrize("layer", ["gamma_{}", "gamma{}", "ls{}.gamma"])
def test_gains_of_layers_load_under_every_name_they_have(layer):
    model, w = filled("sima_deit_tiny_patch16_224", depth=2, init_values=1.0)
    names = {f"blocks.{i}.ls{j}.gamma": f"blocks.{i}.{layer.format(j)}" for i in range(2) for j in (1, 2)}
    published = {names.get(name, name): x for name, x in w.items()}
    found = sansmax.models.deit.checkpoint_filter_fn(published, model)
    assert list(found) == list(w)
    assert all(found[name] is w[name] for name in w)


def test_a_distilled_checkpoint_is_refused_by_the_names_that_have_no_place():
    model = timm.create_model("sima_deit_tiny_patch16_224", depth=1, device="meta")
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", depth=1, device="meta").state_dict()
    found = sansmax.models.deit.checkpoint_filter_fn(distilled, model)
    assert set(found) - set(model.state_dict()) == {"dist_token", "head_dist.weight", "head_dist.bias"}
    with pytest.raises(RuntimeError, match="dist_token"):
        model.load_state_dict(found)


@pytest.mark.parametrize("name", [name for name, *_ in SIZES])
def test_pixels_are_prepared_as_for_deit(name):
    cfg, theirs = (timm.get_pretrained_cfg(f"{x}_{name}_patch16_224") for x in ("sima_deit", "deit"))
    for key in ("input_size", "crop_pct", "interpolation", "mean", "std", "first_conv", "classifier", "num_classes"):
        assert getattr(cfg, key) == getattr(theirs, key), key
    assert (cfg.crop_pct, cfg.paper_ids) == (0.9, "arXiv:2206.08898") and not cfg.has_weights


@pytest.mark.parametrize(("name", "width", "heads"), SIZES)
def test_seqnorm_exists_with_patches_of_8_too(name, width, heads):
    model = timm.create_model(f"seqnorm_vit_{name}_patch8_224", device="meta", qkv_bias=True, class_token=True)
    assert (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads) == (width, 12, heads)
    assert model.pos_embed.shape == (1, 28 * 28 + 1, width)
    if name != "tiny":  # which timm lacks
        twin = timm.create_model(f"vit_{name}_patch8_224", num_classes=1000, device="meta")
        gains = {n: s for n, s in shapes_of(model).items() if ".gamma_" in n or ".beta_" in n}
        assert {n: s for n, s in shapes_of(model).items() if n not in gains} == shapes_of(twin)
        assert len(gains) == 12 * 6
