"""The contract of every network of this package: what timm, and those who build on it, ask of a model.

Each network is built narrow and shallow by its own name, in float64, for small images.
"""

import itertools

import pytest
import timm
import timm.optim
import torch
from networks import gradients, perturbed
from timm.models import group_parameters
from torch import nn

import sansmax

# those that read bags of features have a contract of their own (test_slide_models.py)
NAMES = [name for name in sansmax.models.list_models() if "_slide_" not in name]
# what makes a network of a file small: arguments, image size, maps (channels, pixels a cell) of all its stages
VIT = {"embed_dim": 22, "depth": 2, "num_heads": 2}
SMALL = {
    "vit": (VIT, None, None),
    "deit": (VIT, None, None),
    "xcit": ({"embed_dim": 24, "depth": 2, "num_heads": 2}, None, None),
    "soft": (
        {"embed_dims": (8, 12, 18, 20), "num_heads": (1, 2, 3, 4), "depths": (1, 1, 2, 1)},
        (64, 96),
        [(8, 4), (12, 8), (18, 16), (20, 32)],
    ),
    "cvt": (
        {"embed_dims": (6, 12, 18), "num_heads": (1, 2, 3), "depths": (1, 1, 2)},
        (48, 80),
        [(6, 4), (12, 8), (18, 16)],
    ),
}
GRID = (3, 4)

every_network = pytest.mark.parametrize("name", NAMES)


def family(name):
    return timm.model_entrypoint(name).__module__.rsplit(".", 1)[-1]


def patch_of(name):
    return next(int(part[1:].removeprefix("atch")) for part in name.split("_") if part[0] == "p" and part[-1].isdigit())


def size_of(name):
    size = SMALL[family(name)][1]
    return size or tuple(n * (4 if "conv4" in name else patch_of(name)) for n in GRID)


def small(name, **changes):
    """The network, narrow and shallow, its parameters all moved off their start."""
    arguments = {**SMALL[family(name)][0], "img_size": size_of(name), "num_classes": 7, "dtype": torch.float64}
    model = timm.create_model(name, **{**arguments, **changes})
    return perturbed(model, by=0.1)


def pictures(name, b=2, in_chans=None):
    in_chans = in_chans or timm.get_pretrained_cfg(name).input_size[0]
    return torch.randn(b, in_chans, *size_of(name), dtype=torch.float64)


def test_the_networks_are_listed_and_no_others():
    families = {"seqnorm_vit": 8, "soft": 12, "sima_deit": 3, "sima_cvt": 2, "cvt": 2}
    for start, count in families.items():
        assert sum(name.startswith(start + "_") for name in NAMES) == count, start
    assert sum(name.startswith("sima_") and name.split("_")[2] in ("12", "24") for name in NAMES) == 14
    assert len(NAMES) == 41


@every_network
def test_the_default_configuration_describes_the_network(name):
    model, cfg = timm.create_model(name, device="meta"), timm.get_pretrained_cfg(name)
    assert model.default_cfg["architecture"] == cfg.architecture == name
    assert len(cfg.mean) == len(cfg.std) == cfg.input_size[0] == model.in_chans
    assert cfg.num_classes == model.num_classes == model.get_submodule(cfg.classifier).out_features
    assert model.get_submodule(cfg.first_conv).in_channels == model.in_chans
    assert model.get_submodule(cfg.classifier) is model.get_classifier()
    assert cfg.fixed_input_size is False
    data = timm.data.resolve_model_data_config(model)
    assert (data["input_size"], data["crop_pct"], data["interpolation"]) == (cfg.input_size, cfg.crop_pct, "bicubic")
    assert cfg.paper_ids and cfg.paper_name and cfg.license and not cfg.has_weights
    assert cfg.origin_url or cfg.paper_ids == "arXiv:2406.01314"


@every_network
def test_arguments_of_timm_are_taken(name, assert_same):
    model = small(name, num_classes=3, in_chans=2, drop_path_rate=0.3, drop_rate=0.1, global_pool="avg")
    x = pictures(name, in_chans=2)
    tokens = model.forward_features(x)
    prefix = model.num_prefix_tokens
    assert (model.num_classes, model.in_chans, model.global_pool) == (3, 2, "avg")
    assert_same(model.forward_head(tokens, pre_logits=True), tokens[:, prefix:].mean(1), "pooled")
    rates = [getattr(m, "drop_prob", getattr(m, "p", 0.0)) for n, m in model.named_modules() if "drop" in n]
    assert max(rates) == pytest.approx(0.3)
    assert model.head_drop.p == 0.1


@every_network
def test_the_parts_of_the_forward_pass_fit_together(name, assert_same):
    model = small(name)
    x = pictures(name)
    tokens = model.forward_features(x)
    assert tokens.shape[::2] == (2, model.num_features)
    pooled = model.forward_head(tokens, pre_logits=True)
    assert pooled.shape == (2, model.num_features) == (2, model.head_hidden_size)
    assert_same(model.head(pooled), model(x), "logits")
    assert_same(model.forward_head(tokens), model(x), "logits")
    final, _ = model.forward_intermediates(x)
    assert_same(final, tokens, "final")


@every_network
def test_maps_of_all_stages_come_out(name, assert_same):
    model = small(name)
    x = pictures(name)
    maps = model.forward_intermediates(x, intermediates_only=True)
    stages = [(i["num_chs"], i["reduction"]) for i in model.feature_info]
    if expected := SMALL[family(name)][2]:
        assert stages == expected
    assert [tuple(m.shape) for m in maps] == [(2, c, x.shape[2] // r, x.shape[3] // r) for c, r in stages]
    # the tokens after the last norm are those of the last map
    last = model.forward_intermediates(x, indices=1, norm=True, output_fmt="NLC", intermediates_only=True)[0]
    if family(name) != "xcit":
        assert_same(last, model.forward_features(x)[:, model.num_prefix_tokens :], "last")
    (first,) = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    assert_same(first, maps[0], "first")
    mapped = model.forward_intermediates(x, indices=[0], intermediates_only=True, output_fmt="NLC")[0]
    assert_same(mapped, maps[0].flatten(2).mT, "format")


@every_network
def test_features_only_gives_the_same_maps_without_what_they_do_not_need(name, assert_same):
    model = small(name)
    features = timm.create_model(
        name,
        features_only=True,
        out_indices=(0, 1),
        **{**SMALL[family(name)][0], "img_size": size_of(name), "dtype": torch.float64},
    ).eval()
    found = features.load_state_dict({f"model.{n}": p for n, p in model.state_dict().items()}, strict=False)
    assert not found.missing_keys
    assert any(n.startswith("model.head") for n in found.unexpected_keys)
    x = pictures(name)
    expected = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    for a, b in zip(features(x), expected, strict=True):
        assert_same(a, b)
    assert features.feature_info.channels() == [i["num_chs"] for i in model.feature_info[:2]]


@every_network
def test_the_classifier_can_be_replaced(name, assert_same):
    model = small(name)
    x = pictures(name)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert model.get_classifier() is model.head
    model.reset_classifier(0)
    assert_same(model(x), pooled)
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    assert model.num_classes == model.get_classifier().out_features == 5
    assert model.head.weight.dtype == torch.float64
    model.reset_classifier(5, global_pool="max")
    tokens = model.forward_features(x)[:, model.num_prefix_tokens :]
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), tokens.amax(1))


@every_network
def test_grad_checkpointing_changes_neither_loss_nor_gradients(name, assert_same):
    model = small(name).train()
    before = {n: b.clone() for n, b in model.named_buffers()}
    x, results = pictures(name), []
    block = next(m for n, m in model.named_modules() if n.endswith("blocks.0"))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.load_state_dict(before, strict=False)
        calls = []
        handle = block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        loss = model(x).square().sum()
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        # batch norms count the batch once
        statistics = [b.double() for b in model.buffers()]
        results.append([loss, *grads, *[s.clone() for s in statistics]])
        handle.remove()
        assert len(calls) == 1 + enable
    for found, expected in zip(*results, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            assert_same(found, expected, scale=max(1.0, expected.abs().max().item()))


@every_network
def test_weight_decay_spares_gains_biases_and_tables(name):
    model = small(name)
    by_decay = timm.optim.param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for group in by_decay if group["weight_decay"] for p in group["params"]}
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert decayed == linear


@every_network
@pytest.mark.parametrize("coarse", [False, True])
def test_the_group_matcher_orders_all_parameters_by_depth(name, coarse):
    model = small(name)
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    of = {n: number for number, names in groups.items() for n in names}
    assert sorted(of) == sorted(n for n, _ in model.named_parameters())
    first, last = (n for n, _ in model.named_parameters() if n in ("head.weight",) or "patch_embed" in n), "head.weight"
    assert of[next(first)] == 0
    assert of[last] == max(of.values())
    blocks = [n.rsplit(".blocks.", 1)[0] + ".blocks." for n in of if ".blocks." in n] or ["blocks."]
    order = [of[n] for n, _ in model.named_parameters() if n.startswith(tuple(sorted(set(blocks))))]
    assert order == sorted(order)
    timm.optim.create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)


@every_network
def test_every_parameter_learns(name):
    # gains that start at 1e-5, as in the deeper published networks, leave gradients of the size of rounding
    start = {"eta": 1.0} if family(name) == "xcit" else {}
    arguments = {**SMALL[family(name)][0], "img_size": size_of(name), "num_classes": 7, "dtype": torch.float64, **start}
    model = timm.create_model(name, **arguments).train()
    x, labels = pictures(name, b=5), torch.arange(5)
    # from the start of training, not from a random point: the second step must reach every parameter
    for _ in range(2):
        loss = nn.functional.cross_entropy(model(x), labels)
        grads = gradients(model, loss)
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p -= 0.1 * g
    # rounding of gradients that vanish is below 1e-16
    dead = {n for (n, _), g in zip(model.named_parameters(), grads, strict=True) if not (g.abs().max() > 1e-15)}
    assert dead == silent(model)


def silent(model):
    """Parameters without influence, by what is known of the mathematics."""
    kind = family(model.default_cfg["architecture"])
    names = [n for n, _ in model.named_parameters()]
    if kind == "vit":
        # a mean is subtracted from what `norm1` gives: its bias is there for the weights of other transformers
        return {f"blocks.{i}.norm1.bias" for i in range(2)}
    if kind == "cvt" and model.stages[0].blocks[0].attn.attention == "softmax":
        # the softmax of a row knows differences only, and keys that all move together make none
        moved = {n for n in names if n.endswith("attn.k.bias")}
        # but for the class token, which has no convolution
        moved |= {n for n in names if n.endswith("conv_k.bn.bias") and not n.startswith("stages.2.")}
        # of the last block only the class token is read
        return moved | {n for n in names if n.startswith("stages.2.blocks.1.attn.conv_q.")}
    # a batch norm subtracts the mean, and with it the bias of the convolution before it
    pairs = itertools.pairwise(model.named_modules())
    return {
        f"{n}.bias"
        for (n, m), (_, after) in pairs
        if isinstance(m, nn.Conv2d) and m.bias is not None and isinstance(after, nn.BatchNorm2d)
    }


@every_network
def test_evaluation_is_deterministic_and_blind_to_batch_mates(name, assert_same):
    model = small(name, drop_rate=0.5, proj_drop_rate=0.5, drop_path_rate=0.5)
    x = pictures(name, b=3)
    logits = model(x)
    assert torch.equal(logits, model(x))
    for i in range(3):
        assert_same(logits[i : i + 1], model(x[i : i + 1]))
    model.train()
    assert not torch.equal(model(x), model(x))


@every_network
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_device_and_dtype_reach_every_parameter(name, dtype):
    with torch.device("cpu"):
        model = timm.create_model(name, device="meta", dtype=dtype)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", dtype)}
    assert {b.device.type for b in model.buffers()} <= {"meta"}
    assert {b.dtype for b in model.buffers() if b.is_floating_point()} <= {dtype}


@pytest.mark.parametrize("name", ["soft_tiny", "sima_nano_12_p16", "sima_cvt_13", "sima_deit_tiny_patch16_224"])
def test_networks_are_built_on_the_device_that_is_set(name):
    with torch.device("meta"):
        model = timm.create_model(name, drop_path_rate=0.1)
    assert {p.device.type for p in model.parameters()} == {"meta"}


@every_network
def test_images_of_other_sizes_are_taken(name):
    model = small(name)
    height, width = size_of(name)
    x = torch.randn(2, model.in_chans, 2 * height, width, dtype=torch.float64)
    logits = model(x)
    # another grid is another answer than a resized or cropped image
    assert logits.isfinite().all()
    assert not torch.allclose(logits, model(x[:, :, :height]))
    assert not torch.allclose(logits, model(x[:, :, ::2]))
