"""What all readers share: windows beyond the edges, thumbnails, resolutions that can be meant."""

import math
from pathlib import Path
from typing import Self

import numpy as np

from sansmax.data.slides.scaled import read_scaled
from sansmax.data.slides.slide import Level, SlideError
from sansmax.errors import InputError

# Coarser than this (1270 dpi), a resolution tag speaks of printing, not of the object
COARSEST_MPP = 20.0
# x and y may differ by as much before pixels are not square
_SQUARE = 0.05


class LevelSlide:
    """The `Slide` around a reader: subclasses decode windows that lie inside one level (`window`)."""

    def __init__(self, name: str, path: Path | None, kind: str, sizes: list[tuple[int, int]], mpp: float | None):
        self.name, self.path, self.kind, self.mpp = name, path, kind, mpp
        self.size = sizes[0]
        self.levels = tuple(Level(size, _downsample(sizes[0], size)) for size in sizes)
        self._closed = False

    def window(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """(height, width, 3) uint8 RGB of a window inside the level, in pixels of the level."""
        raise NotImplementedError

    def read(self, xy: tuple[int, int], level: int, size: tuple[int, int]) -> np.ndarray:
        """A region as (h, w, 3) uint8 RGB: corner in level-0 pixels, size in pixels of the level; white outside.

        The corner is rounded to the nearest pixel of the level: pixels are those of the file, never interpolated.
        """
        if not 0 <= level < len(self.levels):
            raise InputError(f"level {level} of {self.name} was asked for, it has levels 0 to {len(self.levels) - 1}")
        if min(size) < 1:
            raise InputError(f"a region has at least 1 x 1 pixels, {size[0]} x {size[1]} was asked for")
        if self._closed:
            raise SlideError(f"{self.path or self.name} is closed; open it again")
        (width, height), scale = self.levels[level]
        x, y = (math.floor(v / scale + 0.5) for v in xy)
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + size[0], width), min(y + size[1], height)
        if (x0, y0, x1, y1) == (x, y, x + size[0], y + size[1]):
            return np.ascontiguousarray(self.window(level, x, y, *size))
        region = np.full((size[1], size[0], 3), 255, np.uint8)
        if x0 < x1 and y0 < y1:
            region[y0 - y : y1 - y, x0 - x : x1 - x] = self.window(level, x0, y0, x1 - x0, y1 - y0)
        return region

    def thumbnail(self, max_side: int = 1024) -> np.ndarray:
        """The whole slide as (h, w, 3) uint8 RGB, the longer side `max_side` pixels at most."""
        if max_side < 1:
            raise InputError(f"a thumbnail has at least 1 pixel, {max_side} was asked for")
        downsample = max(1.0, max(self.size) / max_side)
        width, height = (max(1, math.floor(side / downsample + 1e-9)) for side in self.size)
        return read_scaled(self, (0, 0), downsample, (width, height))

    def close(self) -> None:
        """Closes the file; reading afterwards is an error."""
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        mpp = "unknown" if self.mpp is None else f"{self.mpp:g}"
        return f"{self.name}: {self.kind}, {self.size[0]} x {self.size[1]}, {len(self.levels)} levels, mpp {mpp}"


def physical_mpp(x: float | None, y: float | None) -> float | None:
    """Micrometres per pixel from those along x and y; None where there is no one number that can be meant.

    That is where one is missing, not positive, coarser than 20 micrometres (a resolution for printing), or where
    both differ by more than a twentieth.
    """
    if x is None or y is None or not all(math.isfinite(v) and v > 0 for v in (x, y)):
        return None
    mean = (x + y) / 2
    return None if mean > COARSEST_MPP or abs(x - y) > _SQUARE * mean else mean


def spacing_mpp(x: float | None, y: float | None) -> float | None:
    """The same for the spacing that medical formats state in so many words; it may be as coarse as it likes."""
    if x is None or y is None or not all(math.isfinite(v) and v > 0 for v in (x, y)):
        return None
    return None if abs(x - y) > _SQUARE * (x + y) / 2 else (x + y) / 2


def rgb8(pixels: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, 3) of uint8 or uint16 as (H, W, 3) uint8."""
    if pixels.dtype.itemsize == 2:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if pixels.ndim == 2:
        return np.repeat(pixels[..., None], 3, -1)
    return pixels


def _downsample(full: tuple[int, int], size: tuple[int, int]) -> float:
    return (full[0] / size[0] + full[1] / size[1]) / 2
