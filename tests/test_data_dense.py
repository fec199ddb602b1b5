"""Sets in the format of COCO, folders of masks, and mosaics written as both: what is read is what is meant."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sansmax.data.coco import CocoImages, collate, decode_rle, encode_rle, polygon_mask
from sansmax.data.dense_mosaics import DenseMosaics, write_coco, write_masks
from sansmax.data.mask_folder import MaskFolder, read_mask
from sansmax.errors import InputError

# Shapes of objects


def test_a_rectangle_covers_the_pixels_between_its_corners():
    mask = polygon_mask(np.array([[2, 1], [6, 1], [6, 4], [2, 4]]), 5, 8)
    expected = np.zeros((5, 8), bool)
    expected[1:4, 2:6] = True
    np.testing.assert_array_equal(mask, expected)


def inside(points, x, y):
    """Even-odd rule, one point at a time."""
    answer = False
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        if (y0 <= y) != (y1 <= y) and x > x0 + (y - y0) * (x1 - x0) / (y1 - y0):
            answer = not answer
    return answer


@pytest.mark.parametrize("corners", [3, 4, 9])
def test_a_polygon_covers_the_pixels_whose_centres_are_inside(corners):
    rng = np.random.default_rng(corners)
    # crossing outlines, and corners outside the picture
    points = rng.uniform(-4, 17, (corners, 2))
    mask = polygon_mask(points, 11, 13)
    assert mask.tolist() == [[inside(points, x + 0.5, y + 0.5) for x in range(13)] for y in range(11)]
    assert mask.any() and not mask.all()


def test_runs_go_down_the_columns():
    mask = np.array([[0, 1, 1], [0, 0, 1]], bool)
    assert encode_rle(mask) == [2, 1, 1, 2]
    np.testing.assert_array_equal(decode_rle([2, 1, 1, 2], 2, 3), mask)
    # the first run is of zeros, even if there are none
    assert encode_rle(~mask) == [0, 2, 1, 1, 2]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_masks_survive_their_run_lengths(share):
    mask = np.random.default_rng(1).random((17, 23)) < share
    np.testing.assert_array_equal(decode_rle(encode_rle(mask), 17, 23), mask)


def test_packed_run_lengths_are_those_of_the_tools_of_coco():
    mask = np.zeros((5, 7), bool)
    mask[1:4, 2:5], mask[4, 6], mask[0, 0] = True, True, True
    # what pycocotools 2.0.11 gives for this mask
    for counts in ("01:2H0008N", b"01:2H0008N"):
        np.testing.assert_array_equal(decode_rle(counts, 5, 7), mask)


# theirs, of an array made in C
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_shapes_are_those_of_pycocotools():
    tools = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    rng = np.random.default_rng(0)
    mask = rng.random((37, 53)) < 0.2
    mask[5:30, 20:45] = True
    packed = tools.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    np.testing.assert_array_equal(decode_rle(packed, 37, 53), mask)
    angles, radii = np.sort(rng.random(9)) * 2 * np.pi, rng.uniform(15, 40, 9)
    points = np.stack([60 + radii * np.cos(angles), 50 + radii * np.sin(angles)], 1)
    theirs = tools.decode(tools.frPyObjects([points.ravel().tolist()], 100, 120))[..., 0].astype(bool)
    ours = polygon_mask(points, 100, 120)
    assert (ours & theirs).sum() / (ours | theirs).sum() > 0.95


# The format of COCO


def annotation(number, image, category, bbox, segmentation, **more):
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": bbox,
        "segmentation": segmentation,
        **more,
    }


SQUARE = [[2, 1, 6, 1, 6, 4, 2, 4]]


def content():
    """Three images of 8 x 5 px, one without objects; category numbers with gaps, out of order."""
    return {
        "images": [
            {"id": 11, "file_name": "a.png", "height": 5, "width": 8},
            {"id": 12, "file_name": "deep/b.png", "height": 5, "width": 8},
            {"id": 40, "file_name": "c.png", "height": 5, "width": 8},
        ],
        "annotations": [
            annotation(1, 11, 20, [2, 1, 4, 3], SQUARE, area=12, iscrowd=0),
            annotation(2, 11, 3, [6, 0, 5, 9], {"counts": [30, 3, 7], "size": [5, 8]}, area=10),
            annotation(3, 11, 7, [0, 0, 8, 5], {"counts": [0, 40], "size": [5, 8]}, iscrowd=1),
            annotation(4, 11, 7, [3, 3, 0, 2], SQUARE),
            annotation(5, 11, 7, [8, 1, 4, 2], SQUARE),
            annotation(6, 12, 7, [0, 0, 2, 2], [[0, 0, 2, 0, 2, 2, 0, 2], [5, 3, 7, 3, 7, 5, 5, 5]]),
        ],
        "categories": [
            {"id": 20, "name": "cat"},
            {"id": 3, "name": "dog"},
            {"id": 7, "name": "cup"},
        ],
    }


@pytest.fixture
def coco(tmp_path):
    """Writes the set, changed by a function, and opens it."""

    def make(change=lambda c: None, **options):
        (tmp_path / "images" / "deep").mkdir(parents=True, exist_ok=True)
        for name in ("a", "deep/b", "c"):
            Image.fromarray(np.full((5, 8), 51, np.uint8)).save(tmp_path / "images" / f"{name}.png")
        given = content()
        change(given)
        (tmp_path / "set.json").write_text(json.dumps(given))
        return CocoImages(tmp_path / "images", tmp_path / "set.json", **options)

    return make


def test_labels_have_no_gaps_and_follow_the_numbers_of_the_categories(coco):
    data = coco()
    assert data.classes == ("dog", "cup", "cat")
    assert data.category_ids == (3, 7, 20)
    assert data.truth(0)["labels"].tolist() == [3, 1]


def test_boxes_are_corners_cut_off_at_the_edge(coco):
    _, target = coco()[0]
    assert target["boxes"].tolist() == [[2, 1, 6, 4], [6, 0, 8, 5]]
    assert (target["boxes"].dtype, target["labels"].dtype) == (torch.float32, torch.int64)
    assert target["area"].tolist() == [12, 10]
    assert target["image_id"].item() == 11
    assert target["iscrowd"].tolist() == [0, 0]


def test_crowds_and_boxes_without_area_are_left_out_and_counted(coco):
    data = coco()
    assert (data.crowds, data.degenerate, data.empty) == (1, 2, 1)
    for text in ("3 images, 3 objects of 3 classes", "1 crowd regions", "2 boxes without area", "1 images without"):
        assert text in data.describe()


def test_masks_of_polygons_and_of_run_lengths(coco):
    data = coco(masks=True)
    masks = data[0][1]["masks"]
    assert masks.dtype == torch.uint8
    square, runs = np.zeros((5, 8)), np.zeros((5, 8))
    square[1:4, 2:6] = 1
    runs[0:3, 6] = 1
    np.testing.assert_array_equal(masks.numpy(), np.stack([square, runs]))
    # several polygons are parts of one object
    parts = np.zeros((5, 8), bool)
    parts[0:2, 0:2], parts[3:5, 5:7] = True, True
    np.testing.assert_array_equal(data.truth(1)["masks"], parts[None])


def test_images_without_objects_stay_as_torchvision_wants_them(coco):
    data = coco(masks=True)
    assert data.names == ["a.png", "deep/b.png", "c.png"]
    image, target = data[2]
    torch.testing.assert_close(image, torch.full((3, 5, 8), 0.2))
    assert {name: tuple(value.shape) for name, value in target.items()} == {
        "boxes": (0, 4), "labels": (0,), "masks": (0, 5, 8), "area": (0,), "image_id": (), "iscrowd": (0,)
    }  # fmt: skip
    assert coco(drop_empty=True).names == ["a.png", "deep/b.png"]


def test_a_batch_is_two_tuples(coco):
    data = coco()
    images, targets = collate([data[0], data[1]])
    assert [im.shape for im in images] == [(3, 5, 8)] * 2
    assert [t["image_id"].item() for t in targets] == [11, 12]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda c: c.pop("categories"), {}, "not in the format of COCO; it needs the lists images, annotations"),
        (lambda c: c["images"].append({**c["images"][0], "id": 5, "file_name": "d.png"}), {}, "1 of the 4 .* d.png"),
        (lambda c: c["images"][0].pop("width"), {}, "an entry of images in .* has no width"),
        (lambda c: c["images"][1].update(id=11), {}, "several images in .* have the same id"),
        (lambda c: c["categories"][1].update(id=7), {}, "several categories in .* have the same id"),
        (lambda c: c["annotations"][0].update(image_id=9), {}, "annotation 1 in .* is of image 9"),
        (lambda c: c["annotations"][0].update(category_id=9), {}, "of category 9; the file lists 3, 7, 20"),
        (lambda c: c["annotations"][0].pop("bbox"), {}, "annotation 1 in .* has no bbox"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2]), {}, "annotation 1 in .* bbox .* four numbers"),
        (lambda c: c["annotations"][0].pop("segmentation"), {"masks": True}, "annotation 1 .* no segmentation; open"),
        (lambda c: c.update(images=[]), {}, "lists 0 images and 3 categories"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_the_place(coco, change, options, message):
    with pytest.raises(InputError, match=message):
        coco(change, **options)


def test_without_masks_no_segmentation_is_needed(coco):
    assert len(coco(lambda c: [a.pop("segmentation") for a in c["annotations"]]).truth(0)["boxes"]) == 2


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"counts": [30, 3], "size": [5, 8]}, "annotation 1 .* run lengths of 33 pixels, the image has 5 x 8 = 40"),
        ([[1, 2, 3]], "annotation 1 .* is neither polygons"),
        ({"size": [5, 8]}, "annotation 1 .* is neither polygons"),
    ],
)
def test_a_segmentation_that_does_not_fit_is_refused(coco, segmentation, message):
    data = coco(lambda c: c["annotations"][0].update(segmentation=segmentation), masks=True)
    with pytest.raises(InputError, match=message):
        data.truth(0)


def test_an_image_of_another_size_than_listed_is_refused(coco):
    data = coco(lambda c: c["images"][0].update(width=9))
    with pytest.raises(InputError, match=r"a.png is 8 x 5 px, but .* lists it with 9 x 5"):
        data[0]


def test_missing_files_are_named(coco, tmp_path):
    coco()
    with pytest.raises(InputError, match=r"cannot read the annotations .*none.json: No such file"):
        CocoImages(tmp_path / "images", tmp_path / "none.json")
    with pytest.raises(InputError, match=r"there is no folder of images .*nowhere"):
        CocoImages(tmp_path / "nowhere", tmp_path / "set.json")
    (tmp_path / "broken.json").write_text('{"images": [')
    with pytest.raises(InputError, match=r"broken.json are no JSON"):
        CocoImages(tmp_path / "images", tmp_path / "broken.json")


# Folders of masks


@pytest.fixture
def folders(tmp_path):
    """Two images with masks of the classes 0, 1 and 4, one of them a palette, and pixels that do not count."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    for folder in (images, masks):
        (folder / "sub").mkdir(parents=True)
    values = np.zeros((6, 7), np.uint8)
    values[1:3], values[4], values[5, 0] = 1, 4, 255
    for name in ("a", "sub/b"):
        Image.fromarray(np.full((6, 7, 3), 51, np.uint8)).save(images / f"{name}.jpg")
    Image.fromarray(values).save(masks / "a.png")
    palette = Image.fromarray(values).convert("P")
    palette.putdata(values.ravel().tolist())
    palette.putpalette([v for i in range(256) for v in ((7 * i) % 256, i, 255 - i)])
    palette.save(masks / "sub" / "b.png")
    return images, masks, values


def test_masks_are_the_numbers_in_the_file_not_its_colours(folders):
    images, masks, values = folders
    data = MaskFolder(images, masks)
    assert data.names == ["a", "sub/b"]
    # as many classes as the largest value says, 255 aside
    assert data.classes == ("0", "1", "2", "3", "4")
    for i in range(2):
        image, mask = data[i]
        assert image.shape == (3, 6, 7)
        assert abs(image.mean().item() - 0.2) < 0.01
        assert mask.dtype == torch.int64
        np.testing.assert_array_equal(mask.numpy(), values)


def test_classes_may_be_named_or_counted(folders):
    assert MaskFolder(*folders[:2], classes=["a", "b", "c", "d", "e"]).classes[4] == "e"
    assert len(MaskFolder(*folders[:2], classes=150).classes) == 150


def test_files_without_a_partner_are_named(folders):
    images, masks, _ = folders
    (masks / "a.png").rename(masks / "z.png")
    with pytest.raises(InputError, match=r"1 files have no mask of their name in .*masks: .*a\.jpg"):
        MaskFolder(images, masks)
    (images / "a.jpg").unlink()
    with pytest.raises(InputError, match=r"1 files have no image of their name in .*images: .*z\.png"):
        MaskFolder(images, masks)


def test_a_mask_of_another_size_is_refused_with_both_names(folders):
    images, masks, values = folders
    Image.fromarray(values[:, :5].copy()).save(masks / "a.png")
    data = MaskFolder(images, masks)
    with pytest.raises(InputError, match=r"a\.png is 5 x 6 px, its image .*a\.jpg 7 x 6"):
        data[0]
    data[1]


def test_values_that_are_no_class_are_refused(folders):
    data = MaskFolder(*folders[:2], classes=2)
    with pytest.raises(InputError, match=r"a\.png has the values 4; allowed are 0 to 1 and 255"):
        data[0]


def test_what_is_no_mask_is_refused(folders, tmp_path):
    images, masks, values = folders
    Image.fromarray(np.dstack([values] * 3)).save(masks / "a.png")
    with pytest.raises(InputError, match=r"a\.png has colours \(RGB\)"):
        read_mask(masks / "a.png")
    (masks / "a.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"cannot read the mask .*a\.png"):
        read_mask(masks / "a.png")
    with pytest.raises(InputError, match=r"there is no folder .*nowhere"):
        MaskFolder(tmp_path / "nowhere", masks)
    Image.fromarray(values).save(images / "a.png")
    with pytest.raises(InputError, match=r"a\.jpg and .*a\.png have the same name|a\.png and .*a\.jpg"):
        MaskFolder(images, masks)


# Mosaics


def test_boxes_and_masks_of_mosaics_fit_each_other():
    mosaics = DenseMosaics("train", 12, size=96)
    for i in range(12):
        truth = mosaics.truth(i)
        assert 1 <= len(truth["labels"]) <= 8
        assert truth["masks"].sum(0).max() == 1
        for box, mask in zip(truth["boxes"].astype(int), truth["masks"], strict=True):
            x0, y0, x1, y1 = box
            assert mask[y0:y1, x0:x1].sum() == mask.sum() > 0
            edges = mask[y0, x0:x1], mask[y1 - 1, x0:x1], mask[y0:y1, x0], mask[y0:y1, x1 - 1]
            assert all(edge.any() for edge in edges)
        semantic = mosaics.semantic(i)
        assert (semantic > 0).sum() == truth["masks"].sum()
        for label, mask in zip(truth["labels"], truth["masks"], strict=True):
            assert (semantic[mask] == label).all()


def test_ink_is_brighter_than_the_background():
    mosaics = DenseMosaics("train", 12)
    for i in range(12):
        pixels, semantic = mosaics.read(i), mosaics.semantic(i)
        assert pixels[semantic > 0].mean() > 2 * pixels[semantic == 0].mean()


def test_a_mosaic_depends_on_seed_split_and_number_alone():
    one, other = DenseMosaics("test", 4, 64), DenseMosaics("test", 400, 64)
    np.testing.assert_array_equal(one.read(3), other.read(3))
    for differs in (DenseMosaics("test", 4, 64, seed=1), DenseMosaics("val", 4, 64)):
        assert not np.array_equal(one.read(3), differs.read(3))
    with pytest.raises(IndexError):
        one.read(4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "tset"}, "unknown split 'tset': did you mean 'test'"),
        ({"split": "test", "digits": (4, 3)}, r"digits=\(4, 3\)"),
        ({"split": "test", "size": 40}, r"heights \(least, most\) from 8 to the size.* size=40"),
    ],
)
def test_mosaics_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        DenseMosaics(**{"count": 3, **arguments})


def test_mosaics_written_and_read_again_are_the_same(tmp_path):
    mosaics = DenseMosaics("val", 3, 80)
    data = CocoImages(*write_coco(mosaics, tmp_path / "coco"), masks=True)
    segments = MaskFolder(*write_masks(mosaics, tmp_path / "masks"), classes=11)
    assert data.classes == mosaics.classes
    for i in range(3):
        np.testing.assert_array_equal(data.read(i), mosaics.read(i))
        np.testing.assert_array_equal(segments.read(i), mosaics.read(i))
        np.testing.assert_array_equal(segments.truth(i), mosaics.semantic(i))
        truth, read = mosaics.truth(i), data.truth(i)
        for name in ("boxes", "labels", "masks"):
            np.testing.assert_array_equal(read[name], truth[name])
        np.testing.assert_array_equal(read["area"], truth["masks"].sum((1, 2)))
