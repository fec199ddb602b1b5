"""A slide at any resolution: regions of a wanted downsample, as area means of the best level.

An output pixel is the mean of what lies under it, pixels that it covers in part counted by that part: nothing is left
out, so there is no aliasing. Where a level has the wanted resolution, its pixels are given as they are.
"""

import itertools
import math
import warnings

import numpy as np

from sansmax.data.slides.slide import Slide, SlideError
from sansmax.errors import InputError

# Levels are sizes in whole pixels: one of 2.0002 serves a wish for 2
_SLACK = 0.01
# A region that drifts by less than this many pixels of the level is read as it is, not interpolated
_SNAP = 0.5
# The side of what is in memory at a time, in pixels of the level
_BLOCK = 4096


def required_mpp(slide: Slide, flag: str = "--mpp") -> float:
    """Micrometres per level-0 pixel; an `InputError` that names the flag to give where the slide does not say."""
    if slide.mpp is None:
        raise InputError(
            f"{slide.path or slide.name} does not say how many micrometres a pixel is wide; "
            f"pass {flag} with the value of the scanner (about 0.25 at 40x, 0.5 at 20x)"
        )
    return slide.mpp


def best_level(slide: Slide, downsample: float) -> int:
    """The coarsest level that is at least as fine as `downsample` level-0 pixels per pixel, within a hundredth."""
    return max(
        (k for k, level in enumerate(slide.levels) if level.downsample <= downsample * (1 + _SLACK)),
        key=lambda k: slide.levels[k].downsample,
        default=0,
    )


def read_scaled(slide: Slide, xy: tuple[float, float], downsample: float, size: tuple[int, int]) -> np.ndarray:
    """A region of `size` (width, height) output pixels, `downsample` level-0 pixels wide each: (h, w, 3) uint8 RGB.

    `xy` is the upper left corner in level-0 pixels. Outside the slide is white. A level that fails to decode there is
    replaced by the next finer one, with a warning that names it; where level 0 fails, it is a `SlideError`.
    """
    if not (downsample > 0 and math.isfinite(downsample)):
        raise InputError(f"the downsample must be a positive number, {downsample} was given")
    if min(size) < 1:
        raise InputError(f"a region has at least 1 x 1 pixels, {size[0]} x {size[1]} was asked for")
    coarsest = slide.levels[best_level(slide, downsample)].downsample
    usable = [k for k, level in enumerate(slide.levels) if level.downsample <= coarsest]
    order = sorted(usable, key=lambda k: -slide.levels[k].downsample)
    for place, level in enumerate(order):
        try:
            return _area_mean(slide, xy, level, downsample, size)
        except SlideError as e:
            if place + 1 == len(order):
                raise
            warnings.warn(
                f"{slide.path or slide.name}: level {level} cannot be read, level {order[place + 1]} is read in its "
                f"place ({e})",
                stacklevel=2,
            )
    raise AssertionError("a slide has a level")


def _area_mean(
    slide: Slide, xy: tuple[float, float], level: int, downsample: float, size: tuple[int, int]
) -> np.ndarray:
    width, height = size
    scale = slide.levels[level].downsample
    ratio = downsample / scale
    # the region in pixels of the level
    left, top = float(xy[0] / scale), float(xy[1] / scale)
    if abs(ratio - 1) * max(size) < _SNAP:
        left, top, ratio = float(round(left)), float(round(top)), 1.0
    out = np.empty((height, width, 3), np.uint8)
    # squares, not rows: tiles of the file that a cut runs through are decoded twice
    block = max(1, int(_BLOCK / ratio))
    for row, column in itertools.product(range(0, height, block), range(0, width, block)):
        rows, columns = (np.arange(at, min(at + block, end) + 1) for at, end in ((row, height), (column, width)))
        edges_y, edges_x = top + ratio * rows, left + ratio * columns
        out[row : rows[-1], column : columns[-1]] = _block_mean(slide, level, edges_x, edges_y)
    return out


def _block_mean(slide: Slide, level: int, edges_x: np.ndarray, edges_y: np.ndarray) -> np.ndarray:
    """The means between edges given in pixels of the level, rounded."""
    (x, x_end), (y, y_end) = ((math.floor(e[0]), math.ceil(e[-1])) for e in (edges_x, edges_y))
    pixels = _read_level(slide, level, x, y, max(1, x_end - x), max(1, y_end - y))
    if pixels.shape[:2] == (len(edges_y) - 1, len(edges_x) - 1) and edges_x[0] == x and edges_y[0] == y:
        return pixels
    return np.rint(_means(_means(pixels, edges_y - y, 0), edges_x - x, 1))


def _read_level(slide: Slide, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
    """A window given in pixels of the level."""
    scale = slide.levels[level].downsample
    return slide.read((round(x * scale), round(y * scale)), level, (width, height))


def _means(pixels: np.ndarray, edges: np.ndarray, axis: int) -> np.ndarray:
    """The means between consecutive `edges` along an axis, pixels cut by an edge counted in part; float32."""
    count = pixels.shape[axis]
    edges = np.clip(edges, 0, count)
    step = edges[1] - edges[0]
    whole = round(float(step))
    aligned = abs(edges[0] - round(float(edges[0]))) < 1e-9 and abs(step - whole) < 1e-9
    if aligned and whole >= 1:
        first = round(float(edges[0]))
        kept = pixels[(slice(None),) * axis + (slice(first, first + whole * (len(edges) - 1)),)]
        parted = kept.reshape(*kept.shape[:axis], len(edges) - 1, whole, *kept.shape[axis + 1 :])
        return parted.mean(axis + 1, dtype=np.float32)
    return _fractional_means(pixels, edges, axis)


def _fractional_means(pixels: np.ndarray, edges: np.ndarray, axis: int) -> np.ndarray:
    low, high = edges[:-1], edges[1:]
    first = np.floor(low).astype(np.int64)
    along = [1] * pixels.ndim
    along[axis] = -1
    total = np.zeros(pixels.shape[:axis] + (len(low),) + pixels.shape[axis + 1 :], np.float32)
    # the k-th pixel under every output at once, by its part: as many passes as pixels lie under one
    for k in range(int(np.ceil(high - first).max())):
        at = first + k
        weight = (np.minimum(high, at + 1) - np.maximum(low, at)).clip(0) / (high - low)
        under = np.take(pixels, np.minimum(at, pixels.shape[axis] - 1), axis)
        total += under * weight.astype(np.float32).reshape(along)
    return total
