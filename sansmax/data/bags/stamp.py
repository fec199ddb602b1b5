"""STAMP's bags: HDF5 with `feats` in float16 and `coords` in micrometres; attributes on the root of the file.

Three generations are read: tile_size_um (2.1 and later), tile_size with unit 'um' (2.0), and none of them (version 1:
coordinates in pixels of 224 per tile of 256 micrometres). STAMP refuses files of a newer version than itself.
"""

from pathlib import Path
from typing import Any

import numpy as np

from sansmax.data.bags.bag import Bag
from sansmax.data.bags.contents import Contents
from sansmax.data.bags.layout import Known, Layout
from sansmax.data.bags.tile_size import tile_from_spacing
from sansmax.data.bags.trident import number
from sansmax.errors import InputError
from sansmax.optional import need

# old enough for every reader of this layout
VERSION = "2.1.0"
# the same encoder in TRIDENT's words and in STAMP's, whose slide encoders look for them
_EXTRACTORS = {
    "uni_v1": "mahmood-uni",
    "uni_v2": "mahmood-uni2",
    "conch_v1": "mahmood-conch",
    "conch_v15": "mahmood-conch1_5",
    "hoptimus0": "h-optimus-0",
    "hoptimus1": "h-optimus-1",
}
_KNOWN = {
    *("ctranspath", "chief-ctranspath", "mahmood-conch", "mahmood-conch1_5", "mahmood-uni", "mahmood-uni2"),
    *("dino-bloom", "gigapath", "h-optimus-0", "h-optimus-1", "virchow", "virchow_full", "virchow2", "musk", "mstar"),
}
_HISTORIC_PX, _HISTORIC_UM = 224, 256.0


def recognise(contents: Contents) -> str | None:
    """Words on a STAMP file; refuses embeddings of slides and patients."""
    if contents.kind != "hdf5" or not {"feats", "patch_embeddings"} & set(contents.parts):
        return None
    kind = contents.attributes.get("feat_type", "tile")
    shape = contents.shape(_features(contents))
    single = len(shape) == 1 or (shape[0] == 1 and "coords" not in contents.parts and "encoder" in contents.attributes)
    if kind in ("slide", "patient") or single:
        whose = kind if kind in ("slide", "patient") else "slide or patient"
        raise InputError(
            f"{contents.path} is one embedding of a whole {whose} by STAMP; features of tiles are needed, from the "
            "folder that `stamp preprocess` wrote"
        )
    if "coords" not in contents.parts:
        return "STAMP: features without coordinates"
    return f"STAMP: {_generation(contents)}"


def _features(contents: Contents) -> str:
    return "feats" if "feats" in contents.parts else "patch_embeddings"


def _generation(contents: Contents) -> str:
    said = contents.attributes
    if "tile_size_um" in said:
        return "coordinates in micrometres"
    if said.get("unit") == "um" and "tile_size" in said:
        return "coordinates in micrometres, of version 2.0"
    return "coordinates in 224 px per tile of 256 micrometres, of version 1"


def read(contents: Contents, known: Known) -> Bag:
    """The bag of a STAMP file."""
    points, tile_um = _micrometres(contents)
    return Bag(
        slide_id=contents.slide_id,
        features=contents.features(_features(contents)),
        xy_um=points,
        tile_um=tile_um,
        encoder=encoder_of(contents),
        layout="stamp",
        attributes={"stamp": contents.attributes},
    )


def _micrometres(contents: Contents) -> tuple[np.ndarray | None, float | None]:
    """Coordinates and side of a tile in micrometres."""
    said, points = contents.attributes, contents.points("coords")
    if points is None:
        return None, number(said, "tile_size_um")
    points = points.astype(np.float64)
    if (side := number(said, "tile_size_um")) is not None:
        return points, side
    side = number(said, "tile_size")
    if side is not None and said.get("unit") == "um":
        return points, side
    step = side if side is not None else tile_from_spacing(points)
    if step is not None and round(step) != _HISTORIC_PX:
        raise InputError(
            f"{contents.path} does not say the unit of its coordinates: neither tile_size_um, nor unit 'um', and the "
            f"tiles are {step:g} apart instead of the {_HISTORIC_PX} of STAMP's version 1; extract it again, or set "
            "the attributes tile_size_um and unit"
        )
    return points / _HISTORIC_PX * _HISTORIC_UM, _HISTORIC_UM


def encoder_of(contents: Contents) -> str | None:
    """The name of the extractor."""
    return contents.attributes.get("extractor")


def root_attributes(bag: Bag) -> dict[str, Any]:
    """STAMP's attributes of the root: as the bag's file had them, else from what is known."""
    kept = bag.attributes.get("stamp", {})
    if "tile_size_um" in kept:
        return {**kept, "extractor": bag.encoder}
    trident = bag.attributes.get("trident", {}).get("coords", {})
    pixels = number(bag.attributes, "tile_px") or number(trident, "patch_size") or bag.tile_level0
    return {
        "stamp_version": VERSION,
        "extractor": _EXTRACTORS.get(bag.encoder or "", bag.encoder),
        "unit": "um",
        "tile_size_um": bag.tile_um,
        "tile_size_px": round(pixels) if pixels else _HISTORIC_PX,
        "feat_type": "tile",
    }


def write(bag: Bag, path: Path) -> None:
    """Writes STAMP's layout: `feats` float16, `coords` float32 in micrometres."""
    if bag.xy_um is None or bag.tile_um is None:
        flag = "--mpp or --mpp-table" if bag.xy is not None and bag.tile_level0 else "--tile-level0 and --mpp"
        raise InputError(
            f"slide {bag.slide_id}: STAMP's layout is in micrometres, and the micrometres per pixel of the slide are "
            f"not in its file; give {flag}"
        )
    if bag.encoder is None:
        raise InputError(
            f"slide {bag.slide_id}: STAMP's layout needs the name of the encoder, which the file does not say; give "
            "--encoder NAME"
        )
    h5py = need("h5py", "slides")
    with h5py.File(path, "w") as file:
        file["feats"] = bag.features
        file["coords"] = bag.xy_um.astype(np.float32)
        for name, value in root_attributes(bag).items():
            file.attrs[name] = "None" if value is None else value


def doubts(bag: Bag) -> list[str]:
    """Whether STAMP's slide encoders, which look for names, will take the features."""
    name = root_attributes(bag)["extractor"]
    if "tile_size_um" in bag.attributes.get("stamp", {}) or name in _KNOWN:
        return []
    return [f"name of the encoder in STAMP's words ({name} is none of them, and its slide encoders refuse it)"]


LAYOUT = Layout(
    name="stamp",
    about="STAMP: EXTRACTOR/SLIDE.h5",
    recognise=recognise,
    features=_features,
    read=read,
    encoder=encoder_of,
    write=write,
    holds=frozenset({"xy_um", "tile_um", "encoder", "stamp"}),
    dtypes=("float16",),
    doubts=doubts,
)
