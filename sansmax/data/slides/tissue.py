"""Where a slide has tissue: Otsu's threshold on saturation, cleaned by physical area.

Glass is grey at any brightness, stained tissue is not: saturation separates them where brightness fails (shadows,
dust, uneven light). Near-black and ink are taken out by value and hue.
Source: N. Otsu, A threshold selection method from gray-level histograms, IEEE SMC 9 (1979).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sansmax.data.slides.scaled import read_scaled
from sansmax.data.slides.slide import Slide
from sansmax.errors import InputError
from sansmax.optional import need

# Micrometres of a working pixel; where a slide states none, its longer side becomes _MAX_SIDE such pixels
WORKING_MPP = 8.0
_MAX_SIDE = 4096
# Saturations of 255: below the first nothing is tissue, above the second everything is, whatever Otsu says
_LEAST, _SURE = 12, 28
# Classes whose means are nearer than this are noise of one
_APART = 12.0
# A median over 5 x 5 working pixels: dust and the noise of JPEG go, glands stay
_MEDIAN = 5
_BLACK = 50


@dataclass(frozen=True)
class Tissue:
    """A mask over the slide, True for tissue: cell (row, column) is a square of `downsample` level-0 pixels.

    Cells count from the slide's upper left corner; beyond the mask there is no tissue.
    """

    mask: np.ndarray
    downsample: float

    @property
    def share(self) -> float:
        """The share of tissue in the mask, from 0 to 1."""
        return float(self.mask.mean()) if self.mask.size else 0.0

    def covered(self, xy: np.ndarray, side: float) -> np.ndarray:
        """The share of tissue in squares: (n, 2) upper left corners and their side in level-0 pixels; (n,) float64.

        Exact: a cell that a square cuts counts by the part inside.
        """
        corners = np.asarray(xy, dtype=np.float64).reshape(-1, 2) / self.downsample
        step = side / self.downsample
        x, y = corners[:, 0], corners[:, 1]
        inside = self._upto(x + step, y + step) - self._upto(x, y + step) - self._upto(x + step, y) + self._upto(x, y)
        return np.clip(inside / step**2, 0, 1)

    def covered_grid(self, xs: np.ndarray, ys: np.ndarray, side: float) -> np.ndarray:
        """`covered` for all pairs of corners' `xs` and `ys`, as (len(ys), len(xs)); linear in the size of both."""
        step = side / self.downsample
        bands = []
        for edge in (0.0, step):
            rows, part = self._cell(np.asarray(ys) / self.downsample + edge, 0)
            bands.append((1 - part[:, None]) * self._sums[rows] + part[:, None] * self._sums[rows + 1])
        between = bands[1] - bands[0]
        ends = []
        for edge in (0.0, step):
            columns, part = self._cell(np.asarray(xs) / self.downsample + edge, 1)
            ends.append((1 - part) * between[:, columns] + part * between[:, columns + 1])
        return np.clip((ends[1] - ends[0]) / step**2, 0, 1)

    @cached_property
    def _sums(self) -> np.ndarray:
        """Tissue cells above and left of each corner of a cell: the integral image."""
        sums = np.zeros((self.mask.shape[0] + 1, self.mask.shape[1] + 1), np.int32)
        np.cumsum(self.mask, 0, dtype=np.int32, out=sums[1:, 1:])
        np.cumsum(sums[1:, 1:], 1, out=sums[1:, 1:])
        return sums

    def _cell(self, at: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
        at = np.clip(at, 0, self.mask.shape[axis])
        cell = np.minimum(at.astype(np.int64), self.mask.shape[axis] - 1)
        return cell, at - cell

    def _upto(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        # the mask is constant in a cell, so its integral is bilinear there: reading between corners is exact
        (column, right), (row, down) = self._cell(x, 1), self._cell(y, 0)
        upper = (1 - right) * self._sums[row, column] + right * self._sums[row, column + 1]
        lower = (1 - right) * self._sums[row + 1, column] + right * self._sums[row + 1, column + 1]
        return (1 - down) * upper + down * lower


def find_tissue(
    slide: Slide,
    *,
    working_mpp: float = WORKING_MPP,
    threshold: int | None = None,
    min_area_um2: float = 10_000.0,
    max_hole_um2: float = 20_000.0,
    reject_ink: bool = True,
) -> Tissue:
    """The tissue of a slide; a slide without any gives a mask that is False throughout.

    The slide is looked at in pixels of `working_mpp` micrometres. `threshold` (0 to 255) takes the place of Otsu's.
    Pieces smaller than `min_area_um2` square micrometres go, holes up to `max_hole_um2` are filled. With
    `reject_ink`, green and bright blue ink are no tissue; red ink cannot be told from stain. A slide that does not say
    how large its pixels are is looked at with 4,096 of them along its longer side, taken as 8 micrometres wide.
    """
    if threshold is not None and not 0 <= threshold <= 255:
        raise InputError(f"the threshold of saturation is a number from 0 to 255, {threshold} was given")
    downsample = working_downsample(slide, working_mpp)
    width, height = (max(1, int(side / downsample)) for side in slide.size)
    picture = read_scaled(slide, (0, 0), downsample, (width, height))
    # cells that jut out are like their neighbours: the white outside must not move the threshold
    spare = [
        (0, -int(-side // downsample) - here) for side, here in zip(slide.size[::-1], (height, width), strict=True)
    ]
    picture = np.pad(picture, [*spare, (0, 0)], mode="edge")
    mask = tissue_mask(picture, threshold, reject_ink)
    cell = (downsample * slide.mpp if slide.mpp is not None else working_mpp) ** 2
    return Tissue(_clean(mask, min_area_um2 / cell, max_hole_um2 / cell), downsample)


def whole_slide(slide: Slide) -> Tissue:
    """A mask that takes all of a slide for tissue, for pictures without background."""
    side = float(max(slide.size))
    return Tissue(np.ones((1, 1), bool), side)


def tissue_mask(picture: np.ndarray, threshold: int | None = None, reject_ink: bool = True) -> np.ndarray:
    """True where an RGB picture (h, w, 3) uint8 is stained; not cleaned by area."""
    cv2 = need("cv2", "slides")
    hue, saturation, value = cv2.split(cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2HSV))
    size = min(_MEDIAN, (min(saturation.shape) - 1) // 2 * 2 + 1)
    smooth = cv2.medianBlur(saturation, size) if size > 1 else saturation
    # black has any saturation at all: it must not move the threshold
    seen = value >= _BLACK
    limit = saturation_threshold(smooth[seen]) if threshold is None else threshold
    mask = (smooth > limit) & seen
    if reject_ink:
        mask &= ~_ink(hue, saturation)
    return mask


def saturation_threshold(saturation: np.ndarray) -> int:
    """The saturation (0 to 255) above which there is tissue, by Otsu; a blank picture's noise stays below it."""
    flat = np.ascontiguousarray(saturation).reshape(1, -1)
    if flat.size == 0:
        return _SURE
    counts = need("cv2", "slides").calcHist([flat], [0], None, [256], [0, 256]).reshape(-1).astype(np.float64)
    values = np.arange(256)
    below, above = np.cumsum(counts), counts.sum() - np.cumsum(counts)
    sums = np.cumsum(counts * values)
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = (sums[-1] - sums) / above - sums / below
        between = np.where((below > 0) & (above > 0), below * above * apart**2, -1)
    best = int(between.argmax())
    if between[best] <= 0 or apart[best] < _APART:
        return _SURE
    # where several thresholds are as good, as in an empty gap, the middle of them
    same = np.flatnonzero(between >= between[best] * (1 - 1e-12))
    return int(np.clip(round(float(same.mean())), _LEAST, _SURE))


def working_downsample(slide: Slide, working_mpp: float = WORKING_MPP) -> float:
    """Level-0 pixels per cell of the mask that `find_tissue` makes."""
    if slide.mpp is None:
        return max(1.0, max(slide.size) / _MAX_SIDE)
    # two working sides at most: a mistaken resolution must not ask for all the pixels at once
    return max(1.0, working_mpp / slide.mpp, max(slide.size) / (4 * _MAX_SIDE))


def _ink(hue: np.ndarray, saturation: np.ndarray) -> np.ndarray:
    """Green, and blue brighter than stains are. OpenCV's hue runs from 0 to 179."""
    green = (hue >= 35) & (hue <= 90) & (saturation > 40)
    blue = (hue > 90) & (hue <= 118) & (saturation > 150)
    return green | blue


def _clean(mask: np.ndarray, least: float, largest_hole: float) -> np.ndarray:
    holes = _pieces_within(~mask, largest_hole)
    # a hole is closed in: what touches the border is background
    mask = mask | holes
    return mask & ~_pieces_within(mask, np.nextafter(least, 0), border=True)


def _pieces_within(mask: np.ndarray, area: float, border: bool = False) -> np.ndarray:
    """The connected pieces of at most `area` cells; those at the border only where `border`."""
    cv2 = need("cv2", "slides")
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    small = stats[:, cv2.CC_STAT_AREA] <= area
    small[0] = False
    if not border and count > 1:
        edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
        small[np.unique(edge)] = False
    return small[labels]
