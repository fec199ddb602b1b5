"""SOFT and SOFT++ networks: equal to the published code, and what was added to them."""

from functools import partial

import pytest
import timm
import torch
from apart import assert_nothing_wrong
from published import difference, manifest, picture, reference, weights
from torch import nn

import sansmax
import sansmax.ops.soft
from benchmarks import published_soft
from sansmax.models.blocks import Block
from sansmax.models.soft import SoftBlock, checkpoint_filter_fn

SIZES = ("tiny", "small", "medium", "large", "huge")
PUBLISHED = [f"{family}_{size}" for family in ("soft", "soft_norm") for size in SIZES]
MILLIONS = {"tiny": 13.07, "small": 38.86, "small_24m": 24.11, "medium": 45.81, "large": 64.70, "huge": 87.11}
LOGITS = ["soft_tiny_224", "soft_tiny_224x320", "soft_norm_tiny_224", "soft_medium_224"]
# float32: SOFT's inverse amplifies rounding
TOLERANCE = {
    "soft": {torch.float64: 1e-9, torch.float32: 1e-4},
    "soft_norm": {torch.float64: 1e-9, torch.float32: 2e-5},
}


def published(name, dtype=torch.float64, **changes):
    """The network with the deterministic weights, in evaluation."""
    model = timm.create_model(name, dtype=dtype, **changes).eval()
    model.load_state_dict(checkpoint_filter_fn(weights(manifest(name), dtype)))
    return model


@pytest.fixture(scope="module")
def tiny():
    """SOFT-Tiny in float64."""
    return published("soft_tiny")


def expected(case):
    """Reference logits; SOFT++'s of each image by itself, as the published one depends on the batch."""
    arrays = reference(f"logits/{case}")
    return arrays.get("logits64_each_alone", arrays["logits64"])


def of(case):
    name, size = case.rsplit("_", 1)
    return name, name.rsplit("_", 1)[0], [int(n) for n in size.split("x")]


@torch.no_grad()
@pytest.mark.parametrize("case", LOGITS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_are_those_of_the_published_code(case, dtype):
    name, family, size = of(case)
    logits = published(name, dtype)(picture(*size).to(dtype))
    assert difference(logits, expected(case)) <= TOLERANCE[family][dtype]


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_the_published_ones(name):
    shapes = manifest(name)
    found = checkpoint_filter_fn({n: torch.empty(s, device="meta") for n, s in shapes.items()})
    model = timm.create_model(name, device="meta")
    assert {n: p.shape for n, p in found.items()} == {n: p.shape for n, p in model.state_dict().items()}


@pytest.mark.parametrize("family", ["soft", "soft_norm"])
@pytest.mark.parametrize("size", MILLIONS)
def test_sizes_are_the_published_ones(family, size):
    model = timm.create_model(f"{family}_{size}", device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == MILLIONS[size]


def here(tensors, prefix):
    """Published tensors of a block, by the names of ours."""
    found = checkpoint_filter_fn({"block1.": torch.empty(0), **{prefix + n: t for n, t in tensors.items()}})
    stage = f"stages.{int(prefix[5]) - 1}.blocks.0."
    return {n.removeprefix(stage): t for n, t in found.items() if n.startswith(stage)}


def block_of(case, meta):
    """A block of the width of the reference."""
    if case == "soft_stage4_block":
        norm = partial(nn.LayerNorm, eps=1e-6)
        return Block(64, 2, qkv_bias=True, norm_layer=norm, attention="softmax", dtype=torch.float64)
    inverse = {"inverse": "halved", "normalized": True} if "norm" in case else {"inverse": "newton"}
    return SoftBlock(64, 2, 4.0, 0.0, factory={"dtype": torch.float64}, ratio=4, value_kernel=5, **inverse)


@pytest.mark.parametrize("case", ["soft_block_ratio4", "soft_norm_block_ratio4", "soft_stage4_block"])
def test_blocks_and_all_their_gradients_are_those_of_the_published_code(case, monkeypatch):
    arrays = reference(f"blocks/{case}")
    meta = arrays["meta"]
    grads = {n.removeprefix("grad."): torch.from_numpy(g) for n, g in arrays.items() if n.startswith("grad.")}
    block = block_of(case, meta)
    shapes = {n: g.shape for n, g in grads.items()}
    block.load_state_dict(here(weights(shapes, prefix=meta["prefix"], extra_gain=meta["extra_gain"]), meta["prefix"]))
    if case == "soft_norm_block_ratio4":
        # the published start of the inverse is one for the whole batch; ours is one for an image and its heads
        ours = sansmax.ops.soft.newton_inverse_halved
        over_batch = lambda a, steps: ours(a.flatten(0, 1)[None], steps)[0].unflatten(0, a.shape[:2])  # noqa: E731
        monkeypatch.setattr(sansmax.ops.soft, "newton_inverse_halved", over_batch)
    x = torch.from_numpy(arrays["x"]).double().requires_grad_()
    y = block(x, tuple(meta["args"])) if isinstance(block, SoftBlock) else block(x)
    (y * torch.from_numpy(arrays["R"])).sum().backward()
    assert difference(y, arrays["y"]) <= 1e-9
    assert difference(x.grad, arrays["grad_x"]) <= 1e-9
    # gradients go the way of the weights
    expected_grads = here(grads, meta["prefix"])
    assert expected_grads.keys() == dict(block.named_parameters()).keys()
    for n, p in block.named_parameters():
        assert difference(p.grad, expected_grads[n]) <= 1e-9, n


@torch.no_grad()
@pytest.mark.parametrize("name", ["soft_tiny", "soft_norm_tiny"])
def test_an_image_does_not_depend_on_its_batch_mates(name, assert_same):
    model = published(name)
    x = picture(64, 96)
    assert_same(model(x)[:1], model(x[:1]))
    assert_same(model(torch.cat((x[:1], 30 * x[1:])))[:1], model(x[:1]))


@torch.no_grad()
@pytest.mark.parametrize("name", ["soft_tiny", "soft_norm_tiny"])
def test_autocast_stays_within_one_percent(name):
    model = published(name, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(picture(224).float())
    assert logits.isfinite().all()
    assert difference(logits, expected(f"{name}_224")) <= 1e-2


@torch.no_grad()
def test_a_bound_on_landmarks_changes_nothing_where_there_are_as_many(tiny, assert_same):
    bound = published("soft_tiny", landmark_grid=(7, 7))
    x = picture(224)[:1]
    assert_same(bound(x), tiny(x))
    larger = picture(448)[:1]
    assert difference(bound(larger), tiny(larger)) > 1e-3


@torch.no_grad()
def test_a_bound_on_landmarks_averages_them(assert_same):
    model = published("soft_tiny", landmark_grid=(2, 3))
    attn = model.stages[1].blocks[0].attn
    x = torch.randn(2, 16 * 24, 128, dtype=torch.float64)
    seen = []
    attn.landmark_norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    attn(x, grid=(16, 24))
    # a landmark is the mean of 2 x 2 of the convolution's
    q = attn.q(x).view(2, 16, 24, 4, 32).permute(0, 3, 4, 1, 2).flatten(0, 1) / 32**0.25
    conv = nn.functional.conv2d(q, attn.landmark_conv.weight, stride=4)
    assert_same(seen[0], conv.unflatten(3, (3, 2)).unflatten(2, (2, 2)).mean((3, 5)).flatten(2).mT)


@torch.no_grad()
def test_the_inverse_of_the_first_checkpoints_is_an_option(tiny):
    first = published("soft_tiny", inverse="halved")
    exact = published("soft_tiny", inverse="cholesky")
    x = picture(224)[:1]
    assert 1e-3 < difference(first(x), tiny(x)) < 1
    # what 20 steps leave out of the inverse shows in the logits
    assert 1e-3 < difference(exact(x), tiny(x)) < 1


def test_training_drops_single_elements_as_published():
    model = timm.create_model("soft_tiny", drop_path_rate=0.4, embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4))
    rates = [b.drop.p for s in model.stages[:3] for b in s.blocks]
    rates += [getattr(b.drop_path1, "drop_prob", 0.0) for b in model.stages[3].blocks]
    assert rates == pytest.approx([0.4 * i / 7 for i in range(8)])
    ones = torch.ones(4, 50, 16)
    dropped = model.stages[1].blocks[1].drop(ones)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / (1 - rates[2])])
    # single elements, not whole tokens or images
    assert ((dropped == 0).float().mean((1, 2)) > 0).all() and (dropped == 0).float().mean(-1).amax() < 1


def test_linear_layers_start_as_published():
    for name, narrow in (("soft_tiny", True), ("soft_norm_tiny", False)):
        model = timm.create_model(name)
        std = model.stages[2].blocks[0].mlp.fc1.weight.std().item()
        assert (abs(std - 0.02) < 0.002) == narrow
        assert abs(model.stages[3].blocks[0].mlp.fc1.weight.std().item() - 0.02) < 0.002
        assert abs(model.stages[0].pos_embed.std().item() - 0.02) < 0.002


def test_images_that_are_too_small_are_refused_with_the_least_size():
    model = timm.create_model("soft_tiny", embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4)).eval()
    assert model(torch.randn(1, 3, 32, 45)).isfinite().all()
    with pytest.raises(ValueError, match=r"at least 32 x 32 pixels, got 31 x 64"):
        model(torch.randn(1, 3, 31, 64))
    with pytest.raises(ValueError, match=r"at least 32 x 32 pixels, got 16 x 16"):
        timm.create_model("soft_tiny", img_size=16)


def test_a_pyramid_cannot_stream_and_says_why():
    with pytest.raises(ValueError, match="convolutions"):
        sansmax.stream(timm.create_model("soft_tiny"), torch.zeros(64, 64, 3, dtype=torch.uint8).numpy())


@torch.no_grad()
@pytest.mark.parametrize("name", ["soft_tiny", "soft_norm_tiny"])
def test_networks_equal_their_formulas_written_out(name, assert_same):
    # what the benchmark compares the speed with; also where all is folded and cut into pieces: in float32
    model = published(name)
    x = picture(64, 96)
    assert_same(published_soft.forward(model, x), model(x))
    narrow = published(name, torch.float32)
    many = torch.randn(70, 3, 64, 64)
    assert difference(narrow(many), model(many.double())) <= 1e-4


COMPILED = """
import json, traceback
import torch, timm, sansmax

torch.manual_seed(0)
wrong = {}
SMALL = {"embed_dims": (8, 12, 18, 20), "num_heads": (1, 2, 3, 4), "depths": (1, 1, 1, 1), "img_size": 64}
# the inverse amplifies rounding
SMALL["dtype"] = torch.float64

def compare(name, found, expected):
    for a, b in zip(found, expected, strict=True):
        if not (a - b).abs().max() <= 1e-9 * max(1.0, b.abs().max()):
            wrong[name] = f"differs by {(a - b).abs().max()}"

for name in ("soft_tiny", "soft_norm_tiny"):
    model = timm.create_model(name, **SMALL).eval()
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    try:
        torch._dynamo.reset()
        results = []
        for f in (torch.compile(model, backend="eager", fullgraph=True), model):
            out = f(x)
            results.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
        compare(f"compiled {name}", *results)
        program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("b")}}).module()
        for b in (2, 5):
            some = torch.randn(b, 3, 64, 96, dtype=torch.float64)
            compare(f"exported {name}", [program(some)], [model(some)])
    except Exception:
        wrong[name] = traceback.format_exc()
print(json.dumps(wrong))
"""


@pytest.mark.slow
def test_networks_compile_whole_and_export_for_any_batch():
    assert_nothing_wrong(COMPILED)
