"""TRIDENT's bags: HDF5 with `features` and `coords`, whose attributes say the tiles in level-0 pixels.

Facts of the format: level-0 pixels are exact, magnifications are binned to 5, 10, 20, 40, 60 or 80; what is None is the
word 'None'; a slide without tissue has features of the shape (0,).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from sansmax.data.bags.bag import Bag
from sansmax.data.bags.contents import Contents
from sansmax.data.bags.layout import Known, Layout
from sansmax.errors import InputError
from sansmax.optional import need

# of the attributes of coords; any of them tells the layout
COORDS = (
    *("patch_size", "patch_size_level0", "level0_magnification", "target_magnification", "overlap"),
    *("name", "savetodir", "level0_width", "level0_height"),
)
# micrometres per pixel below which a scan has this magnification
_MAGNIFICATIONS = ((0.16, 80), (0.2, 60), (0.3, 40), (0.6, 20), (1.2, 10), (2.4, 5))
_ROWS_PER_CHUNK = 1024


def recognise(contents: Contents) -> str | None:
    """Words on a TRIDENT file; refuses embeddings of whole slides and files of coordinates alone."""
    if contents.kind != "hdf5" or "coords" not in contents.parts:
        return None
    coords = contents.attributes_of("coords")
    encoder = contents.attributes_of("features").get("encoder")
    if "patch_size_level0" not in coords and not (encoder and "savetodir" in contents.attributes_of("features")):
        return None
    if "features" not in contents.parts:
        raise InputError(
            f"{contents.path} holds TRIDENT's coordinates of tiles, no features; extract them with TRIDENT's --task "
            "feat, or with `sansmax tokenize`, and give that folder"
        )
    shape = contents.shape("features")
    if len(shape) == 1 and shape[0]:
        raise InputError(
            f"{contents.path} is one embedding of the whole slide ({shape[0]} numbers, TRIDENT's slide_features_*); "
            "features of tiles are needed, from a folder features_*"
        )
    return "TRIDENT: coordinates in level-0 pixels with their attributes"


def read(contents: Contents, known: Known) -> Bag:
    """The bag of a TRIDENT file."""
    said = contents.attributes_of("coords")
    features = contents.features("features")
    points = contents.points("coords")
    if not len(features):
        points = np.zeros((0, 2), np.int64)
    tile = number(said, "patch_size_level0")
    width, height = number(said, "level0_width"), number(said, "level0_height")
    return Bag(
        slide_id=contents.slide_id,
        features=features,
        xy=points,
        tile_level0=tile if tile is not None else known.tile_level0,
        mpp=number(said, "level0_mpp"),
        slide_size=(round(width), round(height)) if width and height else None,
        encoder=encoder_of(contents),
        layout="trident",
        attributes={"trident": {"coords": said, "features": contents.attributes_of("features")}},
    )


def encoder_of(contents: Contents) -> str | None:
    """The name of the patch encoder."""
    return contents.attributes_of("features").get("encoder")


def number(said: dict[str, Any], name: str) -> float | None:
    """A number among attributes, however it was written; None where it is missing."""
    value = said.get(name)
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        return None


def coords_attributes(bag: Bag) -> dict[str, Any]:
    """TRIDENT's attributes of `coords`: as the bag's file had them, else from what is known."""
    if kept := bag.attributes.get("trident", {}).get("coords"):
        return kept if bag.mpp is None else {**kept, "level0_mpp": bag.mpp}
    tile = bag.tile_level0
    pixels = number(bag.attributes, "tile_px") or number(bag.attributes.get("stamp", {}), "tile_size_px") or tile
    level0 = next((m for bound, m in _MAGNIFICATIONS if bag.mpp and bag.mpp < bound), None)
    target = level0 * pixels / tile if level0 and pixels and tile else None
    width, height = bag.slide_size or (None, None)
    said = {
        "patch_size": None if pixels is None else round(pixels),
        "patch_size_level0": whole(tile),
        "level0_magnification": level0,
        "target_magnification": whole(target),
        "overlap": round(number(bag.attributes, "overlap_px") or 0),
        "name": bag.slide_id,
        "savetodir": None,
        "level0_width": width,
        "level0_height": height,
    }
    return said if bag.mpp is None else {**said, "level0_mpp": bag.mpp}


def features_attributes(bag: Bag) -> dict[str, Any]:
    """TRIDENT's attributes of `features`."""
    kept = bag.attributes.get("trident", {}).get("features")
    return {**(kept or {"name": bag.slide_id, "savetodir": None}), "encoder": bag.encoder}


def whole(value: float | None) -> float | int | None:
    """An int where nothing is lost by it."""
    return int(value) if value is not None and float(value).is_integer() else value


def set_attributes(target: Any, said: dict[str, Any]) -> None:
    """Writes attributes as TRIDENT does: None as the word 'None', dictionaries as JSON."""
    for name, value in said.items():
        target.attrs[name] = json.dumps(value) if isinstance(value, dict) else "None" if value is None else value


def write(bag: Bag, path: Path) -> None:
    """Writes TRIDENT's layout, in chunks of many tiles: all of its readers read them, several times faster."""
    if bag.xy is None or (bag.tile_level0 is None and len(bag)):
        missing = "coordinates in level-0 pixels" if bag.xy is None else "the side of a tile"
        flag = "--mpp or --mpp-table" if bag.xy is None else "--tile-level0 or --patches"
        raise InputError(
            f"slide {bag.slide_id}: TRIDENT's layout needs {missing}, which the file does not say; give {flag}"
        )
    h5py = need("h5py", "slides")
    with h5py.File(path, "w") as file:
        features = grown(file, "features", bag.features, _ROWS_PER_CHUNK)
        set_attributes(features, features_attributes(bag))
        coords = grown(file, "coords", bag.xy, 16 * _ROWS_PER_CHUNK)
        set_attributes(coords, coords_attributes(bag))


def grown(file: Any, name: str, array: np.ndarray, rows: int) -> Any:
    """A data set in chunks of at most `rows` rows that can be appended to."""
    width = array.shape[1]
    if not width:
        return file.create_dataset(name, data=array.reshape(0))
    return file.create_dataset(name, data=array, chunks=(max(1, min(rows, len(array))), width), maxshape=(None, width))


LAYOUT = Layout(
    name="trident",
    about="TRIDENT: features_ENCODER/SLIDE.h5",
    recognise=recognise,
    features=lambda contents: "features",
    read=read,
    encoder=encoder_of,
    write=write,
    holds=frozenset({"xy", "tile_level0", "mpp", "slide_size", "encoder", "trident"}),
    dtypes=("float32", "float16"),
)
