"""Weights of others and of one's own load whole or not at all, under any wrapper."""

import argparse
import re

import pytest
import safetensors.torch
import timm
import torch
from networks import perturbed
from published import difference, manifest, picture, reference, weights
from small_vits import SMALL, copied, prefixed, refused, same, timm_vit, vit
from torch import nn

from sansmax.models import cvt, deit, soft, xcit  # noqa: F401  (registers the networks)
from sansmax.models.weights import load_checkpoint

# Published files


@pytest.mark.parametrize("name", ["soft_tiny", "sima_nano_12_p16"])
def test_the_authors_file_gives_the_authors_logits(name, tmp_path):
    args = argparse.Namespace(model=name, lr=1e-3)
    torch.save(
        {"model": weights(manifest(name), torch.float32), "optimizer": {"state": {}}, "epoch": 299, "args": args},
        tmp_path / f"{name}.pth",
    )
    model = timm.create_model(name).double().eval()
    report = load_checkpoint(model, tmp_path / f"{name}.pth")
    assert report.num_tensors == len(model.state_dict())
    assert "as its authors published it" in report.layout
    with torch.no_grad():
        assert difference(model(picture(224)), reference(f"logits/{name}_224")["logits64"]) < 1e-9


def fair_names(state):
    """timm's XCiT as it was published: another word for the positions, queries, keys and values in one layer."""
    split = re.compile(r"^(cls_attn_blocks\.\d+\.attn)\.([qkv])\.(weight|bias)$")
    found = {k.replace("pos_embed.", "pos_embeder."): x for k, x in state.items() if not split.match(k)}
    for name in state:
        if (m := split.match(name)) and m[2] == "q":
            found[f"{m[1]}.qkv.{m[3]}"] = torch.cat([state[f"{m[1]}.{part}.{m[3]}"] for part in "qkv"])
    return found


def xcit_of_timm(**changes):
    return timm.create_model("xcit_nano_12_p16_224", depth=2, embed_dim=32, num_heads=2, num_classes=5, **changes)


def test_xcit_as_published_fills_timms():
    source, model = perturbed(xcit_of_timm()), xcit_of_timm()
    file = fair_names(source.state_dict())
    assert len(file) < len(source.state_dict())
    report = load_checkpoint(model, {"model": file})
    assert report.layout == "XCiT as its authors published it"
    assert same(model.state_dict(), source.state_dict())


def test_what_a_mapping_drops_in_silence_is_surplus():
    message = refused(xcit_of_timm(use_pos_embed=False), fair_names(xcit_of_timm().state_dict()))
    names = ["pos_embeder.token_projection.weight", "pos_embeder.token_projection.bias"]
    assert re.findall(r"^  ([-+!]) (\S+)", message, flags=re.MULTILINE) == [("+", name) for name in names]


def test_buffers_that_a_network_computes_are_not_missed():
    model = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=8, depths=(2, 1), num_heads=(1, 2))
    buffers = {name: x for name, x in model.named_buffers() if name.endswith(("position_index", "attn_mask"))}
    file = {**copied(model), **buffers}
    assert len(file) > len(model.state_dict())
    assert load_checkpoint(model, {"model": file}).num_tensors == len(model.state_dict())


def test_deit_fills_the_softmax_twin(assert_same):
    source = timm_vit("deit_tiny_patch16_224")
    options = {"attention": "softmax", "class_token": True, "global_pool": "token", "qkv_bias": True}
    model = vit(**options)
    assert "DeiT" in load_checkpoint(model, {"model": source.state_dict()}).layout
    x = torch.randn(2, 3, 32, 32)
    assert_same(model(x), source(x))


def test_deit_iii_fills_timms_and_simas_layer_scale():
    for source, model in (
        (timm_vit("deit3_small_patch16_224"), timm_vit("deit3_small_patch16_224")),
        (vit_sima(), vit_sima()),
    ):
        file = {re.sub(r"ls([12])\.gamma$", r"gamma_\1", name): x for name, x in source.state_dict().items()}
        assert file.keys() != source.state_dict().keys()
        assert load_checkpoint(model, {"model": file}).layout == "DeiT III as its authors published it"
        assert same(model.state_dict(), source.state_dict())


def test_names_are_mapped_by_the_file_that_registers_the_network():
    # its class is that of other networks too
    source, model = vit_sima(), vit_sima()
    load_checkpoint(model, {re.sub(r"ls([12])\.gamma$", r"gamma\1", k): x for k, x in source.state_dict().items()})
    assert same(model.state_dict(), source.state_dict())


def test_names_are_mapped_where_timms_resampling_fails():
    source = timm_vit("deit3_small_patch16_224", img_size=(32, 48)).state_dict()
    file = {re.sub(r"ls([12])\.gamma$", r"gamma_\1", name): x for name, x in source.items()}
    message = refused(timm_vit("deit3_small_patch16_224", img_size=48), file)
    assert re.findall(r"^  ([-+!]) (\S+):? ?", message, flags=re.MULTILINE) == [("!", "pos_embed:")]


def vit_sima():
    return perturbed(timm.create_model("sima_deit_tiny_patch16_224", init_values=1.0, **SMALL))


def test_what_a_mapping_would_resize_stays_as_it_is_in_the_file():
    # timm's own mapping resamples patches and positions unasked
    message = refused(timm_vit(img_size=64), {**timm_vit(patch_size=8).state_dict(), "head.extra": torch.ones(1)})
    assert "! patch_embed.proj.weight: file (24, 3, 8, 8), model (24, 3, 16, 16)" in message
    assert "! pos_embed" not in message
    message = refused(timm_vit(img_size=64), {**timm_vit().state_dict(), "extra": torch.ones(1)})
    assert "! pos_embed: file (1, 5, 24), model (1, 17, 24)" in message


# Wrappers, prefixes, kinds of file


WRAPPED = {
    "plain": lambda s: s,
    "model": lambda s: {"model": s, "epoch": 3},
    "state_dict": lambda s: {"state_dict": s, "arch": "x", "optimizer": {"state": {}}, "metric": 0.5, "version": 2},
    "parallel": lambda s: prefixed(s, "module."),
    "compiled": lambda s: {"model": prefixed(s, "_orig_mod.")},
    "both": lambda s: prefixed(s, "module.", "_orig_mod."),
    "both, the other way": lambda s: prefixed(s, "_orig_mod.", "module."),
    "lightning": lambda s: {"state_dict": prefixed(s, "model."), "pytorch-lightning_version": "2", "loops": {}},
    "lightning, compiled": lambda s: {"state_dict": prefixed(s, "net._orig_mod.")},
    "nested": lambda s: {"model": {"state_dict": s}},
    "averaged by torch": lambda s: {"n_averaged": torch.tensor(3), **prefixed(s, "module.")},
    "name of a model beside": lambda s: {"model": "vit", "state_dict": s},
    "with arguments": lambda s: {"model": s, "args": argparse.Namespace(a=1, b=[2])},
}


@pytest.mark.parametrize("wrap", list(WRAPPED))
def test_wrappers_and_prefixes_are_taken_off(wrap, tmp_path):
    source, model = vit(), vit()
    torch.save(WRAPPED[wrap](source.state_dict()), tmp_path / "checkpoint.pth.tar")
    report = load_checkpoint(model, tmp_path / "checkpoint.pth.tar")
    assert same(model.state_dict(), source.state_dict())
    assert report.num_tensors == len(source.state_dict())
    assert (report.unwrapped == ()) == (wrap == "plain")


@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.bin", "a.ckpt", "old.pth", "a.safetensors", "no_suffix", "b.bin"])
def test_kinds_of_file_are_told_by_what_is_in_them(name, tmp_path):
    source, model, path = vit(), vit(), tmp_path / name
    if name in ("a.safetensors", "no_suffix", "b.bin"):
        safetensors.torch.save_file(source.state_dict(), path)
    else:
        torch.save(source.state_dict(), path, _use_new_zipfile_serialization=name != "old.pth")
    assert load_checkpoint(model, str(path)).source == str(path)
    assert same(model.state_dict(), source.state_dict())


def test_the_moving_average_is_taken_where_it_is_asked_for(tmp_path):
    raw, averaged, model = vit(), vit(), vit()
    a, b = raw.state_dict(), averaged.state_dict()
    for file in (
        {"state_dict": a, "state_dict_ema": b},
        {"model": a, "model_ema": prefixed(b, "module.")},
        {"state_dict": {**prefixed(a, "network."), **prefixed(b, "ema.module.")}},
    ):
        torch.save(file, tmp_path / "x.pth")
        load_checkpoint(model, tmp_path / "x.pth", use_ema=True)
        assert same(model.state_dict(), b)
        load_checkpoint(model, tmp_path / "x.pth")
        assert same(model.state_dict(), a)
    assert "no moving average" in refused(model, {"model": a}, use_ema=True)


def test_a_folder_holds_its_weights(tmp_path):
    source, model = vit(), vit()
    safetensors.torch.save_file(source.state_dict(), tmp_path / "model.safetensors")
    torch.save({"state_dict": {}}, tmp_path / "last.ckpt")
    assert load_checkpoint(model, tmp_path).source == str(tmp_path / "model.safetensors")
    assert same(model.state_dict(), source.state_dict())


def test_a_model_that_is_wrapped_itself_is_filled():
    source, model = vit(), vit()
    compiled = nn.Module()
    # where torch.compile keeps it
    compiled._orig_mod = nn.DataParallel(model)
    load_checkpoint(compiled, source.state_dict())
    assert same(model.state_dict(), source.state_dict())
    pyramid = timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=(0, 1), **SMALL)
    report = load_checkpoint(pyramid, timm_vit().state_dict(), adapt_classifier=True, ignore=["norm.*"])
    assert {"head.weight", "head.bias"} <= set(report.unused)


def test_numbers_take_the_types_of_the_model():
    source, model = vit(), vit().double()
    load_checkpoint(model, source.state_dict())
    assert all(torch.equal(x, source.state_dict()[name].double()) for name, x in model.state_dict().items())
    half = {name: x.bfloat16() for name, x in source.state_dict().items()}
    load_checkpoint(source, half)
    assert all(x.dtype == torch.float32 and torch.equal(x, half[n].float()) for n, x in source.state_dict().items())


# Strictness


def test_differences_are_listed_like_a_diff():
    file = copied(vit(num_classes=3))
    del file["norm.bias"]
    file |= {"extra.weight": torch.ones(2), "extra.bias": torch.ones(2)}
    message = refused(vit(), file)
    assert re.findall(r"^  [-+!] .*$", message, flags=re.MULTILINE) == [
        "  - norm.bias",
        "  + extra.weight",
        "  + extra.bias",
        "  ! head.weight: file (3, 24), model (5, 24)",
        "  ! head.bias: file (3,), model (5,)",
    ]
    assert "adapt_classifier=True" in message and "ignore=" in message
    assert "resize_pos_embed" not in message and "adapt_in_chans" not in message


def test_long_lists_end_with_a_count():
    message = refused(vit(), {f"other.{i}": torch.ones(1) for i in range(50)})
    assert len(re.findall(r"^  \+ other", message, flags=re.MULTILINE)) == 20
    assert "+ ... and 30 more" in message
    assert "another architecture" in message


def test_one_thing_that_does_not_fit_leaves_everything_as_it_was():
    for name, value in (
        ("blocks.1.norm2.weight", torch.ones(25)),
        ("blocks.1.norm2.weight", torch.ones(24, dtype=torch.int64)),
        ("pos_embed", torch.ones(1, 9, 24)),
        ("patch_embed.proj.weight", torch.ones(24, 1, 16, 16)),
    ):
        assert f"! {name}: file " in refused(vit(), {**copied(vit()), name: value})


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({}, "an empty dictionary"),
        ({"epoch": 3}, "no tensors by name were found, only epoch"),
        ({"model": {"w": torch.ones(1), "lr": 0.1}}, r"beside tensors there are lr \(float\)"),
        ({"model": nn.Linear(1, 1)}, r"got torch.nn.modules.linear.Linear under 'model'; give its state_dict\(\)"),
    ],
)
def test_dictionaries_without_weights_are_explained(source, words):
    assert re.search(words, refused(vit(), source))


def test_names_may_be_left_out_on_request():
    source, model = vit(), vit()
    file = {**source.state_dict(), "head_dist.weight": torch.ones(1), "head_dist.bias": torch.ones(1)}
    for ignore in (["head_dist.*"], "head_dist.*", ["head_dist.weight", "head_dist.bias"]):
        assert load_checkpoint(model, file, ignore=ignore).unused == ("head_dist.weight", "head_dist.bias")
    assert same(model.state_dict(), source.state_dict())
    assert "+ head_dist.bias" in refused(model, file, ignore=["head_dist.w*"])
    assert "- norm.bias" in refused(model, {k: x for k, x in file.items() if k != "norm.bias"}, ignore=["*"])


def test_a_model_without_memory_is_refused():
    with pytest.raises(ValueError, match="to_empty"):
        load_checkpoint(vit().to("meta"), {})
