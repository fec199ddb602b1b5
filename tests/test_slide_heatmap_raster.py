"""Scores of squares as a raster: exact means by area, in bands of any height."""

import numpy as np
import pytest

from sansmax.report.score_raster import ScoreRaster


def overlap(start, end, cells):
    """How much of each cell [i, i + 1) the interval covers."""
    cell = np.arange(cells)
    return (np.minimum(end, cell + 1) - np.maximum(start, cell)).clip(0)


def mean_by_area(xy, scores, side, downsample, size, origin):
    """The definition: one square after the other."""
    area, total = np.zeros(size[::-1]), np.zeros(size[::-1])
    for (x, y), score in zip((xy - np.array(origin)) / downsample, scores, strict=True):
        shared = np.outer(overlap(y, y + side / downsample, size[1]), overlap(x, x + side / downsample, size[0]))
        area += shared
        total += score * shared
    return np.where(area > 1e-4, total / np.where(area > 1e-4, area, 1), np.nan), np.where(area > 1e-4, area, 0)


@pytest.mark.parametrize(
    ("side", "downsample"), [(37, 8.0), (16, 61.7), (13, 13.0), (200, 3.3)], ids=["larger", "far smaller", "equal", "x"]
)
@pytest.mark.parametrize("origin", [(0.0, 0.0), (-31.5, 17.0)])
def test_each_pixel_is_the_mean_of_the_scores_by_the_area_they_cover(side, downsample, origin):
    rng = np.random.default_rng(3)
    # anywhere: overlapping, beyond every edge, no order
    xy = rng.integers(-250, 900, (60, 2))
    scores = 5 + rng.standard_normal(60)
    size = (round(700 / downsample), round(500 / downsample))
    raster = ScoreRaster(xy, scores, side, downsample=downsample, size=size, origin=origin)
    mean, share = raster.whole()
    expected, area = mean_by_area(xy, scores, side, downsample, size, origin)
    np.testing.assert_allclose(mean, expected, rtol=1e-9, equal_nan=True)
    np.testing.assert_allclose(share, area.clip(0, 1), atol=1e-11)
    assert 0 < np.isfinite(mean).mean() <= 1


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_bands_of_any_height_are_the_whole(rows):
    rng = np.random.default_rng(5)
    xy, scores = rng.integers(0, 4000, (300, 2)), rng.standard_normal(300)
    raster = ScoreRaster(xy, scores, 150, downsample=29.0, size=(131, 127))
    mean, share = raster.whole()
    bands = list(raster.bands(rows))
    assert [first for first, _, _ in bands] == list(range(0, 127, rows))
    np.testing.assert_allclose(np.concatenate([b[1] for b in bands]), mean, rtol=1e-9, equal_nan=True)
    np.testing.assert_allclose(np.concatenate([b[2] for b in bands]), share, atol=1e-11)


def test_squares_of_whole_pixels_keep_their_scores_to_the_last_digits():
    grid = np.indices((40, 50)).reshape(2, -1).T[:, ::-1]
    scores = 1e6 + np.random.default_rng(1).standard_normal(2000)
    mean, share = ScoreRaster(grid * 32, scores, 32, downsample=16.0, size=(100, 80)).whole()
    np.testing.assert_allclose(mean, scores.reshape(40, 50).repeat(2, 0).repeat(2, 1), rtol=0, atol=1e-9)
    np.testing.assert_allclose(share, 1, atol=1e-12)


def test_where_no_square_is_there_is_no_score():
    mean, share = ScoreRaster(np.array([[900, 900]]), np.ones(1), 10, downsample=1.0, size=(20, 30)).whole()
    assert np.isnan(mean).all() and not share.any() and mean.shape == (30, 20)
