"""CLAM's bags: h5_files/SLIDE.h5 with features and coordinates, pt_files/SLIDE.pt with the features alone.

Neither says the side of a tile: it is in the file of patches of the same name, or taken from the spacing of the tiles.
"""

from pathlib import Path

import numpy as np

from sansmax.data.bags.bag import Bag
from sansmax.data.bags.contents import Contents
from sansmax.data.bags.layout import Known, Layout
from sansmax.data.bags.tile_size import patches_file, tile_from_patches, tile_from_spacing
from sansmax.data.bags.trident import grown
from sansmax.errors import InputError
from sansmax.optional import need

_ROWS_PER_CHUNK = 32


def recognise(contents: Contents) -> str | None:
    """Words on a CLAM file; refuses coordinates or pictures of tiles alone."""
    if contents.kind != "hdf5":
        return None
    if "imgs" in contents.parts:
        raise InputError(f"{contents.path} holds pictures of tiles (CLAM's old pipeline), no features; {_HOW}")
    if "features" not in contents.parts:
        if "coords" in contents.parts:
            raise InputError(f"{contents.path} holds coordinates of tiles (CLAM's patches), no features; {_HOW}")
        return None
    if "coords" not in contents.parts or contents.parts["coords"].dtype != np.int32:
        return None
    return "CLAM: coordinates in level-0 pixels, no attributes"


_HOW = "extract them with CLAM's extract_features_fp.py, or with `sansmax tokenize`, and give that folder"


def read(contents: Contents, known: Known) -> Bag:
    """The bag of a file of h5_files."""
    return bag_without_attributes(contents, known, "clam")


def bag_without_attributes(contents: Contents, known: Known, layout: str) -> Bag:
    """A bag of `features` and `coords` in level-0 pixels, whose side of a tile is found elsewhere."""
    features, points = contents.features("features"), contents.points("coords")
    points = points if len(features) or points is None else np.zeros((0, 2), np.int64)
    tile, attributes = known.tile_level0, {}
    patches = patches_file(contents.path, known.patches)
    if patches is not None and patches.resolve() != contents.path.resolve():
        said = tile_from_patches(patches, len(features))
        tile = said if tile is None else tile
    if tile is None and points is not None:
        tile = tile_from_spacing(points)
        attributes = {} if tile is None else {"tile_from_spacing": True}
    return Bag(contents.slide_id, features, xy=points, tile_level0=tile, layout=layout, attributes=attributes)


def _require_places(bag: Bag) -> None:
    if bag.xy is None:
        flag = "--mpp or --mpp-table" if bag.xy_um is not None else "--layout pt, which has none"
        raise InputError(
            f"slide {bag.slide_id}: CLAM's layout needs coordinates in level-0 pixels, which the file does not say; "
            f"give {flag}"
        )
    if len(bag) and int(np.abs(bag.xy).max()) > np.iinfo(np.int32).max:
        raise InputError(f"slide {bag.slide_id}: coordinates beyond 2^31 do not fit into CLAM's layout; use sansmax")


def write(bag: Bag, path: Path) -> None:
    """Writes h5_files/SLIDE.h5."""
    _require_places(bag)
    assert bag.xy is not None
    h5py = need("h5py", "slides")
    with h5py.File(path, "w") as file:
        grown(file, "features", bag.features, _ROWS_PER_CHUNK)
        grown(file, "coords", bag.xy.astype(np.int32), _ROWS_PER_CHUNK)


def write_tensor(bag: Bag, path: Path) -> None:
    """Writes the features alone, as torch.save does."""
    import torch

    torch.save(torch.from_numpy(np.array(bag.features)), path)


def _write_beside(bag: Bag, path: Path) -> None:
    """Writes pt_files/SLIDE.pt, unless h5_files/SLIDE.h5 could not follow."""
    _require_places(bag)
    write_tensor(bag, path)


LAYOUT = Layout(
    name="clam",
    about="CLAM: h5_files/SLIDE.h5 and pt_files/SLIDE.pt",
    recognise=recognise,
    features=lambda contents: "features",
    read=read,
    write=write,
    holds=frozenset({"xy"}),
    dtypes=("float32",),
    place="h5_files/{}.h5",
    beside={"pt_files/{}.pt": _write_beside},
)
