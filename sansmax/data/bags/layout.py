"""What a layout of bags on the disk is: how it is told, read and written, and what it can hold."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sansmax.data.bags.bag import Bag
from sansmax.data.bags.contents import Contents


@dataclass(frozen=True)
class Known:
    """What the caller knows beside the file.

    mpp in micrometres per level-0 pixel, the side of a tile in level-0 pixels, the encoder's name, and CLAM's folder of
    patches; None where it is not known.
    """

    mpp: float | None = None
    tile_level0: float | None = None
    encoder: str | None = None
    patches: Path | None = None


@dataclass(frozen=True)
class Layout:
    """One way to keep a bag in a file.

    recognise  a few words on what was seen in the file, or None where it is another layout; InputError where it is
               this one but holds no features of tiles
    features   the name of the part with the features
    read       the bag, whose features may still be of any float dtype
    encoder    the encoder's name without reading the features
    write      writes a bag to a path; None where the layout is only read
    holds      the fields of `Bag` that it can hold, beside the features
    dtypes     dtypes of features that its readers take, the usual one first
    doubts     words on what its readers may not like in a bag
    place      the path of a slide's file below the target folder
    """

    name: str
    about: str
    recognise: Callable[[Contents], str | None]
    features: Callable[[Contents], str]
    read: Callable[[Contents, Known], Bag]
    encoder: Callable[[Contents], str | None] = lambda contents: None
    write: Callable[[Bag, Path], None] | None = None
    holds: frozenset[str] = frozenset()
    dtypes: tuple[str, ...] = ("float16", "float32")
    doubts: Callable[[Bag], list[str]] = lambda bag: []
    place: str = "{}.h5"
    # a second file of the same slide, written before the first
    beside: dict[str, Callable[[Bag, Path], None]] = field(default_factory=dict)
