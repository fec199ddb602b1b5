"""A slide at any resolution is the area mean of its pixels; tiles cover the plane once."""

import math
import time

import numpy as np
import pytest
import tifffile

from sansmax.data.slides.opening import open_slide
from sansmax.data.slides.picture_reader import ArraySlide
from sansmax.data.slides.scaled import best_level, read_scaled
from sansmax.data.slides.tiff_reader import TiffSlide
from sansmax.data.slides.tiles import tile_grid
from sansmax.data.slides.tissue import Tissue, whole_slide
from sansmax.errors import InputError

NOISE = np.random.default_rng(7).integers(0, 256, (157, 211, 3)).astype(np.uint8)


def area_mean(pixels, x, y, downsample, width, height):
    """The definition in float64: every pixel under an output counts by the area of it that is covered."""
    out = np.zeros((height, width, 3))
    for row in range(height):
        for column in range(width):
            left, top = x + column * downsample, y + row * downsample
            right, bottom = left + downsample, top + downsample
            for j in range(math.floor(top), math.ceil(bottom)):
                for i in range(math.floor(left), math.ceil(right)):
                    inside = 0 <= j < pixels.shape[0] and 0 <= i < pixels.shape[1]
                    value = pixels[j, i].astype(np.float64) if inside else 255.0
                    part = (min(j + 1, bottom) - max(j, top)) * (min(i + 1, right) - max(i, left))
                    out[row, column] += value * part / downsample**2
    return out


@pytest.mark.parametrize("downsample", [1, 2, 3, 1.7, 2.25, 5.31, 16, 0.5, 0.37])
@pytest.mark.parametrize("xy", [(0, 0), (31, 17), (-9, 120), (200, -6)])
def test_a_scaled_region_is_the_area_mean(downsample, xy):
    read = read_scaled(ArraySlide(NOISE), xy, downsample, (13, 11))
    assert read.dtype == np.uint8
    # half a step of rounding, and what float32 leaves
    assert abs(read - area_mean(NOISE, *xy, downsample, 13, 11)).max() <= 0.5 + 1e-3


def test_blocks_leave_no_seams(monkeypatch):
    whole = [read_scaled(ArraySlide(NOISE), (-3, 2), d, (60, 50)) for d in (1, 2, 2.3, 0.6)]
    monkeypatch.setattr("sansmax.data.slides.scaled._BLOCK", 16)
    for downsample, one in zip((1, 2, 2.3, 0.6), whole, strict=True):
        pieces = read_scaled(ArraySlide(NOISE), (-3, 2), downsample, (60, 50)).astype(int)
        # a mean that lies on the border of two numbers may be rounded either way
        assert abs(pieces - one).max() <= 1 and (pieces != one).mean() < 0.01


@pytest.fixture
def pyramid(tmp_path):
    """256 pixels with levels of 128 and 64, each of one colour of its own."""
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        for k, value in enumerate((10, 20, 30)):
            level = np.full((256 >> k, 256 >> k, 3), value, np.uint8)
            tiff.write(level, tile=(32, 32), photometric="rgb", subfiletype=int(k > 0), metadata=None)
    with TiffSlide(tmp_path / "a.tif", "a") as slide:
        yield slide


@pytest.mark.parametrize(
    ("downsample", "level"), [(0.5, 0), (1, 0), (1.9, 0), (1.99, 1), (2, 1), (3.9, 1), (4, 2), (50, 2)]
)
def test_the_coarsest_level_that_is_fine_enough_is_read(pyramid, downsample, level):
    assert best_level(pyramid, downsample) == level
    assert read_scaled(pyramid, (0, 0), downsample, (3, 3))[0, 0, 0] == 10 * (level + 1)


def test_regions_that_make_no_sense_are_refused():
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="downsample"):
            read_scaled(ArraySlide(NOISE), (0, 0), wrong, (3, 3))
    with pytest.raises(InputError, match="1 x 1"):
        read_scaled(ArraySlide(NOISE), (0, 0), 1, (3, 0))


def slide_of(width, height, mpp=0.25):
    return ArraySlide(np.broadcast_to(np.uint8(9), (height, width)), mpp=mpp)


@pytest.mark.parametrize(("px", "mpp"), [(16, 0.5), (7, 0.33), (256, 0.5)])
def test_tiles_without_overlap_cover_every_pixel_once(px, mpp):
    slide = slide_of(617, 433)
    tiles = tile_grid(slide, None, tile_px=px, tile_mpp=mpp)
    count = np.zeros((433 + tiles.side, 617 + tiles.side), int)
    for x, y in tiles.xy:
        count[y : y + tiles.side, x : x + tiles.side] += 1
    assert (count[:433, :617] == 1).all()
    assert tiles.side == round(px * mpp / 0.25) and tiles.mpp == tiles.side * 0.25 / px and tiles.px == px
    assert tiles.xy.dtype == np.int64
    # reading order
    assert (np.lexsort((tiles.xy[:, 0], tiles.xy[:, 1])) == np.arange(len(tiles))).all()


@pytest.mark.parametrize(("overlap", "least"), [(0, 0.25), (0, 0.0), (5, 0.5), (8, 1.0)])
def test_tiles_are_those_with_enough_tissue(overlap, least, monkeypatch):
    monkeypatch.setattr("sansmax.data.slides.tiles._BAND", 100)
    rng = np.random.default_rng(3)
    tissue = Tissue(np.kron(rng.random((11, 15)) < 0.5, np.ones((4, 4), bool)), 10.3)
    slide = slide_of(600, 450)
    tiles = tile_grid(slide, tissue, tile_px=16, tile_mpp=0.5, overlap_px=overlap, min_tissue=least)
    step = 2 * (16 - overlap)
    fine = np.zeros((700, 700))
    fine[:453, :618] = np.kron(tissue.mask, np.ones((103, 103)))[:4532, :6180].reshape(44 * 103, -1)[5::10, 5::10][
        :453, :618
    ]
    wanted = []
    for y in range(0, 450, step):
        for x in range(0, 600, step):
            share = tissue.covered(np.array([[x, y]]), 32)[0]
            if share > 1e-9 and share >= least - 1e-9:
                wanted.append((x, y))
            assert share == pytest.approx(fine[y : y + 32, x : x + 32].mean(), abs=0.05)
    assert tiles.xy.tolist() == [list(t) for t in wanted] and len(wanted) > 0


def test_no_tissue_gives_no_tiles_and_all_of_a_slide_gives_all():
    slide = slide_of(600, 450)
    assert tile_grid(slide, Tissue(np.zeros((5, 6), bool), 100), tile_px=16).xy.shape == (0, 2)
    every = tile_grid(slide, whole_slide(slide), tile_px=16, min_tissue=0.01)
    np.testing.assert_array_equal(every.xy, tile_grid(slide, None, tile_px=16).xy)


def test_tiles_need_a_resolution_and_sizes_that_make_sense(tmp_path):
    with pytest.raises(InputError, match="--mpp"):
        tile_grid(slide_of(100, 100, mpp=None), None)
    with pytest.raises(InputError, match="overlap by 16 px; 0 to 15"):
        tile_grid(slide_of(100, 100), None, tile_px=16, overlap_px=16)
    with pytest.raises(InputError, match="share of tissue"):
        tile_grid(slide_of(100, 100), None, min_tissue=1.5)
    with pytest.raises(InputError, match="smaller than a pixel"):
        tile_grid(slide_of(100, 100, mpp=100.0), None, tile_px=16)


def test_ten_gigapixels_in_tiles_of_16_take_seconds():
    mask = np.zeros((6250, 6250), bool)
    mask[1000:4000, 500:6000] = True
    start = time.process_time()
    tiles = tile_grid(slide_of(100_000, 100_000, mpp=0.25), Tissue(mask, 16.0), tile_px=16, tile_mpp=0.5 * 2)
    assert len(tiles) == (3000 * 5500) // 16
    assert time.process_time() - start < 10


def test_a_tile_read_is_the_area_under_it():
    slide = ArraySlide(NOISE, mpp=0.4)
    tiles = tile_grid(slide, None, tile_px=8, tile_mpp=0.9)
    x, y = (int(v) for v in tiles.xy[7])
    read = read_scaled(slide, (x, y), tiles.downsample, (tiles.px, tiles.px))
    assert abs(read - area_mean(NOISE, x, y, tiles.side / 8, 8, 8)).max() <= 0.5 + 1e-3


def test_coordinates_far_outside_are_white():
    with open_slide(NOISE) as slide:
        assert (read_scaled(slide, (10**8, -(10**8)), 3.3, (4, 4)) == 255).all()
