"""Scores of a slide's tokens as a pyramidal TIFF that slide viewers lay over the slide or open by itself."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from sansmax.errors import InputError
from sansmax.files import replacing
from sansmax.report.heatmap import brightest, colours, pale, robust_limit
from sansmax.report.pictures import area_mean, as_rgb
from sansmax.report.score_raster import ScoreRaster
from sansmax.report.slide_scores import SlideScores

TILE = 256
# a viewer shows at least so many pixels along the longer side; more per token than that tells nothing
LEAST_SIDE = 2048
SMALLEST_LEVEL = 512


def write_heatmap_tiff(
    scores: SlideScores,
    path: str | Path,
    *,
    downsample: float | None = None,
    thumbnail: np.ndarray | None = None,
    transparent: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """A tiled BigTIFF of the coloured scores over the whole slide, with levels that each halve the one before.

    A pixel of its first level is `downsample` level-0 pixels wide; without it, tokens become squares of whole pixels
    such that the longer side has at least 2,048. Each level is the exact mean of the scores of its pixels. Where there
    is no token it is white, the pale `thumbnail` `(h, w, 3)` of the whole slide, or `transparent`. The resolution tags
    hold the pixel size where `mpp` is known, and the description what the colours mean, as JSON. Levels are written a
    row of tiles at a time.

    Raises InputError for scores without coordinates and for a thumbnail that shall be transparent.
    """
    import tifffile

    if transparent and thumbnail is not None:
        raise InputError("a heat map is transparent or lies over a thumbnail; leave one of the two out")
    downsample = downsample or default_downsample(scores)
    if downsample < 1:
        raise InputError(f"downsample is level-0 pixels per pixel, 1 or more, got {downsample:g}")
    levels = level_downsamples(extent(scores), downsample)
    painter = _Painter(scores, thumbnail, transparent)
    steps = _Steps(sum(-(-_size(scores, d)[1] // TILE) for d in levels), progress)
    with replacing(path) as temporary, tifffile.TiffWriter(temporary, bigtiff=True) as writer:
        for number, level in enumerate(levels):
            width, height = _size(scores, level)
            # centimetres: the unit in which viewers read the size of a pixel from tags
            per_cm = None if scores.mpp is None else 1e4 / (scores.mpp * level)
            writer.write(
                painter.tiles(level, steps),
                shape=(height, width, painter.channels),
                dtype=np.uint8,
                tile=(TILE, TILE),
                photometric="rgb",
                extrasamples=["unassalpha"] if transparent else None,
                compression="adobe_deflate",
                resolution=None if per_cm is None else (per_cm, per_cm),
                resolutionunit=None if per_cm is None else "CENTIMETER",
                subfiletype=1 if number else 0,
                description=None if number else painter.description(downsample),
                software=False,
                metadata=None,
            )
    return Path(path)


def extent(scores: SlideScores) -> tuple[int, int]:
    """Width and height in level-0 pixels of what is drawn: the slide, or where its size is unknown all up to the last
    token. InputError without coordinates."""
    if scores.xy is None or scores.side is None:
        raise InputError(
            f"{scores.slide_id}: the tokens have no coordinates, so there is no picture; write the array (h5), or make "
            "a bag with coordinates"
        )
    if scores.slide_size is not None:
        return scores.slide_size
    width, height = np.ceil(scores.xy.max(axis=0) + scores.side).astype(int)
    return int(width), int(height)


def default_downsample(scores: SlideScores) -> float:
    """Level-0 pixels per pixel such that a token is a whole number of pixels, the longer side at least 2,048 px."""
    longest = max(extent(scores))
    assert scores.side is not None
    pixels = max(1, math.ceil(LEAST_SIDE * scores.side / longest))
    return max(1.0, scores.side / pixels)


def level_downsamples(size: tuple[int, int], first: float) -> list[float]:
    """Level-0 pixels per pixel of each level, down to the first whose longer side has at most 512 px."""
    levels = [first]
    while max(size) / levels[-1] > SMALLEST_LEVEL:
        levels.append(2 * levels[-1])
    return levels


def _size(scores: SlideScores, downsample: float) -> tuple[int, int]:
    width, height = (max(1, math.ceil(side / downsample - 1e-9)) for side in extent(scores))
    return width, height


class _Steps:
    """Counts rows of tiles over all levels."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def tick(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


class _Painter:
    """Coloured tiles of any level; one limit of colour for all levels, so that zooming changes no meaning."""

    def __init__(self, scores: SlideScores, thumbnail: np.ndarray | None, transparent: bool) -> None:
        self.scores, self.transparent = scores, transparent
        self.limit = robust_limit(scores.scores)
        self.below: np.ndarray | None = None
        self.shown: np.ndarray | None = None
        if thumbnail is not None:
            picture = as_rgb(thumbnail)
            self.below = pale(picture, brightest(picture)).astype(np.float32)
        self.channels = 4 if transparent else 3
        self.table = colours()(np.linspace(0, 1, 1025))[:, :3].astype(np.float32)

    def tiles(self, downsample: float, steps: _Steps) -> Iterator[np.ndarray]:
        """Tiles in reading order; those of the right and lower edge are filled up."""
        scores, size = self.scores, _size(self.scores, downsample)
        assert scores.xy is not None and scores.side is not None
        raster = ScoreRaster(scores.xy, scores.scores, scores.side, downsample=downsample, size=size)
        # levels smaller than the thumbnail show its area means, larger ones repeat its pixels
        self.shown = None if self.below is None else area_mean(self.below, size[1], size[0])
        for first, mean, share in raster.bands(TILE):
            band = self.painted(mean, share, first, size)
            fill = TILE * -(-size[0] // TILE) - size[0]
            band = np.pad(band, ((0, TILE - len(band)), (0, fill), (0, 0)), mode="edge")
            steps.tick()
            for x in range(0, band.shape[1], TILE):
                yield np.ascontiguousarray(band[:, x : x + TILE])

    def painted(self, mean: np.ndarray, share: np.ndarray, first: int, size: tuple[int, int]) -> np.ndarray:
        """One band as uint8 `(rows, width, channels)`."""
        part = (np.where(share > 0, mean, 0) / self.limit).clip(-1, 1)
        colour = self.table[np.rint((part + 1) * 512).astype(np.int64)]
        # strong scores hide what is below, weak ones let it through
        alpha = (share * np.where(share > 0, 0.86 * np.abs(part) ** 0.6, 0)).astype(np.float32)[..., None]
        if self.transparent:
            return np.rint(255 * np.concatenate((colour, alpha), axis=2)).astype(np.uint8)
        return np.rint(255 * ((1 - alpha) * self.background(first, mean.shape, size, share) + alpha * colour)).astype(
            np.uint8
        )

    def background(self, first: int, shape: tuple[int, ...], size: tuple[int, int], share: np.ndarray) -> np.ndarray:
        """What lies below the rows from `first` on: the pale thumbnail, or white and light grey where tokens are."""
        if self.shown is None:
            return np.repeat(1 - 0.1 * share[..., None].astype(np.float32), 3, axis=2)
        rows = (np.arange(first, first + shape[0]) + 0.5) * self.shown.shape[0] / size[1]
        columns = (np.arange(shape[1]) + 0.5) * self.shown.shape[1] / size[0]
        return self.shown[rows.astype(np.int64)[:, None], columns.astype(np.int64)[None, :]]

    def description(self, downsample: float) -> str:
        """What a reader of the file should know, as JSON in ASCII."""
        scores = self.scores
        about = {
            "slide_id": scores.slide_id,
            "class": scores.class_name,
            "method": scores.method,
            "meaning": scores.meaning,
            "full_colour_at": self.limit,
            "positive": "red",
            "negative": "blue",
            "level0_pixels_per_pixel": downsample,
            "level0_mpp": scores.mpp,
        }
        return json.dumps(about)
