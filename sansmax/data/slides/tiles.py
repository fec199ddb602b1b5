"""Tiles of a physical size over the tissue of a slide, in the order in which a file is read."""

from dataclasses import dataclass

import numpy as np

from sansmax.data.slides.scaled import required_mpp
from sansmax.data.slides.slide import Slide
from sansmax.data.slides.tissue import Tissue
from sansmax.errors import InputError

# Corners whose share of tissue is computed at a time
_BAND = 4_000_000
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Tiles:
    """Squares on a slide.

    `xy` (n, 2) int64 are upper left corners in level-0 pixels, rows from the top, each from the left. `side` is their
    width in level-0 pixels; read, they have `px` x `px` pixels of `mpp` micrometres.
    """

    xy: np.ndarray
    side: int
    px: int
    mpp: float

    def __len__(self) -> int:
        return len(self.xy)

    @property
    def downsample(self) -> float:
        """Level-0 pixels per pixel as read."""
        return self.side / self.px


def tile_grid(
    slide: Slide,
    tissue: Tissue | None,
    *,
    tile_px: int = 256,
    tile_mpp: float = 0.5,
    overlap_px: int = 0,
    min_tissue: float = 0.25,
) -> Tiles:
    """Tiles of `tile_px` x `tile_px` pixels of `tile_mpp` micrometres where at least `min_tissue` of them is tissue.

    The side is rounded to whole level-0 pixels, and `Tiles.mpp` is what results. The grid begins at the slide's upper
    left corner and steps by `tile_px - overlap_px` pixels; tiles that jut out count what lies outside as no tissue.
    `tissue=None` takes every tile. Raises InputError for a slide without micrometres per pixel, naming `--mpp`.
    """
    if tile_px < 1 or not 0 <= overlap_px < tile_px:
        raise InputError(
            f"tiles of {tile_px} px cannot overlap by {overlap_px} px; 0 to {max(0, tile_px - 1)} is allowed"
        )
    if not tile_mpp > 0 or not 0 <= min_tissue <= 1:
        raise InputError(
            f"tiles have micrometres per pixel above 0 and a least share of tissue from 0 to 1, "
            f"{tile_mpp} and {min_tissue} were given"
        )
    mpp = required_mpp(slide)
    side = round(tile_px * tile_mpp / mpp)
    step = max(1, round((tile_px - overlap_px) * tile_mpp / mpp))
    if side < 1:
        raise InputError(
            f"tiles of {tile_px} px at {tile_mpp:g} micrometres are smaller than a pixel of {mpp:g}; widen them"
        )
    xs, ys = (np.arange(0, length, step, dtype=np.int64) for length in slide.size)
    return Tiles(_corners(xs, ys, side, tissue, min_tissue), side, tile_px, side * mpp / tile_px)


def _corners(xs: np.ndarray, ys: np.ndarray, side: int, tissue: Tissue | None, least: float) -> np.ndarray:
    parts = []
    rows = max(1, _BAND // len(xs))
    for row in range(0, len(ys), rows):
        band = ys[row : row + rows]
        if tissue is None:
            kept = np.ones((len(band), len(xs)), bool)
        else:
            share = tissue.covered_grid(xs, band, side)
            # sums of fractions: rounding must not cost a tile of exactly the least share, nor make tissue of nothing
            kept = (share >= least - _ROUNDING) & (share > _ROUNDING)
        down, across = np.nonzero(kept)
        parts.append(np.stack([xs[across], band[down]], -1))
    return np.concatenate(parts)
