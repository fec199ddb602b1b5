"""Vision transformers: all that timm's own ones have, names that last, weights that exchange."""

import pytest
import timm
import timm.optim
import torch
from apart import assert_nothing_wrong
from networks import GRID, gradients, images, perturbed, small
from timm.models import group_parameters
from torch import nn

from sansmax.models.attention import SeqNormAttention
from sansmax.models.orders import ORDERS

NAMES = [name for name in timm.list_models() if timm.model_entrypoint(name).__module__ == "sansmax.models.vit"]

every_network = pytest.mark.parametrize("name", NAMES)


def test_the_names_of_the_networks_last():
    assert set(NAMES) >= {
        "seqnorm_vit_tiny_patch16_224",
        "seqnorm_vit_small_patch16_224",
        "seqnorm_vit_base_patch16_224",
        "seqnorm_vit_pico_patch8_128",
    }


@every_network
def test_the_default_configuration_describes_the_network(name):
    model, cfg = timm.create_model(name, device="meta"), timm.get_pretrained_cfg(name)
    assert model.default_cfg["architecture"] == cfg.architecture == name
    channels, height, width = cfg.input_size
    assert (channels, (height, width)) == (model.in_chans, model.patch_embed.img_size)
    assert len(cfg.mean) == len(cfg.std) == channels
    assert cfg.num_classes == model.num_classes == model.get_submodule(cfg.classifier).out_features
    assert channels == model.get_submodule(cfg.first_conv).in_channels
    assert cfg.fixed_input_size is False
    assert all(cfg.min_input_size[i] % model.patch_embed.patch_size[0] == 0 for i in (1, 2))
    data = timm.data.resolve_model_data_config(model)
    assert (data["input_size"], data["crop_pct"], data["interpolation"]) == (cfg.input_size, cfg.crop_pct, "bicubic")
    assert cfg.paper_ids and cfg.license and not cfg.has_weights


@every_network
def test_arguments_of_timm_are_taken(name):
    model = small(
        name, num_classes=3, in_chans=2, drop_path_rate=0.3, global_pool="max", drop_rate=0.1, init_values=0.1
    )
    x = images(model)
    assert x.shape[1] == 2
    assert model(x).shape == (2, 3)
    assert [getattr(b.drop_path1, "drop_prob", 0.0) for b in model.blocks] == pytest.approx([0.0, 0.3])
    assert model.head_drop.p == 0.1
    assert model.patch_embed.grid_size == GRID
    tokens = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), model.fc_norm(tokens.amax(1)))
    assert model.num_features == model.head_hidden_size == model.embed_dim == 22


@every_network
def test_the_stages_of_the_forward_pass_fit_together(name, assert_same):
    model = small(name)
    x = images(model)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 15, 22)
    pooled = model.forward_head(tokens, pre_logits=True)
    assert_same(pooled, tokens.mean(1), "pooled")
    assert_same(model.head(pooled), model(x), "logits")
    final, maps = model.forward_intermediates(x, norm=True)
    assert_same(final, tokens, "final")
    assert [m.shape for m in maps] == [(2, 22, *GRID)] * 2
    assert_same(maps[-1].flatten(2).mT, tokens, "last map")
    (first,) = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True, output_fmt="NLC")
    assert_same(model.norm(model.blocks[1](first)), tokens, "first map")


@every_network
def test_features_only_gives_maps_of_the_layers(name, assert_same):
    model = small(name)
    features = small(name, features_only=True, out_indices=(0, 1))
    x, patch = images(model), model.patch_embed.patch_size[0]
    assert features.feature_info.channels() == [22, 22]
    assert features.feature_info.reduction() == [patch, patch]
    features.load_state_dict({f"model.{n}": p for n, p in model.state_dict().items()}, strict=False)
    for found, expected in zip(features(x), model.forward_intermediates(x, intermediates_only=True), strict=True):
        assert_same(found, expected)


@every_network
def test_the_classifier_can_be_replaced(name, assert_same):
    model = small(name)
    x = images(model)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert model.get_classifier() is model.head
    model.reset_classifier(0)
    assert_same(model(x), pooled)
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    assert model.num_classes == model.get_classifier().out_features == 5
    assert model.head.weight.dtype == torch.float64
    model.reset_classifier(5, global_pool="max")
    torch.testing.assert_close(
        model.forward_head(model.forward_features(x), pre_logits=True), model.forward_features(x).amax(1)
    )


@every_network
@pytest.mark.parametrize("masked", [False, True])
def test_grad_checkpointing_changes_neither_loss_nor_gradients(name, masked, assert_same):
    model = small(name, class_token=True).train()
    x, mask = images(model), torch.rand(2, 15) < 0.6 if masked else None
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        calls = []
        handle = model.blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        loss = model(x, mask).square().sum()
        results.append([loss, *gradients(model, loss)])
        handle.remove()
        assert len(calls) == 1 + enable
    for found, expected in zip(*results, strict=True):
        assert_same(found, expected, scale=max(1.0, expected.abs().max().item()))


@every_network
def test_weight_decay_spares_gains_biases_and_tables(name):
    model = small(name, class_token=True, reg_tokens=1, pos_embed="learn")
    assert model.no_weight_decay() >= {"pos_embed", "cls_token", "reg_token"}
    by_decay = timm.optim.param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for group in by_decay if group["weight_decay"] for p in group["params"]}
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert decayed == linear


@every_network
def test_the_group_matcher_orders_all_parameters_by_layer(name):
    model = small(name, class_token=True, pos_embed="learn")
    groups = group_parameters(model, model.group_matcher(coarse=False))
    of = {n: number for number, names in groups.items() for n in names}
    assert sorted(of) == sorted(n for n, _ in model.named_parameters())
    assert sum(len(names) for names in groups.values()) == len(of)
    stem = {of[n] for n in of if n.startswith(("patch_embed", "cls_token", "pos_embed"))}
    layers = [{of[n] for n in of if n.startswith(f"blocks.{i}.")} for i in range(2)]
    assert (stem, *layers) == ({0}, {1}, {2})
    assert of["head.weight"] > 2


@every_network
def test_every_parameter_learns(name):
    model = timm.create_model(name, embed_dim=24, depth=2, num_heads=2, img_size=48, num_classes=7, dtype=torch.float64)
    x, labels = images(model, b=5, grid=(48 // model.patch_embed.patch_size[0],) * 2), torch.arange(5)
    # from the start of training, not from a random point: the second step must reach every parameter
    for _ in range(2):
        grads = gradients(model, nn.functional.cross_entropy(model(x), labels))
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p -= 0.1 * g
    # rounding of gradients that vanish is near 1e-18
    dead = [n for (n, _), g in zip(model.named_parameters(), grads, strict=True) if not (g.abs().max() > 1e-12)]
    # a mean is subtracted from what `norm1` gives: its bias is there for the weights of other transformers
    assert dead == [f"blocks.{i}.norm1.bias" for i in range(2)]


@every_network
@pytest.mark.parametrize("order", ["linear", "moments"])
def test_evaluation_is_deterministic_and_training_is_not(name, order):
    dropped = {
        "drop_rate": 0.5,
        "proj_drop_rate": 0.5,
        "drop_path_rate": 0.5,
        "pos_drop_rate": 0.5,
        "patch_drop_rate": 0.5,
    }
    model = small(name, pos_embed="learn", attn_order=order, **dropped)
    # enough images that no two draws of a whole branch are equal
    x = images(model, b=32)
    assert torch.equal(model(x), model(x))
    for module in model.modules():
        probability = getattr(module, "p", getattr(module, "drop_prob", getattr(module, "prob", None)))
        if probability:
            module.train()
            assert not torch.equal(model(x), model(x)), f"{type(module).__name__} drops nothing"
            module.eval()


@every_network
@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (7, 2), (11, 13)])
def test_images_of_other_sizes_do_not_see_each_other(name, grid, assert_same):
    model = small(name)
    x = images(model, b=3, grid=grid)
    logits = model(x)
    assert logits.isfinite().all()
    for i in range(3):
        assert_same(logits[i : i + 1], model(x[i : i + 1]))


@every_network
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_device_and_dtype_reach_every_parameter(name, dtype):
    with torch.device("cpu"):
        model = timm.create_model(name, device="meta", dtype=dtype, class_token=True, init_values=0.1, qkv_bias=True)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", dtype)}
    assert {b.device.type for b in model.buffers()} <= {"meta"}
    assert {b.dtype for b in model.buffers() if b.is_floating_point()} <= {dtype}


@every_network
def test_weights_made_on_no_device_can_be_initialised(name):
    model = small(name, device="meta", dtype=torch.float32)
    # deterministic mode fills the new memory with NaN
    model.to_empty(device="cpu").init_weights()
    assert all(p.isfinite().all() for p in model.parameters())
    for n, p in model.named_parameters():
        if ".gamma_" in n:
            assert (p == 1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_narrow_types_no_order_is_less_accurate_than_the_plain_one(dtype, assert_as_accurate):
    exact = small("seqnorm_vit_tiny_patch16_224").to(dtype).double()
    x = images(exact, b=8, grid=(7, 11)).to(dtype)
    logits = {}
    for order in ORDERS:
        narrow = small("seqnorm_vit_tiny_patch16_224", attn_order=order, dtype=dtype)
        narrow.load_state_dict(exact.state_dict())
        logits[order] = narrow(x)
    for order in ORDERS:
        assert_as_accurate(logits[order], logits["quadratic"], exact(x.double()), order)


@pytest.mark.parametrize("order", ORDERS)
def test_autocast_keeps_the_statistics_in_float32(order):
    attn = perturbed(SeqNormAttention(22, num_heads=2, order=order))
    x = 3 + torch.randn(2, 101, 22)
    seen = []
    summarise, finish = attn.summarise_beside, attn.finish
    attn.summarise_beside = lambda *a: seen.append((found := summarise(*a))[0]) or found
    attn.finish = lambda *a: seen.append(finish(*a)) or seen[-1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attn(x)
    expected = attn(x)
    assert (out - expected).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * expected.abs().max()
    assert all(t.dtype == torch.float32 for s in seen for t in s)
    assert len(seen) == (4 if attn.choose(x).order == "moments" else 0)


def test_the_names_of_the_parameters_last():
    outside = ["patch_embed.proj.weight", "patch_embed.proj.bias"]
    layer = ["norm1.weight", "norm1.bias"]
    layer += [f"attn.{n}_{x}" for x in "qkv" for n in ("gamma", "beta")]
    layer += ["attn.qkv.weight", "attn.proj.weight", "attn.proj.bias", "norm2.weight", "norm2.bias"]
    layer += ["mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"]
    expected = outside + [f"blocks.{i}.{n}" for i in range(3) for n in layer]
    expected += ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    state = timm.create_model("seqnorm_vit_pico_patch8_128", device="meta").state_dict()
    assert list(state) == expected
    shapes = {
        n: tuple(state[n].shape) for n in ("patch_embed.proj.weight", "blocks.2.attn.beta_k", "blocks.0.mlp.fc1.weight")
    }
    assert list(shapes.values()) == [(64, 1, 8, 8), (64,), (128, 64)]


@pytest.mark.parametrize(
    ("name", "width", "depth", "heads"), [("tiny", 192, 12, 3), ("small", 384, 12, 6), ("base", 768, 12, 12)]
)
def test_sizes_are_those_of_timm(name, width, depth, heads):
    model = timm.create_model(f"seqnorm_vit_{name}_patch16_224", device="meta", class_token=True, global_pool="token")
    twin = timm.create_model(f"vit_{name}_patch16_224", device="meta", qkv_bias=False)
    assert (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads) == (width, depth, heads)
    ours, theirs = ({n: p.shape for n, p in m.named_parameters()} for m in (model, twin))
    gains = {n for n in ours if ".gamma_" in n or ".beta_" in n}
    assert {n: s for n, s in ours.items() if n not in gains} == theirs


def like_timm(**changes):
    arguments = {"class_token": True, "qkv_bias": True, "global_pool": "token", **changes}
    return timm.create_model("seqnorm_vit_tiny_patch16_224", **arguments)


def test_weights_of_timm_load_and_only_gains_and_biases_are_missing():
    model, twin = like_timm(), timm.create_model("vit_tiny_patch16_224")
    loaded = model.load_state_dict(twin.state_dict(), strict=False)
    gains = [f"blocks.{i}.attn.{n}_{x}" for i in range(12) for n in ("gamma", "beta") for x in "qkv"]
    assert sorted(loaded.missing_keys) == sorted(gains)
    assert loaded.unexpected_keys == []


@pytest.mark.parametrize("changes", [{}, {"init_values": 0.5, "depth": 2}, {"reg_tokens": 3, "depth": 2}], ids=str)
def test_the_softmax_network_with_weights_of_timm_gives_its_logits(changes, assert_same):
    twin = perturbed(timm.create_model("vit_tiny_patch16_224", num_classes=7, **changes), by=0.05)
    model = like_timm(attention="softmax", num_classes=7, **changes).eval()
    model.load_state_dict(twin.state_dict())
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert_same(model(x), twin(x), "logits")
        assert_same(model(x, torch.ones(1, 196, dtype=torch.bool)), twin(x), "logits under a mask of ones")


# Compilers: in an interpreter of their own, since checked shapes break the graph

COMPILED = """
import json, traceback
import torch, timm, sansmax
from torch import Tensor
from sansmax.ops import Moments, seqnorm_affine, seqnorm_attention

torch.manual_seed(0)
heads = [torch.randn(2, 3, 13, 5, requires_grad=True) for _ in range(3)]
mask, x = torch.rand(2, 13) < 0.6, torch.randn(2, 13, 15, requires_grad=True)
weights = [torch.randn(15, 15, requires_grad=True) for _ in range(4)]
wrong = {}

def network(**changes):
    model = timm.create_model("seqnorm_vit_pico_patch8_128", img_size=(24, 40), **{"depth": 2, **changes})
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model.eval()

def compare(name, found, expected):
    for a, b in zip(found, expected, strict=True):
        if not (a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max()):
            wrong[name] = f"differs by {(a - b).abs().max()}"

def compiled(name, f, arguments, inputs):
    try:
        torch._dynamo.reset()
        g, results = torch.compile(f, backend="aot_eager", fullgraph=True), []
        for h in (g, f):
            out = h(*arguments)
            out = [out] if isinstance(out, Tensor) else list(out)
            loss = sum(o.square().sum() for o in out)
            results.append(out + list(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)))
        compare(name, *results)
    except Exception:
        wrong[name] = traceback.format_exc()

compiled("attention", lambda q, k, v: seqnorm_attention(q, k, v, mask=mask, order="linear"), heads, heads)
compiled("affine", lambda x: seqnorm_affine(Moments.of(x, mask), *weights, None, 3), [x], [x, *weights])
model, pictures = network(depth=1), torch.randn(2, 1, 24, 40)
compiled("network", model, [pictures, torch.rand(2, 15) < 0.6], list(model.parameters()))

for changes in ({}, {"class_token": True, "global_pool": "token", "pos_embed": "learn"}):
    model, name = network(**changes), f"export {changes}"
    try:
        shapes = {"x": {0: torch.export.Dim("b")}}
        program = torch.export.export(model, (pictures,), dynamic_shapes=shapes).module()
        for b in (2, 5):
            some = torch.randn(b, 1, 24, 40)
            compare(name, [program(some)], [model(some)])
    except Exception:
        wrong[name] = traceback.format_exc()
print(json.dumps(wrong))
"""


@pytest.mark.slow
def test_operations_and_networks_compile_whole_and_export_for_any_batch():
    assert_nothing_wrong(COMPILED)
