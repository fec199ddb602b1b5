"""Backbones, detectors and segmentation on pyramids, what is measured of them, and the two examples."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.ops.misc import FrozenBatchNorm2d

from sansmax.data.dense_mosaics import DenseMosaics
from sansmax.models.dense import fpn_backbone, mask_rcnn, retinanet, segmenter
from sansmax.report.dense import average_precision, box_iou, class_iou, colour_of, detection_picture, matches

ROOT = Path(__file__).resolve().parent.parent
NARROW = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4)}
# little to do for the detectors: 64 px, 16 channels, few regions
SMALL = {"out_channels": 16, "min_size": 64, "max_size": 64, "model_arguments": NARROW}
FEW = {"rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 10, "box_batch_size_per_image": 16}


def scenes(count, size=64, split="train"):
    """Mosaics as lists of tensors and targets."""
    mosaics = DenseMosaics(split, count, size, digits=(2, 3), heights=(16, 30))
    images = [torch.from_numpy(mosaics.read(i))[None].expand(3, -1, -1) / 255 for i in range(count)]
    targets = [{k: torch.from_numpy(v) for k, v in mosaics.truth(i).items()} for i in range(count)]
    for target in targets:
        target["masks"] = target["masks"].to(torch.uint8)
    return images, targets, mosaics


# Backbones


@pytest.mark.parametrize(
    ("extra", "strides"), [("maxpool", [4, 8, 16, 32, 64]), ("p6p7", [8, 16, 32, 64, 128]), (None, [4, 8, 16, 32])]
)
def test_maps_have_the_sizes_of_their_strides_for_any_image(extra, strides):
    backbone = fpn_backbone("soft_tiny", 12, extra=extra, **NARROW).eval()
    assert backbone.strides == strides
    for size in ((64, 96), (97, 51), (33, 70)):
        with torch.no_grad():
            maps = backbone(torch.rand(1, 3, *size))
        expected = [(1, 12, *(-(-n // stride) for n in size)) for stride in strides]
        assert [tuple(m.shape) for m in maps.values()] == expected
    assert list(maps)[-2:] == {"maxpool": ["3", "pool"], "p6p7": ["p6", "p7"], None: ["2", "3"]}[extra]


def test_the_maps_are_those_of_the_network(assert_same):
    """With identities for weights the pyramid hands on the network's maps, each with the coarser ones added."""
    backbone = fpn_backbone(
        "soft_tiny", 32, extra=None, **{**NARROW, "embed_dims": (32,) * 4, "num_heads": (1, 2, 2, 4)}
    ).eval()
    for inner, layer in zip(backbone.fpn.inner_blocks, backbone.fpn.layer_blocks, strict=True):
        nn.init.eye_(inner[0].weight.data.view(32, 32))
        nn.init.zeros_(layer[0].weight)
        layer[0].weight.data[:, :, 1, 1] = torch.eye(32)
    x = torch.randn(2, 3, 52, 64)
    with torch.no_grad():
        found, maps = backbone(x), backbone.features.model.forward_intermediates(x, intermediates_only=True)
    rows = (torch.arange(4) * 2 / 4).floor().long()
    assert_same(found["3"], maps[3], "coarsest")
    # 4 x 4 of 2 x 2: each row and column twice
    assert_same(found["2"], maps[2] + maps[3][:, :, rows][..., rows], "next")


OTHERS = ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"]


@pytest.mark.parametrize("name", [*OTHERS, "seqnorm_vit_tiny_patch16_224"])
def test_any_network_of_timm_with_maps_serves(name):
    fixed = {"img_size": (64, 96)} if "vit" in name or "swin" in name else {}
    backbone = fpn_backbone(name, 8, **fixed).eval()
    assert backbone.strides == [4, 8, 16, 32, 64]
    with torch.no_grad():
        maps = backbone(torch.rand(1, 3, 64, 96))
    assert [tuple(m.shape[-2:]) for m in maps.values()] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]


def test_plain_networks_are_read_at_even_depths():
    backbone = fpn_backbone("vit_tiny_patch16_224", 8, img_size=32)
    assert list(backbone.features.feature_info.out_indices) == [2, 5, 8, 11]
    retina = fpn_backbone("vit_tiny_patch16_224", 8, img_size=32, extra="p6p7")
    assert list(retina.features.feature_info.out_indices) == [3, 7, 11]
    assert retina.strides == [8, 16, 32, 64, 128]


def test_a_network_with_its_weights_becomes_a_backbone(assert_same):
    model = timm.create_model("soft_tiny", **NARROW).eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = model.forward_intermediates(x, intermediates_only=True)
        found = fpn_backbone(model, 8).eval().features(x)
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b)


def test_levels_may_be_chosen():
    assert fpn_backbone("soft_tiny", 8, out_indices=(1, 3), extra=None, **NARROW).strides == [8, 32]
    assert retinanet("soft_tiny", 2, out_indices=(0, 1, 2), **SMALL).backbone.strides == [4, 8, 16, 32, 64]


def test_frozen_norms_neither_move_nor_learn():
    backbone = fpn_backbone("soft_tiny", 8, freeze_norm=True, **NARROW).train()
    plain = fpn_backbone("soft_tiny", 8, **NARROW)
    norms = [m for m in backbone.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert len(norms) == sum(isinstance(m, nn.BatchNorm2d) for m in plain.modules()) > 0
    assert not any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())
    before = [m.running_mean.clone() for m in norms]
    maps = backbone(5 + torch.randn(2, 3, 64, 64))
    maps["pool"].sum().backward()
    assert all(torch.equal(m.running_mean, b) for m, b in zip(norms, before, strict=True))
    assert not any(parameter is m.weight for m in norms for parameter in backbone.parameters())


def test_the_networks_own_normalisation_is_used():
    assert fpn_backbone("soft_tiny", 8, **NARROW).mean == (0.485, 0.456, 0.406)
    model = retinanet("vit_tiny_patch16_224", 3, model_arguments={"img_size": 64}, out_channels=8)
    assert tuple(model.transform.image_mean) == tuple(model.transform.image_std) == (0.5, 0.5, 0.5)


def test_grey_images_are_normalised_as_one_channel():
    model = segmenter("soft_tiny", 2, out_channels=8, head_channels=8, model_arguments={**NARROW, "in_chans": 1})
    assert model.backbone.mean == pytest.approx((0.449,))
    assert model.eval()(torch.rand(1, 1, 32, 40)).shape == (1, 2, 32, 40)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fpn_backbone("soft_tinny"), "unknown model 'soft_tinny': did you mean 'soft_tiny'"),
        (
            lambda: fpn_backbone("soft_tiny", extra="p6", **NARROW),
            'extra must be "maxpool", "p6p7" or None, got \'p6\'',
        ),
        (lambda: fpn_backbone(nn.Linear(2, 2)), "Linear gives no maps .* features_only=True"),
        (
            lambda: fpn_backbone(timm.create_model("soft_tiny", **NARROW), depth=2),
            "depth cannot be given for a network",
        ),
        (lambda: fpn_backbone("hrnet_w18_small", out_indices=(0, 0)), r"growing strides, \(0, 0\) have \[2, 2\]"),
        (lambda: retinanet("soft_tiny", 3, out_indices=(0,), min_sise=4), "unknown option of RetinaNet 'min_sise'"),
        (lambda: mask_rcnn("soft_tiny", 3, score_thresh=0.1), "option of MaskRCNN 'score_thresh'.*box_score_thresh"),
    ],
)
def test_what_cannot_be_built_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Detectors


DETECTORS = [
    pytest.param(lambda **o: retinanet("soft_tiny", 11, **{**SMALL, **o}), id="retinanet"),
    pytest.param(lambda **o: mask_rcnn("soft_tiny", 11, **{**SMALL, **FEW, **o}), id="mask_rcnn"),
]


def test_anchors_are_as_large_as_the_strides_say():
    model = retinanet("soft_tiny", 3, **SMALL)
    assert isinstance(model, RetinaNet)
    assert [sizes[0] for sizes in model.anchor_generator.sizes] == [32, 64, 128, 256, 512]
    model = mask_rcnn("soft_tiny", 3, anchor_scale=4.0, **SMALL)
    assert isinstance(model, MaskRCNN)
    assert model.rpn.anchor_generator.sizes == ((16,), (32,), (64,), (128,), (256,))


@pytest.mark.parametrize("make", DETECTORS)
def test_one_step_of_training_reaches_the_first_convolution(make):
    model = make().train()
    images, targets, _ = scenes(2)
    # an image without objects teaches too
    targets[1] = {k: v[:0] for k, v in targets[1].items()}
    losses = model(images, targets)
    assert all(loss.isfinite() for loss in losses.values())
    assert sum(losses.values()) > 0
    sum(losses.values()).backward()
    first = model.backbone.features.model.stages[0].patch_embed[0].weight
    assert first.grad.isfinite().all() and first.grad.abs().max() > 0


@pytest.mark.parametrize("make", DETECTORS)
def test_what_is_found_does_not_depend_on_batch_mates(make):
    # random weights find something everywhere
    thresholds = {"score_thresh": 0.0} if make().__class__ is RetinaNet else {"box_score_thresh": 0.0}
    model = make(**thresholds).eval()
    images, _, _ = scenes(3)
    with torch.no_grad():
        together, alone = model(images), [model([image])[0] for image in images]
    for a, b in zip(together, alone, strict=True):
        assert len(b["boxes"]) > 0
        assert a.keys() == b.keys()
        # float32 sums of another order may swap candidates of equal score
        torch.testing.assert_close(a["scores"], b["scores"], rtol=1e-4, atol=1e-6)
        same = (a["labels"] == b["labels"]) & ((a["boxes"] - b["boxes"]).abs().amax(1) < 1e-2)
        assert same.float().mean() > 0.9


@pytest.mark.parametrize(
    ("make", "name", "published"),
    [(retinanet, "soft_norm_tiny", 23), (retinanet, "soft_norm_small_24m", 34), (mask_rcnn, "soft_norm_tiny", 33)],
)
def test_detectors_of_the_80_classes_of_coco_have_the_published_count_of_parameters(make, name, published):
    assert round(sum(p.numel() for p in make(name, 81).parameters()) / 1e6) == published


# Segmentation


def test_segmentation_has_the_size_of_the_image_whatever_that_is():
    model = segmenter("soft_tiny", 5, out_channels=16, head_channels=12, model_arguments=NARROW).eval()
    with torch.no_grad():
        for size in ((64, 64), (47, 101), (33, 32)):
            assert model(torch.rand(1, 3, *size)).shape == (1, 5, *size)


def test_a_segmentation_does_not_depend_on_batch_mates(assert_same):
    model = segmenter("soft_tiny", 5, out_channels=16, head_channels=16, model_arguments=NARROW).eval()
    x = torch.rand(3, 3, 50, 64)
    with torch.no_grad():
        assert_same(model(x), torch.cat([model(image[None]) for image in x]))


def test_a_segmenter_learns_one_image_by_heart():
    model = segmenter("soft_tiny", 11, out_channels=24, head_channels=24, model_arguments=NARROW)
    images, _, mosaics = scenes(1)
    image, truth = images[0][None], torch.from_numpy(mosaics.semantic(0).astype(np.int64))[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(image), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert losses[-1] < 0.1 * losses[0]
    values = class_iou([model(image).argmax(1)[0].numpy()], [truth[0].numpy()], 11)
    assert np.nanmean(values) > 0.7


@pytest.mark.slow
def test_a_segmenter_compiles_and_exports(assert_same):
    model = segmenter("soft_tiny", 3, out_channels=8, head_channels=8, model_arguments=NARROW).eval()
    x = torch.rand(1, 3, 50, 64)
    with torch.no_grad():
        assert_same(torch.export.export(model, (x,)).module()(x), model(x), scale=1.0)


def test_heads_of_segmentation_models_pytorch_take_our_encoders():
    smp = pytest.importorskip("segmentation_models_pytorch", reason="segmentation-models-pytorch is not installed")
    for head in (smp.FPN, smp.UPerNet):
        model = head("tu-soft_tiny", encoder_weights=None, classes=4).eval()
        with torch.no_grad():
            assert model(torch.rand(1, 3, 64, 96)).shape == (1, 4, 64, 96)


# Figures


def found(boxes, labels, scores):
    return {**true(boxes, labels), "scores": np.array(scores)}


def true(boxes, labels):
    return {"boxes": np.reshape(np.array(boxes, float), (-1, 4)), "labels": np.array(labels, int)}


A, B, C = [0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]


def test_overlap_of_boxes():
    values = box_iou(np.array([A]), np.array([A, [5, 0, 15, 10], B, [0, 0, 10, 5]]))
    np.testing.assert_allclose(values, [[1, 1 / 3, 0, 1 / 2]])


def test_a_true_box_is_taken_once_by_the_best():
    near = [0, 0, 10, 9]
    assert matches(np.array([near, A, B]), np.array([A, C]), 0.5).tolist() == [0, -1, -1]


def test_average_precision_of_examples_counted_by_hand():
    truth = [true([A, B], [1, 1])]
    assert average_precision([found([A, B], [1, 1], [0.9, 0.8])], truth) == {1: 1.0}
    assert average_precision([found([], [], [])], truth) == {1: 0.0}
    # a wrong box first: precision 1/2 up to a recall of 1/2, then nothing. 51 of the 101 recalls are at most 1/2
    value = average_precision([found([C, A], [1, 1], [0.9, 0.8])], truth)
    assert value[1] == pytest.approx(0.5 * 51 / 101)
    # what counts is the best precision at a recall or beyond it: two thirds, at the second box found
    value = average_precision([found([C, A, B], [1, 1, 1], [0.9, 0.8, 0.7])], truth)
    assert value[1] == pytest.approx(2 / 3)
    # the wrong one last does no harm; found twice is wrong once
    assert average_precision([found([A, B, A], [1, 1, 1], [0.9, 0.8, 0.7])], truth) == {1: 1.0}
    # the wrong label is wrong, and a class that only the truth has counts as 0
    assert average_precision([found([A, B], [1, 1], [0.9, 0.8])], [true([A, B], [1, 2])]) == {1: 1.0, 2: 0.0}


def test_average_precision_ranks_over_all_images():
    truth = [true([A], [1]), true([A], [1])]
    pair = [found([A], [1], [0.3]), found([B], [1], [0.9])]
    assert average_precision(pair, truth)[1] == pytest.approx(0.5 * 51 / 101)


def test_average_precision_is_that_of_pycocotools(tmp_path):
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rng = np.random.default_rng(0)
    truth, results = [], []
    for _ in range(12):
        corners = rng.uniform(0, 60, (6, 2))
        truth.append(true(np.hstack([corners, corners + rng.uniform(8, 30, (6, 2))]), rng.integers(1, 4, 6)))
        moved = truth[-1]["boxes"][rng.integers(0, 6, 14)] + rng.normal(0, 3, (14, 4))
        results.append(found(moved, rng.integers(1, 4, 14), rng.random(14)))
    theirs = COCO()
    size = lambda box: [*box[:2], *(box[2:] - box[:2])]  # noqa: E731
    theirs.dataset = {
        "images": [{"id": i} for i in range(12)],
        "categories": [{"id": k} for k in (1, 2, 3)],
        "annotations": [
            {"id": 100 * i + j + 1, "image_id": i, "category_id": label, "bbox": size(box), "area": 1.0, "iscrowd": 0}
            for i, t in enumerate(truth)
            for j, (box, label) in enumerate(zip(t["boxes"], t["labels"], strict=True))
        ],
    }
    theirs.createIndex()
    rows = [
        [i, *size(box), score, label]
        for i, f in enumerate(results)
        for box, label, score in zip(f["boxes"], f["labels"], f["scores"], strict=True)
    ]
    evaluation = COCOeval(theirs, theirs.loadRes(np.array(rows)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    # at an overlap of 0.5, over all recalls, per class, all areas, 100 detections
    expected = evaluation.eval["precision"][0, :, :, 0, 2].mean(0)
    values = average_precision(results, truth)
    np.testing.assert_allclose([values[k] for k in (1, 2, 3)], expected, rtol=1e-12)
    assert 0.05 < expected.mean() < 0.9


def test_class_iou_counted_by_hand():
    truth = np.array([[0, 0, 1], [1, 255, 2]])
    guess = np.array([[0, 1, 1], [1, 2, 0]])
    np.testing.assert_allclose(class_iou([guess], [truth], 4), [1 / 3, 2 / 3, 0, np.nan])
    with pytest.raises(ValueError, match="bring it to the same size"):
        class_iou([guess[:1]], [truth], 4)


def test_sixteen_classes_have_colours_of_their_own():
    assert len({colour_of(k) for k in range(1, 17)}) == 16


def test_the_picture_shows_the_boxes_where_they_are(tmp_path):
    """Pixels in the colour of the class lie along the box alone; a worse box in the same place is not drawn."""
    grey = np.full((60, 60), 128, np.uint8)
    objects = found([[15, 20, 45, 40], [15, 20, 45, 41]], [1, 2], [0.9, 0.6])
    path = detection_picture([grey], [objects], [true([], [])], tmp_path / "p.png", classes=["x", "y"])
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(float) / 255
    rows, columns = np.nonzero(np.abs(pixels - colour_of(1)).max(-1) < 0.02)
    assert not (np.abs(pixels - colour_of(2)).max(-1) < 0.02).any()
    panel = np.abs(pixels - 128 / 255).max(-1) < 0.01
    top, bottom = np.nonzero(panel.any(1))[0][[0, -1]]
    left, right = np.nonzero(panel.any(0))[0][[0, -1]]
    # the lower of two equal panels
    height = (bottom - top + 1) / 2
    assert rows.min() > top + height
    wide = right - left + 1
    assert (columns.min() - left) / wide == pytest.approx(15 / 60, abs=0.03)
    assert (columns.max() - left) / wide == pytest.approx(45 / 60, abs=0.03)


# Examples


def example(name, *arguments, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    tiny = ["--steps", "2", "--batch-size", "2", "--mosaics", "4", "2", "--size", "64"]
    command = [sys.executable, str(ROOT / "examples" / name), *tiny, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "figure"),
    [("detection.py", ["--detector", "mask_rcnn"], "AP@0.5"), ("segmentation.py", [], "mIoU")],
)
def test_examples_train_measure_and_draw(name, arguments, figure, tmp_path):
    done = example(name, *arguments, "--size", "96", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{figure} 0." in done.stdout
    assert "step    2 of 2" in done.stdout
    with Image.open(tmp_path / name.replace(".py", ".png")) as image:
        assert min(image.size) > 300


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_mirrored_image_and_its_objects_agree():
    images, targets, _ = scenes(1)
    image, target = load("detection").mirrored(images[0], targets[0])
    torch.testing.assert_close(image, images[0].flip(-1))
    for box, mask in zip(target["boxes"].int().tolist(), target["masks"], strict=True):
        x0, y0, x1, y1 = box
        assert mask[y0:y1, x0:x1].sum() == mask.sum() > 0


def test_pieces_of_images_keep_image_and_mask_together():
    class Pair:
        ignore = 255

        def __len__(self):
            return 1

        def __getitem__(self, i):
            mask = torch.arange(1, 40 * 30 + 1).view(40, 30)
            return mask[None].expand(3, -1, -1).float(), mask

    for hflip in (0.0, 1.0):
        image, mask = load("segmentation").Pieces(Pair(), 32, hflip)[0]
        assert image.shape == (3, 32, 32) and mask.shape == (32, 32)
        counted = mask != 255
        inside = image[0] > 0
        # 255 is a number of this picture too, where the image is not empty
        assert torch.equal(image[0][inside].long(), mask[inside])
        assert (~inside).sum() == 2 * 32 and (mask[~inside] == 255).all() and counted.any()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("detection", ["--coco", "nowhere", "none.json"], "error: cannot read the annotations none.json"),
        ("segmentation", ["--images", "nowhere"], "images and masks go together"),
    ],
)
def test_examples_say_what_is_wrong_in_one_line(name, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as end:
        load(name).run()
    # argparse prints by itself, and ends with a number
    assert message in (capsys.readouterr().err if end.value.code == 2 else str(end.value.code))


@pytest.mark.parametrize("name", ["detection", "segmentation"])
def test_examples_can_be_stopped(name, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    module = load(name)
    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.setattr(module, "main", stop)
    with pytest.raises(SystemExit, match="stopped"):
        module.run()
