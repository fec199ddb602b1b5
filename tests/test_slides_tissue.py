"""Tissue is found where it is, measured exactly, and survives the way to QuPath and back."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from sansmax.data.slides.geojson import read_tissue, write_tissue
from sansmax.data.slides.opening import open_slide
from sansmax.data.slides.picture_reader import ArraySlide
from sansmax.data.slides.tissue import Tissue, find_tissue, saturation_threshold
from sansmax.errors import InputError

DATA = Path(os.environ.get("SANSMAX_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
PINK, GLASS = (215, 140, 180), (243, 242, 244)


def real(name):
    """A file of the real data, or a skipped test with the reason."""
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is not there; name the folder of the real data by SANSMAX_TEST_DATA")
    return DATA / name


def glass(height=800, width=1000, colour=GLASS, noise=3.0, seed=0):
    rng = np.random.default_rng(seed)
    return (np.array(colour) + rng.normal(0, noise, (height, width, 3))).clip(0, 255).astype(np.uint8)


def random_mask(seed, shape=(37, 53), share=0.5):
    return np.random.default_rng(seed).random(shape) < share


@pytest.mark.parametrize("seed", range(3))
def test_covered_is_the_mean_of_the_mask_under_a_square(seed):
    tissue = Tissue(random_mask(seed), 8.0)
    # an eighth of a cell: squares with corners on this lattice are means of whole entries
    fine = np.pad(np.kron(tissue.mask, np.ones((8, 8))), 200)
    rng = np.random.default_rng(seed)
    xy = rng.integers(-150, 400, (300, 2))
    for side in (1, 5, 8, 60, 150):
        wanted = [fine[y + 200 : y + 200 + side, x + 200 : x + 200 + side].mean() for x, y in xy]
        here = [k for k, (x, y) in enumerate(xy) if max(x, y) + side < 400]
        np.testing.assert_allclose(tissue.covered(xy, side)[here], np.array(wanted)[here], atol=1e-9)
        xs, ys = np.unique(xy[:40, 0]), np.unique(xy[:40, 1])
        pairs = np.stack(np.meshgrid(xs, ys), -1).reshape(-1, 2)
        np.testing.assert_allclose(tissue.covered_grid(xs, ys, side).ravel(), tissue.covered(pairs, side), atol=1e-9)


def test_covered_counts_parts_of_cells():
    tissue = Tissue(np.array([[True, False], [False, False]]), 10.0)
    np.testing.assert_allclose(tissue.covered(np.array([[5, 5], [-5, -5], [8, 0], [-30, 0]]), 10), [0.25, 0.25, 0.2, 0])
    assert tissue.share == 0.25


def test_tissue_is_found_where_it_was_put():
    pixels = glass(1600, 2000)
    pixels[400:1200, 300:1500] = glass(800, 1200, PINK, 25, 1)
    tissue = find_tissue(ArraySlide(pixels, mpp=1.0))
    assert tissue.downsample == 8.0 and tissue.mask.shape == (200, 250)
    wanted = np.zeros((200, 250), bool)
    wanted[50:150, 37:188] = True
    assert (tissue.mask != wanted).mean() < 0.005


@pytest.mark.parametrize("mpp", [None, 0.5])
@pytest.mark.parametrize("colour", [GLASS, (255, 255, 255), (246, 240, 222), (200, 200, 200), (0, 0, 0)])
def test_a_blank_slide_has_no_tissue(colour, mpp):
    tissue = find_tissue(ArraySlide(glass(900, 1100, colour, 4.0), mpp=mpp))
    assert tissue.share == 0.0 and not tissue.mask.any()
    assert tissue.covered(np.array([[0, 0]]), 256).tolist() == [0.0]


def test_a_slide_that_is_all_tissue_is_not_halved():
    pixels = glass(800, 800, PINK, 10)
    pixels[:, :400] = glass(800, 400, (130, 80, 150), 10)
    assert find_tissue(ArraySlide(pixels, mpp=1.0)).share == 1.0


def test_specks_go_and_holes_close_by_physical_area():
    pixels = glass(2000, 2000, PINK, 5)
    pixels[:, 1000:] = glass(2000, 1000)
    pixels[200:280, 1400:1480] = PINK
    pixels[600:760, 1400:1560] = PINK
    pixels[200:320, 200:320] = GLASS
    pixels[600:1000, 200:600] = GLASS
    # at 1 micrometre a pixel: a speck of 6,400 and one of 25,600, a hole of 14,400 and one of 160,000
    tissue = find_tissue(ArraySlide(pixels, mpp=1.0))

    def share(x, y, side):
        return tissue.covered(np.array([[x, y]]), side)[0]

    assert share(1400, 200, 80) == 0 and share(1416, 616, 128) == 1
    assert share(200, 200, 120) == 1 and share(220, 620, 360) == 0
    # half the size in micrometres: a quarter of the area
    small = find_tissue(ArraySlide(pixels, mpp=0.5))
    assert small.covered(np.array([[1400, 600]]), 160)[0] == 0
    kept = find_tissue(ArraySlide(pixels, mpp=1.0), min_area_um2=0, max_hole_um2=0)
    assert kept.covered(np.array([[1416, 216]]), 48)[0] == 1 and kept.covered(np.array([[224, 224]]), 72)[0] == 0


@pytest.mark.parametrize("ink", [(40, 150, 70), (20, 90, 200), (15, 15, 20)])
def test_ink_and_black_are_no_tissue(ink):
    pixels = glass(1000, 1500)
    pixels[300:700, 200:600] = glass(400, 400, PINK, 20)
    pixels[300:700, 900:1300] = ink
    tissue = find_tissue(ArraySlide(pixels, mpp=1.0))
    assert tissue.covered(np.array([[220, 320]]), 360)[0] == 1
    assert tissue.covered(np.array([[920, 320]]), 360)[0] == 0


def test_pale_tissue_on_yellowish_glass_is_found():
    pixels = glass(1000, 1000, (246, 243, 232), 3)
    pixels[200:800, 200:800] = glass(600, 600, (230, 190, 210), 6)
    tissue = find_tissue(ArraySlide(pixels, mpp=1.0))
    assert 0.34 < tissue.share < 0.38


@pytest.mark.parametrize("seed", range(4))
def test_the_threshold_is_that_of_otsu(seed):
    rng = np.random.default_rng(seed)
    values = np.concatenate([rng.normal(5, 2, 5000), rng.normal(30, 6, 3000)]).clip(0, 255).astype(np.uint8)
    between = []
    for t in range(256):
        low, high = values[values <= t].astype(float), values[values > t].astype(float)
        between.append(len(low) * len(high) * (high.mean() - low.mean()) ** 2 if len(low) and len(high) else -1)
    assert saturation_threshold(values) == int(np.argmax(between))


def test_a_given_threshold_takes_its_place():
    pixels = glass(400, 400, (230, 190, 210), 0)
    saturation = round(255 * 40 / 230)
    assert find_tissue(ArraySlide(pixels, mpp=1.0), threshold=saturation - 1).share == 1
    assert find_tissue(ArraySlide(pixels, mpp=1.0), threshold=saturation + 1).share == 0
    with pytest.raises(InputError, match="0 to 255"):
        find_tissue(ArraySlide(pixels), threshold=300)


@pytest.mark.real_data
def test_tissue_of_real_slides(monkeypatch):
    with open_slide(real("wsi/CMU-1-Small-Region.svs")) as slide:
        assert 0.3 < find_tissue(slide).share < 0.45
    monkeypatch.setattr("sansmax.data.slides.tissue._MAX_SIDE", 512)
    with open_slide(real("wsi/cptac_C3L-00601-26_pyramid_derived.tif")) as slide:
        tissue = find_tissue(slide)
        assert slide.mpp is None and max(tissue.mask.shape) == 512 and 0.28 < tissue.share < 0.36
        thumb = slide.thumbnail(256).astype(float)
        x, y = np.meshgrid(np.arange(thumb.shape[1]), np.arange(thumb.shape[0]))
        scale = slide.size[0] / thumb.shape[1]
        inside = tissue.covered(np.stack([x, y], -1).reshape(-1, 2) * scale, scale).reshape(x.shape)
        # tissue is darker in green than glass
        assert thumb[inside == 1][:, 1].mean() < 150 < 230 < thumb[inside == 0][:, 1].mean()


@pytest.mark.parametrize(("seed", "share"), [(0, 0.5), (1, 0.1), (2, 0.9), (3, 0.6)])
@pytest.mark.parametrize("downsample", [1.0, 16.032064128256512, 7.5])
def test_a_mask_survives_geojson_to_the_cell(tmp_path, seed, share, downsample):
    mask = random_mask(seed, (40, 31), share)
    write_tissue(Tissue(mask, downsample), tmp_path / "t.geojson")
    again = read_tissue(tmp_path / "t.geojson", (int(31 * downsample), int(40 * downsample)), downsample)
    np.testing.assert_array_equal(again.mask, mask)
    assert again.downsample == downsample


def test_the_file_is_what_qupath_opens(tmp_path):
    mask = np.zeros((10, 12), bool)
    mask[1:7, 2:9] = True
    mask[3:5, 4:6] = False
    mask[8, 10] = True
    write_tissue(Tissue(mask, 4.0), tmp_path / "t.geojson")
    said = json.loads((tmp_path / "t.geojson").read_text())
    assert said["type"] == "FeatureCollection" and len(said["features"]) == 2
    first, second = said["features"]
    assert first["properties"]["objectType"] == "annotation"
    assert first["properties"]["classification"]["name"] == "Tissue"
    assert first["geometry"]["type"] == "Polygon"
    outer, hole = first["geometry"]["coordinates"]
    assert sorted(map(tuple, outer[:-1])) == [(8, 4), (8, 28), (36, 4), (36, 28)] and outer[0] == outer[-1]
    assert sorted(map(tuple, hole[:-1])) == [(16, 12), (16, 20), (24, 12), (24, 20)] and len(hole) == 5
    assert len(second["geometry"]["coordinates"]) == 1


def test_an_empty_mask_is_an_empty_collection(tmp_path):
    write_tissue(Tissue(np.zeros((4, 5), bool), 2.0), tmp_path / "t.geojson")
    assert json.loads((tmp_path / "t.geojson").read_text())["features"] == []
    assert read_tissue(tmp_path / "t.geojson", (10, 8), 2.0).share == 0


def inside_polygon(x, y, ring):
    """Whether a point lies in a ring: the sum of the angles under which it sees the edges (definition)."""
    angles = np.unwrap(np.array([np.arctan2(b - y, a - x) for a, b in [*ring, ring[0]]]))
    return abs(angles[-1] - angles[0]) > np.pi


def test_edited_outlines_are_read_by_the_centres_of_cells(tmp_path):
    rng = np.random.default_rng(4)
    angle = np.sort(rng.uniform(0, 2 * np.pi, 17))
    radius = rng.uniform(80, 190, 17)
    star = np.stack([220 + radius * np.cos(angle), 200 + radius * np.sin(angle)], -1)
    hole = np.array([[200.3, 180.2], [260.7, 190.1], [231.9, 230.5]])
    triangle = np.array([[390.5, 10.2], [430.1, 60.3], [380.2, 90.8]])
    cut = np.array([[60.0, 100.0], [200.0, 100.0], [200.0, 180.0], [60.0, 180.0]])

    def feature(kind, coordinates, **properties):
        return {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates}, "properties": properties}

    def closed(*rings):
        return [[*ring.tolist(), ring[0].tolist()] for ring in rings]

    drawn = [
        # drawn by hand, without a class
        feature("MultiPolygon", [closed(star, hole), closed(triangle)], objectType="annotation"),
        feature("Polygon", closed(cut), classification={"name": "Ignore*"}),
        feature("Point", [3, 4]),
    ]
    (tmp_path / "t.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": drawn}))
    tissue = read_tissue(tmp_path / "t.geojson", (450, 410), 6.0)
    assert tissue.mask.shape == (69, 75)
    for row in range(69):
        for column in range(75):
            x, y = 6 * (column + 0.5), 6 * (row + 0.5)
            wanted = (inside_polygon(x, y, star) and not inside_polygon(x, y, hole)) or inside_polygon(x, y, triangle)
            wanted = wanted and not inside_polygon(x, y, cut)
            assert tissue.mask[row, column] == wanted, (row, column)


@pytest.mark.parametrize("wrapped", ["list", "feature", "geometry", "collection"])
def test_whatever_geojson_allows_as_outermost_is_read(tmp_path, wrapped):
    geometry = {"type": "Polygon", "coordinates": [[[0, 0, 5], [40, 0, 5], [40, 20, 5], [0, 20, 5]]]}
    feature = {"type": "Feature", "geometry": geometry, "properties": None}
    whole = {
        "list": [feature, {"type": "Feature", "geometry": None, "properties": {}}],
        "feature": feature,
        "geometry": geometry,
        "collection": {"type": "GeometryCollection", "geometries": [geometry]},
    }[wrapped]
    (tmp_path / "t.geojson").write_text(json.dumps(whole))
    tissue = read_tissue(tmp_path / "t.geojson", (80, 40), 10.0)
    assert tissue.mask.tolist() == [[True] * 4 + [False] * 4] * 2 + [[False] * 8] * 2


def test_overlapping_annotations_are_one_tissue_and_outlines_may_leave_the_slide(tmp_path):
    squares = [[[[0, 0], [30, 0], [30, 30], [0, 30]]], [[[20, -50], [900, -50], [900, 40], [20, 40]]]]
    (tmp_path / "t.geojson").write_text(json.dumps({"type": "MultiPolygon", "coordinates": squares}))
    tissue = read_tissue(tmp_path / "t.geojson", (50, 50), 10.0)
    assert tissue.mask.astype(int).tolist() == [[1] * 5] * 3 + [[0, 0, 1, 1, 1]] + [[0] * 5]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no json", "no GeoJSON"),
        ("[1, 2]", "need a type"),
        ('{"features": []}', "need a type"),
        ('{"type": "Polygon", "coordinates": [[[1, 2], [3]]]}', "2 numbers"),
        ('{"type": "Polygon", "coordinates": [[[1, 2], [3, 4]]]}', "at least 3 points"),
        ('{"type": "Point", "coordinates": [1, 2]}', "none of them a polygon"),
    ],
)
def test_files_that_are_no_outlines_are_refused(tmp_path, text, said):
    (tmp_path / "t.geojson").write_text(text)
    with pytest.raises(InputError, match=rf"t\.geojson.*{said}"):
        read_tissue(tmp_path / "t.geojson", (100, 100), 10.0)
    with pytest.raises(InputError, match="no such file"):
        read_tissue(tmp_path / "gone.geojson", (100, 100), 10.0)
