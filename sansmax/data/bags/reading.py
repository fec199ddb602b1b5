"""Reads one bag, whoever wrote it."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

from sansmax.data.bags.bag import Bag
from sansmax.data.bags.contents import open_contents
from sansmax.data.bags.finite import require_finite
from sansmax.data.bags.layout import Known
from sansmax.data.bags.layouts import LAYOUTS, Found, found_in
from sansmax.errors import InputError


def recognise(path: str | Path, *, trust_numpy: bool = False) -> Found:
    """The layout of a file, with words on what was seen in it; nothing of the features is read."""
    with open_contents(path, trust_numpy=trust_numpy, mmap=True) as contents:
        return found_in(contents)


class Header(NamedTuple):
    """What is known of a bag before its features are read: width and encoder are None where nothing says them."""

    found: Found
    tokens: int
    width: int | None
    encoder: str | None
    dtype: str


def read_header(path: str | Path, *, layout: str | None = None, trust_numpy: bool = False) -> Header:
    """Layout, number of tiles, width and encoder of a file; its features are not read."""
    with open_contents(path, trust_numpy=trust_numpy, mmap=True) as contents:
        found = found_in(contents, layout)
        kind = LAYOUTS[found.layout]
        name = kind.features(contents)
        shape = contents.shape(name)
        shape = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
        width = shape[1] if len(shape) == 2 and shape[1] else None
        dtype = str(contents.parts[name].dtype).removeprefix("torch.") if contents.kind != "npz" else ""
        return Header(found, shape[0] if shape else 0, width, kind.encoder(contents), dtype)


def read_bag(
    path: str | Path,
    *,
    layout: str | None = None,
    mpp: float | None = None,
    tile_level0: float | None = None,
    encoder: str | None = None,
    patches: str | Path | None = None,
    allow_nan: bool = False,
    trust_numpy: bool = False,
    mmap: bool = False,
) -> Bag:
    """The bag of one slide: features, places, encoder, and what else the file says.

    The layout is told by looking into the file; a given `layout` must be it. `mpp` (micrometres per level-0 pixel),
    `tile_level0` (side of a tile in level-0 pixels) and `encoder` supply what the file does not say, and must agree
    with what it says. `patches` is CLAM's folder of patches, which knows the side of a tile.

    With `mmap`, features that lie in one piece in their file (own layout, STAMP, GigaPath, .npy, .pt) are mapped
    instead of read; they are not searched for NaN. Others are read. `trust_numpy` lets numpy arrays inside a .pt
    file through. Raises InputError for a file that is damaged, holds no features of tiles, or holds NaN or infinity
    (unless `allow_nan`), and for what does not fit together.
    """
    known = Known(mpp, tile_level0, encoder, None if patches is None else Path(patches))
    with open_contents(path, trust_numpy=trust_numpy, mmap=mmap) as contents:
        found = found_in(contents, layout)
        bag = LAYOUTS[found.layout].read(contents, known)
    bag = _with_encoder(_with_tile(bag, tile_level0), encoder).with_mpp(mpp)
    if not (allow_nan or mmap):
        require_finite(bag.features, bag.slide_id)
    return bag


def _with_encoder(bag: Bag, encoder: str | None) -> Bag:
    if encoder is None or encoder == bag.encoder:
        return bag
    if bag.encoder is not None:
        raise InputError(
            f"slide {bag.slide_id}: its features are of the encoder {bag.encoder}, and {encoder} was given; leave "
            "--encoder away, or correct it"
        )
    return dataclasses.replace(bag, encoder=encoder)


def _with_tile(bag: Bag, tile_level0: float | None) -> Bag:
    if tile_level0 is None or bag.tile_level0 == tile_level0 or bag.xy is None:
        return bag
    if bag.tile_level0 is not None:
        raise InputError(
            f"slide {bag.slide_id}: its tiles are {bag.tile_level0:g} level-0 pixels, and {tile_level0:g} was given; "
            "leave --tile-level0 away, or correct it"
        )
    return dataclasses.replace(bag, tile_level0=float(tile_level0))
