"""The layout of this package: one HDF5 file per slide, features in one piece, places in both unit systems.

    features   (N, D) float16 or float32, contiguous: read at the speed of the disk, and mapped where that is wanted
    coords     (N, 2) int64, level-0 pixels of the upper left corners; TRIDENT's attributes, so that its readers work
    coords_um  (N, 2) float64, micrometres, where the resolution is known
    root       format, format_version, slide_id, encoder, encoder_revision, transform, level0_mpp, tile_level0, STAMP's
               extractor, tile_size_um, tile_size_px and feat_type; all that the bag's own file said, as JSON

STAMP's `unit` and `stamp_version` are left out on purpose: they would say that `coords` are micrometres.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from sansmax.data.bags import stamp, trident
from sansmax.data.bags.bag import Bag
from sansmax.data.bags.contents import Contents
from sansmax.data.bags.layout import Known, Layout
from sansmax.errors import InputError
from sansmax.optional import need

FORMAT = "sansmax bag"
FORMAT_VERSION = 1
# HDF5 keeps attributes of up to 64 KiB in the header of an object
_LARGEST = 60_000


def recognise(contents: Contents) -> str | None:
    """Words on a file of this package; refuses those of newer versions."""
    if contents.kind != "hdf5" or contents.attributes.get("format") != FORMAT:
        return None
    version = contents.attributes.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise InputError(
            f"{contents.path} is of version {version} of the layout, and this sansmax reads up to {FORMAT_VERSION}; "
            "update sansmax"
        )
    if "features" not in contents.parts:
        raise InputError(f"{contents.path} has no features; extract this slide again")
    return "sansmax: features in one piece, places in pixels and micrometres"


def read(contents: Contents, known: Known) -> Bag:
    """The bag of a file of this package."""
    said = contents.attributes
    width, height = said.get("level0_width"), said.get("level0_height")
    return Bag(
        slide_id=contents.slide_id,
        features=contents.features("features"),
        xy=contents.points("coords"),
        xy_um=contents.points("coords_um"),
        tile_level0=trident.number(said, "tile_level0"),
        tile_um=trident.number(said, "tile_size_um"),
        mpp=trident.number(said, "level0_mpp"),
        slide_size=(int(width), int(height)) if width and height else None,
        encoder=said.get("encoder"),
        layout="sansmax",
        attributes=json.loads(said.get("attributes") or "{}"),
    )


def _root(bag: Bag) -> dict[str, Any]:
    width, height = bag.slide_size or (None, None)
    kept = json.dumps(bag.attributes, default=_plain)
    if len(kept.encode()) > _LARGEST:
        raise InputError(
            f"slide {bag.slide_id}: its attributes take {len(kept)} characters, and {_LARGEST} fit; keep long texts in "
            "a file beside the bags"
        )
    names = ("extractor", "tile_size_px", "feat_type")
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "slide_id": bag.slide_id,
        "encoder": bag.encoder,
        "encoder_revision": bag.attributes.get("encoder_revision"),
        "transform": bag.attributes.get("transform"),
        "level0_mpp": bag.mpp,
        "level0_width": width,
        "level0_height": height,
        "tile_level0": bag.tile_level0,
        "tile_size_um": bag.tile_um,
        **{name: value for name, value in stamp.root_attributes(bag).items() if name in names},
        "attributes": kept,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    return str(value)


def write(bag: Bag, path: Path) -> None:
    """Writes the layout of this package."""
    h5py = need("h5py", "slides")
    with h5py.File(path, "w") as file:
        trident.set_attributes(file, {name: value for name, value in _root(bag).items() if value is not None})
        features = file.create_dataset("features", data=bag.features)
        trident.set_attributes(features, trident.features_attributes(bag))
        if bag.xy is not None:
            coords = file.create_dataset("coords", data=bag.xy)
            trident.set_attributes(coords, trident.coords_attributes(bag))
        if bag.xy_um is not None:
            file.create_dataset("coords_um", data=bag.xy_um).attrs["unit"] = "um"


LAYOUT = Layout(
    name="sansmax",
    about="sansmax: SLIDE.h5, both unit systems",
    recognise=recognise,
    features=lambda contents: "features",
    read=read,
    encoder=lambda contents: contents.attributes.get("encoder"),
    write=write,
    holds=frozenset(
        {"xy", "xy_um", "tile_level0", "tile_um", "mpp", "slide_size", "encoder", "attributes", "trident", "stamp"}
    ),
)
