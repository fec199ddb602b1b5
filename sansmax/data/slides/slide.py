"""What every slide gives, whatever file it comes from.

Coordinates are (x, y) in level-0 pixels, sizes are (width, height), arrays are (height, width, channels).
"""

from pathlib import Path
from typing import NamedTuple, Protocol, Self, runtime_checkable

import numpy as np

from sansmax.errors import InputError


class SlideError(InputError):
    """A slide that cannot be opened or read: which one, why, and what to do."""


class Level(NamedTuple):
    """One level of a pyramid: its size (width, height) in its own pixels, and level-0 pixels per pixel."""

    size: tuple[int, int]
    downsample: float


@runtime_checkable
class Slide(Protocol):
    """A picture that is read by region: the narrow waist of everything that looks at slides."""

    @property
    def name(self) -> str:
        """The file name without its suffix; compound suffixes such as `.ome.tif` go as one."""
        ...

    @property
    def path(self) -> Path | None:
        """The file; None for an array."""
        ...

    @property
    def kind(self) -> str:
        """What was found, for people."""
        ...

    @property
    def size(self) -> tuple[int, int]:
        """Width and height at level 0."""
        ...

    @property
    def levels(self) -> tuple[Level, ...]:
        """The levels, the finest first."""
        ...

    @property
    def mpp(self) -> float | None:
        """Micrometres per level-0 pixel; None where the file does not say."""
        ...

    def read(self, xy: tuple[int, int], level: int, size: tuple[int, int]) -> np.ndarray:
        """A region as (h, w, 3) uint8 RGB: upper left corner in level-0 pixels, size in pixels of the level.

        Outside the slide it is white. A region that cannot be decoded is a `SlideError`.
        """
        ...

    def thumbnail(self, max_side: int = 1024) -> np.ndarray:
        """The whole slide as (h, w, 3) uint8 RGB, the longer side `max_side` pixels at most."""
        ...

    def close(self) -> None:
        """Closes the file; reading afterwards is an error."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...
