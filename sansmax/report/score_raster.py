"""Scores of squares anywhere in the plane as a raster of any size: exact area means, a band of rows at a time."""

from collections.abc import Iterator

import numpy as np

# a pixel of which less than this is covered counts as empty: beneath it the mean is rounding
LEAST_COVER = 1e-4


class ScoreRaster:
    """The mean score of each pixel over the tokens that cover it, by covered area, exactly.

    A pixel is `downsample` level-0 pixels wide and high, its column 0 begins at `origin`; squares of side `side` have
    their upper left corners at `xy` `(N, 2)` and may overlap, be larger than a pixel or far smaller. Beyond one float64
    per token and axis, memory is that of the band asked for.
    """

    def __init__(
        self,
        xy: np.ndarray,
        scores: np.ndarray,
        side: float,
        *,
        downsample: float,
        size: tuple[int, int],
        origin: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        order = np.argsort(xy[:, 1], kind="stable")
        self.left = (xy[order, 0] - origin[0]) / downsample
        self.top = (xy[order, 1] - origin[1]) / downsample
        self.scores, self.side = np.asarray(scores, np.float64)[order], side / downsample
        self.width, self.height = size

    def band(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean score (NaN where empty) and covered share (0 to 1) of the rows [first, last), `(rows, width)` float64.

        Where squares overlap, each counts by its area.
        """
        begin = int(np.searchsorted(self.top, first - self.side, side="right"))
        end = int(np.searchsorted(self.top, last, side="left"))
        if begin >= end:
            return np.full((last - first, self.width), np.nan), np.zeros((last - first, self.width))
        part = slice(begin, end)
        top = self.top[part] - first
        rows, columns = last - first, self.width
        # the scores are shifted to their middle, so that sums of many that are alike lose no digits
        middle = float(self.scores[part].mean())
        ones = np.ones(end - begin)
        area = _covered(self.left[part], top, self.side, rows, columns, ones)
        total = _covered(self.left[part], top, self.side, rows, columns, self.scores[part] - middle)
        there = area > LEAST_COVER
        mean = np.full(area.shape, np.nan)
        mean[there] = total[there] / area[there] + middle
        return mean, np.where(there, area, 0).clip(0, 1)

    def bands(self, rows: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """First row, mean and share of bands of `rows` rows, from the top; the last may be lower."""
        for first in range(0, self.height, rows):
            yield first, *self.band(first, min(first + rows, self.height))

    def whole(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and share of the whole raster, for rasters that fit into memory."""
        return self.band(0, self.height)


def _covered(left: np.ndarray, top: np.ndarray, side: float, rows: int, columns: int, weight: np.ndarray) -> np.ndarray:
    """Sum over squares of `weight` times the area that each shares with each pixel, `(rows, columns)`.

    The area is a product of two overlaps of an interval with cells. The overlap with [a, infinity) steps up in two
    cells: by 1 - frac(a) in the cell of a, by the rest in the next. So each square adds 4 x 4 numbers to a table of
    differences, whose running sums are the answer, whatever the square's size.
    """
    grid = np.zeros((rows + 2) * (columns + 2))
    vertical = list(_steps(top, side, rows))
    for column, along_x in _steps(left, side, columns):
        for row, along_y in vertical:
            grid += np.bincount(row * (columns + 2) + column, weight * along_x * along_y, minlength=grid.size)
    table = grid.reshape(rows + 2, columns + 2)
    return table.cumsum(axis=0).cumsum(axis=1)[:rows, :columns]


def _steps(start: np.ndarray, side: float, cells: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cells and heights of the four steps of the overlap of [start, start + side) with the cells 0 ... `cells` - 1."""
    for edge, sign in ((start, 1.0), (start + side, -1.0)):
        inside = edge.clip(0, cells)
        cell = np.floor(inside).astype(np.int64)
        rest = inside - cell
        yield cell, sign * (1 - rest)
        yield cell + 1, sign * rest
