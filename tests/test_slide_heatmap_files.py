"""Scores of a slide's tokens as files that others read: HDF5, TIFF, GeoJSON, PNG."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from sansmax.errors import InputError
from sansmax.report import heatmap_tiff
from sansmax.report.heatmap import robust_limit
from sansmax.report.heatmap_array import read_scores_h5, write_scores_h5
from sansmax.report.heatmap_geojson import write_heatmap_geojson
from sansmax.report.heatmap_tiff import write_heatmap_tiff
from sansmax.report.slide_heatmap import length_text, nice_length, resized, slide_figure, slide_heatmap
from sansmax.report.slide_scores import SlideScores

SIDE, SIZE = 256, (5120, 3840)


@pytest.fixture
def scores():
    """Tokens on the left half of a slide of 20 x 15 tiles: against the class above, for it below."""
    xy = np.array([(x * SIDE, y * SIDE) for y in range(15) for x in range(10)])
    values = np.where(xy[:, 1] < 7 * SIDE, -0.5, 1.0)
    about = {"mpp": 0.25, "slide_size": SIZE, "probability": 0.875}
    return SlideScores("slide 7", values, xy, float(SIDE), "tumour", **about)


def thumbnail(colour=(200, 120, 170)):
    return np.full((150, 200, 3), colour, np.uint8)


# Values


def test_scores_are_one_finite_number_per_token(scores):
    with pytest.raises(InputError, match=r"150 scores need xy of shape \(150, 2\), got \(149, 2\)"):
        dataclasses.replace(scores, xy=scores.xy[1:])
    with pytest.raises(InputError, match="2 of 150 scores are not finite"):
        dataclasses.replace(scores, scores=np.where(np.arange(150) < 2, np.nan, 1.0))
    with pytest.raises(InputError, match="at least one token"):
        dataclasses.replace(scores, scores=np.zeros(0), xy=np.zeros((0, 2)))
    with pytest.raises(InputError, match="side of a token in level-0 pixels, got None"):
        dataclasses.replace(scores, side=None)


def test_tokens_outside_the_slide_are_refused_with_numbers(scores):
    message = r"30 of 150 tokens lie outside the slide of 2,048 x 4,000 level-0 px.* from \(0, 0\) to \(2,304, 3,584\)"
    with pytest.raises(InputError, match=message):
        dataclasses.replace(scores, slide_size=(2048, 4000))
    with pytest.raises(InputError, match="another slide"):
        dataclasses.replace(scores, xy=scores.xy - 300)
    # tokens that stick out are there
    dataclasses.replace(scores, slide_size=(2305, 3585))
    dataclasses.replace(scores, xy=scores.xy - 255)


@pytest.mark.parametrize(
    ("quantity", "words"), [("log-odds", "log-odds"), ("value", "predicted value"), ("risk", "Cox model")]
)
def test_the_meaning_is_said_in_words(scores, quantity, words):
    said = dataclasses.replace(scores, quantity=quantity).meaning
    assert words in said and "'tumour'" in said and "removing" in said and "speaks for" in said


# HDF5


def test_the_array_holds_all_and_is_read_back(scores, tmp_path):
    again = read_scores_h5(write_scores_h5(scores, tmp_path / "a.h5"))
    for field in dataclasses.fields(SlideScores):
        assert np.array_equal(getattr(again, field.name), getattr(scores, field.name)), field.name


def test_the_array_has_the_names_of_raw_heat_maps_of_clam(scores, tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(write_scores_h5(scores, tmp_path / "a.h5"), "r") as file:
        assert file["attention_scores"].shape == (150, 1) and file["attention_scores"].dtype == np.float32
        np.testing.assert_array_equal(file["attention_scores"][:].flatten(), scores.scores.astype(np.float32))
        assert file["coords"].dtype == np.int64
        np.testing.assert_array_equal(file["coords"][:], scores.xy)
        assert file.attrs["meaning"] == scores.meaning and file.attrs["format_version"] == 1
        assert file.attrs["mpp"] == 0.25 and file.attrs["side_level0"] == SIDE


def test_scores_without_coordinates_are_an_array_alone(scores, tmp_path):
    h5py = pytest.importorskip("h5py")
    bare = dataclasses.replace(scores, xy=None, side=None)
    path = write_scores_h5(bare, tmp_path / "a.h5")
    with h5py.File(path, "r") as file:
        assert "coords" not in file and "xy_level0" not in file and "no coordinates" in file.attrs["note"]
    assert read_scores_h5(path).xy is None
    for write in (write_heatmap_geojson, write_heatmap_tiff, slide_heatmap):
        with pytest.raises(InputError, match="the tokens have no coordinates"):
            write(bare, tmp_path / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]


def test_files_that_hold_no_scores_are_refused(scores, tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["coords"] = scores.xy
    with pytest.raises(InputError, match="is no file of scores"):
        read_scores_h5(tmp_path / "other.h5")
    whole = write_scores_h5(scores, tmp_path / "a.h5").read_bytes()
    (tmp_path / "torn.h5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be read as a file of scores"):
        read_scores_h5(tmp_path / "torn.h5")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file.attrs["format_version"] = 9
    with pytest.raises(InputError, match="has version 9"):
        read_scores_h5(tmp_path / "a.h5")


# GeoJSON


def test_each_token_is_a_locked_tile_with_its_score(scores, tmp_path):
    changed = dataclasses.replace(scores, scores=np.r_[scores.scores[:-1], 0.0])
    path, note = write_heatmap_geojson(changed, tmp_path / "a.geojson")
    page = json.loads(path.read_text())
    assert page["type"] == "FeatureCollection" and page["sansmax"]["meaning"] == scores.meaning
    assert note == "one tile per token, 150 in all"
    assert len(page["features"]) == 150
    for feature, (x, y), value in zip(page["features"], scores.xy.tolist(), changed.scores, strict=True):
        assert feature["type"] == "Feature"
        corners = [[x, y], [x + SIDE, y], [x + SIDE, y + SIDE], [x, y + SIDE], [x, y]]
        assert feature["geometry"] == {"type": "Polygon", "coordinates": [corners]}
        properties = feature["properties"]
        assert properties["objectType"] == "tile" and properties["isLocked"] is True
        assert properties["measurements"] == {"score_tumour": value}
        kind = {-0.5: ("against tumour", [20, 96, 170]), 1.0: ("for tumour", [200, 53, 28])}.get(value)
        if kind is None:
            assert "classification" not in properties
        else:
            assert properties["classification"] == {"name": kind[0], "color": kind[1]}


def test_too_many_tokens_become_coarser_squares_of_their_means(scores, tmp_path):
    rng = np.random.default_rng(0)
    changed = dataclasses.replace(scores, scores=rng.standard_normal(150))
    path, note = write_heatmap_geojson(changed, tmp_path / "a.geojson", most_tiles=30)
    features = json.loads(path.read_text())["features"]
    assert 10 <= len(features) <= 30
    assert "each the mean of the tokens in it" in note and "150 tiles are more than 30" in note
    seen = np.zeros(150, int)
    for feature in features:
        ring = np.array(feature["geometry"]["coordinates"][0])
        low, high = ring.min(0), ring.max(0)
        inside = ((scores.xy >= low) & (scores.xy + SIDE <= high)).all(axis=1)
        seen += inside
        found = feature["properties"]["measurements"]
        assert found["tokens"] == inside.sum()
        assert found["score_tumour"] == pytest.approx(changed.scores[inside].mean(), rel=1e-8)
    assert (seen == 1).all()


def test_names_of_classes_cannot_break_the_file(scores, tmp_path):
    odd = dataclasses.replace(scores, class_name='a "b" \\ \u00e4')
    path, _ = write_heatmap_geojson(odd, tmp_path / "a.geojson")
    (first, *_) = json.loads(path.read_text(encoding="utf-8"))["features"]
    assert first["properties"]["measurements"] == {'score_a "b" \\ \u00e4': -0.5}


# TIFF


def test_the_tiff_opens_in_openslide_with_levels_and_resolution(scores, tmp_path):
    openslide = pytest.importorskip("openslide")
    write_heatmap_tiff(scores, tmp_path / "a.tiff", downsample=2.0)
    with openslide.OpenSlide(tmp_path / "a.tiff") as slide:
        assert slide.level_dimensions == ((2560, 1920), (1280, 960), (640, 480), (320, 240))
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5)
        about = json.loads(slide.properties["tiff.ImageDescription"])
        assert about["class"] == "tumour" and about["meaning"] == scores.meaning
        assert about["full_colour_at"] == robust_limit(scores.scores)
        for level in range(4):
            size = slide.level_dimensions[level]
            pixels = np.asarray(slide.read_region((0, 0), level, size))[..., :3].astype(int)
            h, w = pixels.shape[:2]
            # right half white, above blue, below red
            assert (pixels[:, w // 2 + 1 :] == 255).all()
            above, below = pixels[: int(h * 0.44), : w // 2 - 1], pixels[int(h * 0.5) :, : w // 2 - 1]
            assert (above[..., 2] > above[..., 0] + 50).all() and (below[..., 0] > below[..., 2] + 50).all()


def test_each_level_is_the_mean_of_the_scores_and_not_of_the_colours(scores, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    # single tokens of equal size and both signs: their mean is nothing
    rows, columns = (scores.xy // SIDE).T[::-1]
    checked = dataclasses.replace(scores, scores=np.where((rows + columns) % 2, 1.0, -1.0), slide_size=(2560, 3840))
    write_heatmap_tiff(checked, tmp_path / "a.tiff", downsample=SIDE)
    levels = heatmap_tiff.level_downsamples((2560, 3840), SIDE)
    assert levels == [SIDE]
    write_heatmap_tiff(checked, tmp_path / "b.tiff", downsample=4.0)
    with tifffile.TiffFile(tmp_path / "b.tiff") as file:
        assert file.is_bigtiff and all(page.is_tiled for page in file.pages)
        assert [page.shape[:2] for page in file.pages] == [(960, 640), (480, 320)]
        first, second = (page.asarray() for page in file.pages)
    tokens = first.reshape(15, 64, 10, 64, 3)
    # one colour per token, in two colours
    assert (tokens == tokens[:, :1, :, :1]).all() and len(np.unique(tokens.reshape(-1, 3), axis=0)) == 2
    np.testing.assert_array_equal(second, first[::2, ::2])


def test_a_coarse_pixel_over_two_opposite_tokens_has_no_colour(scores, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    rows, columns = (scores.xy // SIDE).T[::-1]
    checked = dataclasses.replace(scores, scores=np.where((rows + columns) % 2, 1.0, -1.0), slide_size=(2560, 3840))
    with tifffile.TiffFile(write_heatmap_tiff(checked, tmp_path / "a.tiff", downsample=2 * SIDE)) as file:
        pixels = file.pages[0].asarray()
    assert pixels.shape == (8, 5, 3)
    assert (pixels[:7].max(axis=2) == pixels[:7].min(axis=2)).all()


def test_a_transparent_tiff_is_open_where_there_is_no_token(scores, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    with tifffile.TiffFile(write_heatmap_tiff(scores, tmp_path / "a.tiff", transparent=True)) as file:
        pixels = file.pages[0].asarray()
        assert file.pages[0].extrasamples == (2,)
    assert pixels.shape[2] == 4
    w = pixels.shape[1]
    assert (pixels[:, w // 2 + 1 :, 3] == 0).all() and (pixels[:, : w // 2 - 1, 3] > 100).all()
    with pytest.raises(InputError, match="leave one of the two out"):
        write_heatmap_tiff(scores, tmp_path / "b.tiff", transparent=True, thumbnail=thumbnail())
    with pytest.raises(InputError, match=r"1 or more, got 0\.5"):
        write_heatmap_tiff(scores, tmp_path / "b.tiff", downsample=0.5)


def test_a_tiff_that_fails_half_way_leaves_nothing(scores, tmp_path):
    def stop(done, total):
        if done == 3:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_heatmap_tiff(scores, tmp_path / "a.tiff", downsample=2.0, progress=stop)
    assert not list(tmp_path.iterdir())


# PNG


def test_the_picture_lies_over_the_thumbnail_with_scale_bar_and_meaning(scores, tmp_path):
    figure = slide_figure(scores, thumbnail())
    texts = [t.get_text() for axes in figure.axes for t in axes.texts] + [t.get_text() for t in figure.texts]
    # 20 tiles of 64 micrometres are 1,280 wide
    assert texts.count("200 \N{MICRO SIGN}m") == 2
    assert "slide 7: tumour (87.5 %)" in texts
    words = " ".join(figure.axes[-1].get_xlabel().split())
    assert "how much the log-odds of 'tumour' would fall if the token were removed" in words
    shown = figure.axes[1].get_images()[0].get_array()
    h, w = shown.shape[:2]
    above, below, right = (
        shown[: int(h * 0.4), : w // 2 - 5],
        shown[int(h * 0.55) :, : w // 2 - 5],
        shown[:, w // 2 + 5 :],
    )
    assert (above[..., 2] > above[..., 0] + 0.1).all() and (below[..., 0] > below[..., 2] + 0.1).all()
    # without tokens the thumbnail is grey
    np.testing.assert_allclose(right.max(axis=2), right.min(axis=2))
    with Image.open(slide_heatmap(scores, tmp_path / "a.png", thumbnail())) as picture:
        assert picture.format == "PNG" and min(picture.size) > 600


def test_without_the_slide_the_tokens_have_an_outline_over_white(scores):
    bag_alone = dataclasses.replace(scores, slide_size=None, mpp=None, scores=np.full(150, 1e-9), probability=None)
    figure = slide_figure(bag_alone)
    texts = [t.get_text() for axes in figure.axes for t in axes.texts]
    assert texts == ["500 px"]
    shown = figure.axes[0].get_images()[0].get_array()
    assert (shown[0] == 1).all() and (shown[:, 0] == 1).all()
    with pytest.raises(InputError, match="needs the size of the slide"):
        slide_figure(bag_alone, thumbnail())


def test_a_thumbnail_of_another_slide_is_refused(scores):
    with pytest.raises(InputError, match=r"200 x 100 px does not show the slide of 5,120 x 3,840 px.*200 x 150"):
        slide_figure(scores, thumbnail()[:100])
    slide_figure(scores, thumbnail()[:149])


def test_lengths_of_scale_bars_are_round():
    assert [nice_length(x) for x in (1, 1.99, 2, 4.9, 5, 99, 100, 0.3)] == [1, 1, 2, 2, 5, 50, 100, pytest.approx(0.2)]
    assert [length_text(x) for x in (50, 500, 1000, 20000)] == [
        "50 \N{MICRO SIGN}m",
        "500 \N{MICRO SIGN}m",
        "1 mm",
        "20 mm",
    ]


def test_thumbnails_keep_their_mean_when_they_are_resized():
    picture = np.random.default_rng(0).random((60, 80, 3)).astype(np.float32)
    np.testing.assert_allclose(resized(picture, 30, 40).mean((0, 1)), picture.mean((0, 1)), rtol=1e-5)
    larger = resized(picture, 120, 80)
    assert larger.shape == (120, 80, 3) and larger.min() >= picture.min() and larger.max() <= picture.max()
    np.testing.assert_allclose(resized(np.ones((3, 4, 3), np.float32), 7, 9), 1)
