"""A bag: the features of the tiles of one slide, with their places in level-0 pixels and in micrometres.

Points are (x, y). A tile is named by its upper left corner at level 0, the slide's full resolution.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from sansmax.errors import InputError

# two spellings of one resolution, as different scanners' tags and tables round it
MPP_AGREES = 0.01


@dataclass(frozen=True, eq=False)
class Bag:
    """The features of one slide's tiles and where the tiles lie.

    features     (N, D), floating point
    xy           (N, 2) int64, upper left corners in level-0 pixels
    xy_um        (N, 2) float64, the same in micrometres
    tile_level0  side of a tile in level-0 pixels; tile_um the same in micrometres
    mpp          micrometres per level-0 pixel; where it is known, both unit systems are filled in
    slide_size   (width, height) at level 0
    encoder      name of the network that made the features
    layout       the layout of the file it came from
    attributes   what else the file says; a neighbour's own words under its name ("trident", "stamp")

    What is not known is None. Raises InputError where the parts do not belong together.
    """

    slide_id: str
    features: np.ndarray
    xy: np.ndarray | None = None
    xy_um: np.ndarray | None = None
    tile_level0: float | None = None
    tile_um: float | None = None
    mpp: float | None = None
    slide_size: tuple[int, int] | None = None
    encoder: str | None = None
    layout: str = "memory"
    attributes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or self.features.dtype.kind != "f":
            raise InputError(
                f"slide {self.slide_id}: features are {self.features.dtype} {self.features.shape}; a bag has floating "
                "point numbers of the shape (tiles, width)"
            )
        for name in ("mpp", "tile_level0", "tile_um"):
            _check_positive(self.slide_id, name, getattr(self, name))
        self._set("xy", _points(self, self.xy, "coordinates", np.int64))
        self._set("xy_um", _points(self, self.xy_um, "coordinates in micrometres", np.float64))
        if self.mpp is not None:
            self._complete(self.mpp)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _complete(self, mpp: float) -> None:
        """Fills in the unit system that is missing."""
        if self.xy is not None and self.xy_um is None:
            self._set("xy_um", self.xy * float(mpp))
        elif self.xy is None and self.xy_um is not None:
            self._set("xy", np.rint(self.xy_um / mpp).astype(np.int64))
        if self.tile_level0 is not None and self.tile_um is None:
            self._set("tile_um", self.tile_level0 * mpp)
        elif self.tile_level0 is None and self.tile_um is not None:
            self._set("tile_level0", self.tile_um / mpp)

    def __len__(self) -> int:
        """The number of tiles."""
        return len(self.features)

    @property
    def width(self) -> int:
        """Numbers per tile."""
        return self.features.shape[1]

    @cached_property
    def grid(self) -> np.ndarray | None:
        """Upper left corners in units of tile sides, float32 (N, 2); None without coordinates or side of a tile."""
        if self.xy is not None and self.tile_level0 is not None:
            return (self.xy / self.tile_level0).astype(np.float32)
        if self.xy_um is not None and self.tile_um is not None:
            return (self.xy_um / self.tile_um).astype(np.float32)
        return None

    @cached_property
    def remarks(self) -> tuple[str, ...]:
        """What a person should know of this bag: no tiles, tiles outside the slide, sides of tiles that are guessed."""
        said = [] if len(self) else ["no tiles"]
        if outside := self.outside():
            width, height = self.slide_size or (0, 0)
            said.append(f"{outside} of {len(self)} tiles begin outside the slide of {width} x {height} px")
        if self.attributes.get("tile_from_spacing"):
            said.append(f"the side of a tile, {self.tile_level0:g} px, is taken from the spacing of the tiles")
        return tuple(said)

    def outside(self) -> int:
        """How many tiles begin outside the slide; 0 where its size or the coordinates are not known."""
        if self.slide_size is None or self.xy is None:
            return 0
        return int(((self.xy < 0) | (self.xy >= np.array(self.slide_size))).any(axis=1).sum())

    def with_mpp(self, mpp: float | None) -> "Bag":
        """The same bag with both unit systems; InputError where the bag knows another resolution."""
        if mpp is None:
            return self
        _check_positive(self.slide_id, "mpp", mpp)
        if self.mpp is not None:
            if not math.isclose(mpp, self.mpp, rel_tol=MPP_AGREES):
                raise InputError(
                    f"slide {self.slide_id}: the file says {self.mpp:g} micrometres per level-0 pixel, {mpp:g} was "
                    "given; leave --mpp away, or correct it"
                )
            return self
        return dataclasses.replace(self, mpp=float(mpp))


def _check_positive(slide_id: str, name: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise InputError(f"slide {slide_id}: {name} must be a positive number, it is {value}")


def _points(bag: Bag, points: np.ndarray | None, what: str, dtype: type) -> np.ndarray | None:
    if points is None:
        return None
    points = np.asarray(points)
    if points.shape != (len(bag.features), 2):
        raise InputError(
            f"slide {bag.slide_id}: {what} of the shape {points.shape} for {len(bag.features)} features; one (x, y) "
            "per feature is needed. Was the extraction stopped half way? Run it again for this slide"
        )
    if points.dtype.kind == "f" and not np.isfinite(points).all():
        raise InputError(f"slide {bag.slide_id}: {what} hold NaN or infinity; extract this slide again")
    if dtype is np.int64 and points.dtype.kind == "f":
        points = np.rint(points)
    return points.astype(dtype, copy=False)
