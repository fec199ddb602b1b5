"""GigaPath's bags: HDF5 with `features` and `coords` in level-0 pixels, nothing else."""

from pathlib import Path

import numpy as np

from sansmax.data.bags.bag import Bag
from sansmax.data.bags.clam import bag_without_attributes
from sansmax.data.bags.contents import Contents
from sansmax.data.bags.layout import Known, Layout
from sansmax.errors import InputError
from sansmax.optional import need


def recognise(contents: Contents) -> str | None:
    """Words on any HDF5 file with features; it is asked last."""
    if contents.kind != "hdf5" or "features" not in contents.parts:
        return None
    shape = contents.shape("features")
    if len(shape) == 1 and shape[0]:
        raise InputError(
            f"{contents.path} is one embedding of a whole slide ({shape[0]} numbers); features of tiles are needed"
        )
    places = "coordinates in level-0 pixels" if "coords" in contents.parts else "no coordinates"
    return f"GigaPath, or HDF5 like it: {places}, no attributes"


def read(contents: Contents, known: Known) -> Bag:
    """The bag of a GigaPath file."""
    return bag_without_attributes(contents, known, "gigapath")


def write(bag: Bag, path: Path) -> None:
    """Writes `features` and `coords`."""
    if bag.xy is None:
        flag = "--mpp or --mpp-table" if bag.xy_um is not None else "--layout pt, which has none"
        raise InputError(
            f"slide {bag.slide_id}: GigaPath's layout needs coordinates in level-0 pixels, which the file does not "
            f"say; give {flag}"
        )
    h5py = need("h5py", "slides")
    with h5py.File(path, "w") as file:
        file["features"] = bag.features
        file["coords"] = bag.xy.astype(np.int64)


LAYOUT = Layout(
    name="gigapath",
    about="GigaPath: SLIDE.h5 without attributes",
    recognise=recognise,
    features=lambda contents: "features",
    read=read,
    write=write,
    holds=frozenset({"xy"}),
    dtypes=("float32", "float16"),
)
