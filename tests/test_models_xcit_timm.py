"""SimA on XCiT keeps timm's contract, learns, compiles and exports."""

import pytest
import timm
import timm.optim
import torch
import torch.nn.functional as F
from apart import assert_nothing_wrong
from networks import GRID, gradients, images, small
from timm.models import group_parameters
from torch import nn

from sansmax.models.xcit import SimAXCiT


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


@pytest.mark.slow
def test_the_network_compiles_whole_and_exports_for_any_batch():
    assert_nothing_wrong(COMPILED)
