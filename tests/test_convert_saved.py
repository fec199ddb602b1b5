"""A converted network is built again from its arguments and weights, compiled whole and exported."""

import json

import pytest
import timm
import torch
from apart import assert_nothing_wrong
from originals import ALL, build, pictures
from safetensors.torch import save_file

from sansmax.models.attention import SeqNormAttention, SimAAttention, SoftmaxAttention
from sansmax.models.convert import convert

# Again, from a folder


@pytest.mark.parametrize(
    ("which", "attention", "options"),
    [
        ("vit", "seqnorm", {"order": "linear"}),
        ("registers", "soft", {"num_landmarks": 3, "inverse": "halved"}),
        ("distilled", "sima", {"blocks": [1]}),
        ("rotary, eva02, separate projections, norm inside", "seqnorm", {}),
    ],
)
def test_a_saved_network_is_built_again_by_timm(which, attention, options, tmp_path, assert_same):
    model = convert(build(which).float(), attention, **options)
    assert model.pretrained_cfg["architecture"] == "converted"
    assert model.conversion["base"] == ALL[which][0]
    arguments = {"embed_dim": 48, "num_heads": 4, "depth": 2, "img_size": [32, 48], **ALL[which][1]}
    config = {
        "architecture": "converted",
        "num_classes": 5,
        "model_args": {**arguments, **model.conversion},
        "pretrained_cfg": {"input_size": [3, 32, 48], "classifier": model.pretrained_cfg["classifier"]},
    }
    config["pretrained_cfg"]["first_conv"] = "patch_embed.proj"
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({n: p.contiguous() for n, p in model.state_dict().items()}, tmp_path / "model.safetensors")
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert type(again) is type(model)
    assert (again.conversion, again.attention) == (model.conversion, model.attention)
    x = pictures().float()
    assert torch.equal(again(x), model(x))
    fewer = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=2)
    assert fewer.blocks[0].norm1.weight.equal(model.blocks[0].norm1.weight)
    assert fewer(x).shape == (3, 2)


def test_conversions_one_after_the_other_are_built_again():
    model = convert(convert(build("vit"), "sima"), "seqnorm", blocks=[1], order="linear")
    assert model.attention == "sima and seqnorm"
    size = {"img_size": (32, 48), "embed_dim": 48, "num_heads": 4, "depth": 2, "num_classes": 5}
    again = timm.create_model("converted", **size, **json.loads(json.dumps(model.conversion)))
    assert [type(b.attn) for b in again.blocks] == [SimAAttention, SeqNormAttention]
    assert again.blocks[1].attn.order == "linear"
    assert again.conversion == model.conversion
    assert convert(again, "softmax").conversion == {
        "base": "vit_tiny_patch16_224",
        "attention": "softmax",
        "attn_options": {},
        "blocks": None,
    }
    assert type(again.blocks[0].attn) is SoftmaxAttention


def test_the_network_converted_takes_arguments_of_its_base():
    model = timm.create_model("converted", base="deit3_small_patch16_224", attention="sima", depth=1, num_classes=4)
    plain = timm.create_model("deit3_small_patch16_224", depth=1, num_classes=4)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
    assert model.pretrained_cfg["architecture"] == "converted"
    assert model.pretrained_cfg["mean"] == plain.pretrained_cfg["mean"]
    maps = timm.create_model("converted", base="vit_tiny_patch16_224", depth=2, features_only=True, out_indices=(0, 1))
    assert [m.shape for m in maps(torch.randn(1, 3, 224, 224))] == [(1, 192, 14, 14)] * 2
    with pytest.raises(ValueError, match="needs the name of the one to convert"):
        timm.create_model("converted")


def test_pretrained_weights_of_the_base_are_there_before_the_conversion(tmp_path):
    source = timm.create_model("deit_tiny_patch16_224", depth=1)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    calls = []
    make = timm.create_model

    def create(name, pretrained=False, **kwargs):
        calls.append((name, pretrained))
        overlay = {"file": str(tmp_path / "model.safetensors")}
        return make(name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sansmax.models.convert.timm.create_model", create)
        model = make("converted", base="deit_tiny_patch16_224", attention="seqnorm", pretrained=True, depth=1)
    assert calls == [("deit_tiny_patch16_224", True)]
    state = model.state_dict()
    assert all(torch.equal(p, state[name]) for name, p in source.state_dict().items())


# Compilers: in an interpreter of their own, since checked shapes break the graph

COMPILED = """
import json, traceback
import torch, timm, sansmax
from sansmax.models.convert import convert

torch.manual_seed(0)
size = dict(embed_dim=32, num_heads=2, depth=1, num_classes=3)
networks = {
    "vit": ("vit_tiny_patch16_224", dict(img_size=48), "seqnorm"),
    "distilled": ("deit_tiny_distilled_patch16_224", dict(img_size=48), "relu"),
    "rotary": ("eva02_tiny_patch14_224", dict(patch_size=16, img_size=48), "sima"),
}
wrong = {}
for name, (base, changes, attention) in networks.items():
    model = convert(timm.create_model(base, **size, **changes), attention).eval()
    x = torch.randn(4, 3, 48, 48)
    try:
        expected = model(x)
        by = torch.autograd.grad(expected.square().sum(), list(model.parameters()), allow_unused=True)
        found = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
        also = torch.autograd.grad(found.square().sum(), list(model.parameters()), allow_unused=True)
        program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("b", min=2)}}).module()
        pairs = [(found, expected), (program(x), expected), (program(x[:3]), model(x[:3]))]
        pairs += [(a, b) for a, b in zip(also, by) if b is not None]
        off = max(((a - b).abs().max() / max(1.0, b.abs().max())).item() for a, b in pairs)
        if not off <= 1e-5:
            wrong[name] = f"differs by {off}"
    except Exception:
        wrong[name] = traceback.format_exc()
print(json.dumps(wrong))
"""


@pytest.mark.slow
def test_converted_networks_compile_whole_and_export():
    assert_nothing_wrong(COMPILED)
