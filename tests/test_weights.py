"""Weights of others and of one's own load whole or not at all, under any wrapper, and no file is ever run."""

import argparse
import io
import os
import pickle
import re
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from networks import perturbed
from published import difference, manifest, picture, reference, weights
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch import nn

from sansmax.models import cvt, deit, soft, xcit  # noqa: F401  (registers the networks)
from sansmax.models.fitting import adapt_channels, file_grid
from sansmax.models.weights import load_checkpoint

SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 32, "num_classes": 5}


def vit(**changes):
    return perturbed(timm.create_model("seqnorm_vit_tiny_patch16_224", **{**SMALL, **changes}))


def timm_vit(name="vit_tiny_patch16_224", **changes):
    return perturbed(timm.create_model(name, **{**SMALL, **changes}))


def copied(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refused(model, source, **options):
    """The message, with the model as it was."""
    before = copied(model)
    with pytest.raises(ValueError) as caught:
        load_checkpoint(model, source, **options)
    assert same(model.state_dict(), before)
    return str(caught.value)


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


def prefixed(state, *prefixes):
    return OrderedDict(("".join(prefixes) + name, x) for name, x in state.items())


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


# Made to fit


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("size", [(64, 64), (32, 80)])
def test_positions_are_resized_as_timm_does(name, size):
    source, model, timms = timm_vit(name, img_size=48), timm_vit(name, img_size=size), timm_vit(name, img_size=size)
    report = load_checkpoint(model, source.state_dict(), resize_pos_embed=True)
    timms.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(source.state_dict(), timms))
    assert same(model.state_dict(), timms.state_dict())
    assert report.resized == (f"pos_embed: 3 x 3 to {size[0] // 16} x {size[1] // 16}",)


def test_positions_of_grids_that_are_not_square_need_the_size_of_the_images(tmp_path):
    source, model = vit(img_size=(32, 96)), vit(img_size=(64, 64))
    old = source.state_dict()
    assert "no square grid; file_image_size=" in refused(model, old, resize_pos_embed=True)
    load_checkpoint(model, old, resize_pos_embed=True, file_image_size=(32, 96))
    expected = resample_abs_pos_embed(old["pos_embed"], [4, 4], [2, 6], num_prefix_tokens=0)
    assert torch.equal(model.pos_embed, expected)
    # a folder in the hub's layout says it by itself
    safetensors.torch.save_file(old, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_args": {"img_size": [32, 96]}, "pretrained_cfg": {}}')
    other = vit(img_size=(64, 64))
    load_checkpoint(other, tmp_path, resize_pos_embed=True)
    assert torch.equal(other.pos_embed, expected)


def test_as_many_positions_on_another_grid_are_noticed():
    source, model = vit(img_size=(32, 128)), vit(img_size=(64, 64))
    message = refused(model, source.state_dict(), file_image_size=(32, 128))
    assert "2 x 8 to 4 x 4" in message
    load_checkpoint(model, source.state_dict(), file_image_size=(32, 128), resize_pos_embed=True)
    expected = resample_abs_pos_embed(source.pos_embed.detach(), [4, 4], [2, 8], num_prefix_tokens=0)
    assert torch.equal(model.pos_embed, expected)


@pytest.mark.parametrize(
    ("tokens", "size", "grid"),
    [(196, None, (14, 14)), (195, None, None), (18, (100, 60), (6, 3)), (280, (224, 320), (14, 20)), (7, (9, 9), None)],
)
def test_grids_follow_the_shape_of_the_images(tokens, size, grid):
    assert file_grid(tokens, size) == grid


def test_every_table_of_a_pyramid_is_resized(tmp_path):
    file = weights(manifest("soft_tiny"), torch.float32)
    model = timm.create_model("soft_tiny", img_size=(96, 64))
    assert refused(model, file).count("resize_pos_embed=True resamples the positions") == 4
    report = load_checkpoint(model, file, resize_pos_embed=True)
    assert len(report.resized) == 4
    for i, (side, new) in enumerate([(56, [24, 16]), (28, [12, 8]), (14, [6, 4]), (7, [3, 2])]):
        table, prefix = file[f"pos_embed{i + 1}"], int(i == 3)
        expected = resample_abs_pos_embed(table, new, [side, side], num_prefix_tokens=prefix)
        assert torch.equal(model.stages[i].pos_embed, expected)
        assert torch.equal(model.stages[i].pos_embed[:, :prefix], table[:, :prefix])


def test_a_class_token_that_only_one_has_is_named():
    message = refused(vit(img_size=64), timm_vit(img_size=64).state_dict(), resize_pos_embed=True)
    assert "positions of 1 tokens before those of the picture, the model of 0" in message


@pytest.mark.parametrize("in_chans", [1, 2, 4, 5])
def test_input_channels_are_adapted_as_timm_does(in_chans):
    source, model = vit(), vit(in_chans=in_chans)
    assert "adapt_in_chans=True" in refused(model, source.state_dict())
    report = load_checkpoint(model, source.state_dict(), adapt_in_chans=True)
    expected = adapt_input_conv(in_chans, source.patch_embed.proj.weight.detach())
    torch.testing.assert_close(model.patch_embed.proj.weight.detach(), expected, rtol=1e-6, atol=0)
    assert report.adapted == (f"patch_embed.proj.weight: 3 to {in_chans} channels",)


@pytest.mark.parametrize(("old", "new"), [(3, 1), (1, 3), (1, 4), (2, 6)])
def test_a_grey_picture_is_answered_alike_with_other_channels(old, new):
    weight, grey = torch.randn(7, old, 3, 3, dtype=torch.float64), torch.randn(2, 1, 9, 9, dtype=torch.float64)
    found = nn.functional.conv2d(grey.expand(-1, new, -1, -1), adapt_channels(weight, new))
    torch.testing.assert_close(found, nn.functional.conv2d(grey.expand(-1, old, -1, -1), weight))


def test_the_classifier_is_kept_on_request():
    for there, here in ((7, 5), (0, 5), (7, 0)):
        source, model = vit(num_classes=there), vit(num_classes=here)
        assert "adapt_classifier=True" in refused(model, source.state_dict())
        before = copied(model)
        report = load_checkpoint(model, source.state_dict(), adapt_classifier=True)
        head = ("head.weight", "head.bias")
        assert report.left == (head if here else ())
        assert report.unused == (head if there else ())
        for name, x in model.state_dict().items():
            assert torch.equal(x, before[name] if name in head else source.state_dict()[name])
    # the same number of classes: the file's classifier is wanted
    source, model = vit(), vit()
    assert load_checkpoint(model, source.state_dict(), adapt_classifier=True).left == ()
    assert same(model.state_dict(), source.state_dict())


def test_the_report_says_all_that_was_done():
    source, model = vit(num_classes=2), vit(img_size=64, in_chans=1)
    wishes = {"resize_pos_embed": True, "adapt_in_chans": True, "adapt_classifier": True, "ignore": ["x"]}
    file = {"model": prefixed({**source.state_dict(), "x": torch.ones(1)}, "module.")}
    lines = str(load_checkpoint(model, file, **wishes)).splitlines()
    count = len(source.state_dict()) - 2
    assert lines[0] == f"{count} tensors from a dictionary: the model's own names, inside model, module."
    assert lines[1:] == [
        "  resized pos_embed: 2 x 2 to 4 x 4",
        "  adapted patch_embed.proj.weight: 3 to 1 channels",
        "  kept as the model had it: head.weight",
        "  kept as the model had it: head.bias",
        "  not used: head.weight",
        "  not used: head.bias",
        "  not used: x",
    ]


# Files that are no weights, and files that would run


class Runs:
    """An object that runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_code_in_a_file_is_never_run(kind, tmp_path):
    mark, path = tmp_path / "it_ran", tmp_path / "model.pth"
    file = {"model": vit().state_dict(), "extra": Runs(f"touch '{mark}'")}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(file))
    else:
        torch.save(file, path, _use_new_zipfile_serialization=kind == "zip")
    message = refused(vit(), path)
    assert not mark.exists()
    if kind != "pickle":
        assert f"holds {os.name}.system" in message
    assert "weights_only=False" in message
    # it would have run
    if kind == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert mark.exists()


def test_the_way_out_of_a_refusal_works(tmp_path, monkeypatch):
    source, model = vit(), vit()
    file = {"model": source.state_dict(), "best": np.float64(0.8), "when": np.zeros(2)}
    torch.save(file, tmp_path / "trained.pth")
    message = refused(model, tmp_path / "trained.pth")
    assert "numpy" in message and "was not read" in message
    code = re.search(r"^    import torch.*", message, flags=re.MULTILINE | re.DOTALL)
    assert code is not None
    exec(re.sub(r"^    ", "", code[0], flags=re.MULTILINE), {})
    load_checkpoint(model, tmp_path / "trained.safetensors")
    assert same(model.state_dict(), source.state_dict())


def test_a_whole_module_is_refused_and_converted(tmp_path):
    source, model = vit(), vit()
    torch.save(source, tmp_path / "whole.pth")
    message = refused(model, tmp_path / "whole.pth")
    assert "sansmax.models.vit.VisionTransformer" in message
    exec(re.sub(r"^    ", "", message[message.index("    import torch") :], flags=re.MULTILINE), {})
    load_checkpoint(model, tmp_path / "whole.safetensors")
    assert same(model.state_dict(), source.state_dict())


def zipped():
    out = io.BytesIO()
    torch.save(vit().state_dict(), out)
    return out.getvalue()


def torn_inside():
    data = bytearray(zipped())
    with zipfile.ZipFile(io.BytesIO(bytes(data))) as file:
        start = next(i.header_offset for i in file.infolist() if i.filename.endswith("data/0"))
    data[start : start + 8] = bytes(8)
    return bytes(data)


def npz():
    out = io.BytesIO()
    np.savez(out, a=np.ones(2))
    return out.getvalue()


def legacy():
    out = io.BytesIO()
    torch.save(vit().state_dict(), out, _use_new_zipfile_serialization=False)
    return out.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
WRONG = {
    "empty": ("a.pth", lambda: b"", "is empty"),
    "page": ("a.pth", lambda: b"\n<!DOCTYPE html>\n<html><body>404", "is a web page"),
    "page as safetensors": ("a.safetensors", lambda: b"<html><head></head></html>", "is a web page"),
    "pointer": ("a.safetensors", lambda: LFS, "is a pointer of git-lfs"),
    "json": ("a.pth", lambda: b'{"error": "Repository not found"}', "is JSON text"),
    "text": ("a.pth", lambda: b"hello, world", "no file of weights"),
    "half a zip": ("a.pth", lambda: zipped()[: len(zipped()) // 2], "is damaged or was cut off"),
    "no end": ("a.pth", lambda: zipped()[:-10], "is damaged or was cut off"),
    "torn inside": ("a.pth", torn_inside, "is damaged or was cut off"),
    "half of the old kind": ("a.pth", lambda: legacy()[: len(legacy()) // 2], "is damaged or was cut off"),
    "start of the old kind": ("a.pth", lambda: legacy()[:40], "is damaged or was cut off"),
    "half a safetensors": (
        "a.safetensors",
        lambda: safetensors.torch.save(vit().state_dict())[:-100],
        "is damaged or was cut off",
    ),
    "numpy": ("a.npz", npz, "is a NumPy file"),
    "a list": ("a.pth", lambda: saved([torch.ones(1)]), "a dictionary of tensors by name, got list"),
    "a tensor": ("a.pth", lambda: saved(torch.ones(1)), "a dictionary of tensors by name, got torch.Tensor"),
}


def saved(value):
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


@pytest.mark.parametrize("what", list(WRONG))
def test_each_wrong_file_has_its_own_message(what, tmp_path):
    name, content, words = WRONG[what]
    (tmp_path / name).write_bytes(content())
    assert words in refused(vit(), tmp_path / name)


def test_paths_without_weights_are_explained(tmp_path):
    model = vit()
    assert "there is no file or folder" in refused(model, tmp_path / "none.pth")
    assert "is an address" in refused(model, "https://example.org/soft_tiny.pth")
    assert 'timm.create_model("hf-hub:' in refused(model, "hf-hub:owner/name")
    assert "holds no weights" in refused(model, tmp_path)
    (tmp_path / "run.json").write_text("{}")
    assert "before the end of its first epoch" in refused(model, tmp_path)
    (tmp_path / "run.json").unlink()
    for name in ("a.pth", "b.pth"):
        torch.save(model.state_dict(), tmp_path / name)
    assert "Give the file: a.pth, b.pth" in refused(model, tmp_path)
    (tmp_path / "a.pth").unlink()
    load_checkpoint(model, tmp_path)
