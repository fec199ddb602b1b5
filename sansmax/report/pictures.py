"""Arrays of pixels made ready to look at: any dtype to RGB, large ones made small by area means."""

import numpy as np

from sansmax.errors import InputError


def area_mean(array: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """`array` `(h, w, ...)` at most as large as `(rows, columns)`, each cell the mean of what it covers.

    Works in float32 on whole rows at a time, so a memory-mapped picture is read once and never held whole.
    """
    h, w = array.shape[:2]
    rows, columns = min(rows, h), min(columns, w)
    if (rows, columns) == (h, w):
        return np.asarray(array, dtype=np.float32)
    tops, lefts = (np.arange(rows) * h) // rows, (np.arange(columns) * w) // columns
    widths = np.diff(lefts, append=w).reshape(-1, *[1] * (array.ndim - 2))
    out = np.empty((rows, columns, *array.shape[2:]), dtype=np.float32)
    for i, (top, bottom) in enumerate(zip(tops, np.append(tops[1:], h), strict=True)):
        band = np.asarray(array[top:bottom]).mean(axis=0, dtype=np.float32)
        out[i] = np.add.reduceat(band, lefts, axis=0) / widths
    return out


def fitted(height: int, width: int, longest: int) -> tuple[int, int]:
    """Height and width with the longer side at most `longest`, in the same proportion."""
    factor = min(1.0, longest / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """Grey or colour pixels of any dtype as float32 RGB from 0 to 1, `(h, w, 3)`.

    Integers are divided by the largest of their type, bool becomes black and white, floats must lie in 0 to 1.
    """
    pixels = np.asarray(pixels)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4):
        raise InputError(f"a picture is (height, width), (height, width, 1), (.., 3) or (.., 4), not {pixels.shape}")
    pixels = pixels[..., :3]
    if np.issubdtype(pixels.dtype, np.integer):
        unit = pixels.astype(np.float32) / np.iinfo(pixels.dtype).max
    else:
        unit = pixels.astype(np.float32)
        if unit.size and not (unit.min() >= -1e-3 and unit.max() <= 1.001):
            raise InputError(
                f"float pixels must lie in 0 to 1, given {unit.min():.4g} to {unit.max():.4g}; undo the normalisation"
            )
    return np.repeat(unit.clip(0, 1), 3 // unit.shape[2], axis=2)


def thumbnail(pixels: np.ndarray, longest: int) -> np.ndarray:
    """The picture as RGB, its longer side at most `longest` pixels."""
    rows, columns = fitted(pixels.shape[0], pixels.shape[1], longest)
    if (rows, columns) == pixels.shape[:2]:
        return as_rgb(pixels)
    small = area_mean(pixels, rows, columns)
    if np.issubdtype(pixels.dtype, np.integer):
        small = small / np.iinfo(pixels.dtype).max
    return as_rgb(small)


def stretched(grid: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """A grid of cells at `(rows, columns)`: repeated where it grows, area means where it shrinks."""
    small = area_mean(grid, rows, columns)
    i, j = ((np.arange(n) * m) // n for n, m in zip((rows, columns), small.shape, strict=True))
    return small[i[:, None], j[None, :]]
