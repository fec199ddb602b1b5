"""Positions, input channels and the classifier of other weights are made to fit on request."""

import pytest
import safetensors.torch
import timm
import torch
from published import manifest, weights
from small_vits import copied, prefixed, refused, same, timm_vit, vit
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch import nn

from sansmax.models.fitting import adapt_channels, file_grid
from sansmax.models.weights import load_checkpoint


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
