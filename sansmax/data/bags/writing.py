"""Writes one bag in any layout, whole or not at all, and says what the layout cannot hold."""

import dataclasses
from pathlib import Path

import numpy as np

from sansmax.data.bags.bag import Bag
from sansmax.data.bags.finite import require_finite
from sansmax.data.bags.layout import Layout
from sansmax.data.bags.layouts import layout_named
from sansmax.errors import InputError
from sansmax.files import replacing

# what is kept in pixels or in micrometres; one of them is enough where the resolution is known
_PAIRS = (
    ("xy", "xy_um", "coordinates in level-0 pixels", "coordinates in micrometres"),
    ("tile_level0", "tile_um", "side of a tile in level-0 pixels", "side of a tile in micrometres"),
)
_WORDS = {"mpp": "micrometres per pixel", "slide_size": "size of the slide", "encoder": "name of the encoder"}
_NEIGHBOURS = ("trident", "stamp")


def write_bag(
    bag: Bag, path: str | Path, layout: str = "sansmax", *, dtype: str | None = None, allow_nan: bool = False
) -> list[str]:
    """Writes a bag to the file `path` and gives what the layout could not hold, a few words each.

    `layout` is sansmax, trident, clam, stamp, gigapath, pt or npy; `dtype` float16 or float32, by default that of the
    features where the layout takes it. The file takes its place when it is whole. CLAM's tensor is written beside it:
    .../pt_files/SLIDE.pt for .../h5_files/SLIDE.h5. Raises InputError for what the layout needs and the bag lacks, NaN
    or infinity (unless `allow_nan`), and values that do not fit into float16.
    """
    kind = layout_named(layout, written=True)
    path = Path(path)
    chosen = _dtype(bag, kind, dtype)
    ready = dataclasses.replace(bag, features=_as_dtype(bag, chosen, allow_nan))
    assert kind.write is not None
    for place, write in kind.beside.items():
        # before the file that says that this slide is done
        with replacing(path.parent.parent / place.format(path.stem)) as temporary:
            write(ready, temporary)
    with replacing(path) as temporary:
        kind.write(ready, temporary)
    return lost(bag, kind, chosen) + kind.doubts(bag)


def lost(bag: Bag, kind: Layout, dtype: str) -> list[str]:
    """What of a bag a layout cannot hold, in words."""
    said: list[str] = []
    for pixels, micrometres, of_pixels, of_micrometres in _PAIRS:
        there = {name for name in (pixels, micrometres) if getattr(bag, name) is not None}
        if bag.mpp is None or not there & kind.holds:
            both = ((pixels, of_pixels), (micrometres, of_micrometres))
            said += [words for name, words in both if name in there - kind.holds]
    said += [words for name, words in _WORDS.items() if getattr(bag, name) is not None and name not in kind.holds]
    if "xy" in kind.holds and "xy_um" not in kind.holds and (off := _rounding(bag)) > 0.01:
        said.append(f"parts of pixels of the coordinates (up to {off:.2f} px)")
    said += [f"attributes of {name}" for name in _NEIGHBOURS if name not in kind.holds and bag.attributes.get(name)]
    own = sorted(name for name in bag.attributes if name not in (*_NEIGHBOURS, "tile_from_spacing"))
    if own and "attributes" not in kind.holds:
        said.append("attributes " + ", ".join(own))
    if np.dtype(dtype).itemsize < bag.features.dtype.itemsize and len(bag):
        said.append(f"digits of the features ({bag.features.dtype} to {dtype})")
    return said


def _rounding(bag: Bag) -> float:
    """How far the corners are from whole pixels, in pixels."""
    if bag.xy is None or bag.xy_um is None or bag.mpp is None or not len(bag):
        return 0.0
    return float(np.abs(bag.xy_um / bag.mpp - bag.xy).max())


def _dtype(bag: Bag, kind: Layout, dtype: str | None) -> str:
    if dtype is not None and dtype not in kind.dtypes:
        raise InputError(f"the layout {kind.name} keeps features as {' or '.join(kind.dtypes)}, got {dtype!r}")
    if dtype is not None:
        return dtype
    own = str(bag.features.dtype)
    # readers of the neighbours' files expect what the neighbours write
    keeps = own in kind.dtypes and (kind.dtypes[0] == "float16" or bag.layout == kind.name)
    return own if keeps else "float32" if "float32" in kind.dtypes else kind.dtypes[0]


def _as_dtype(bag: Bag, dtype: str, allow_nan: bool) -> np.ndarray:
    if not allow_nan:
        require_finite(bag.features, bag.slide_id)
    with np.errstate(over="ignore"):
        features = np.ascontiguousarray(bag.features, dtype=dtype)
    if dtype == "float16" and bag.features.dtype != np.float16:
        over = np.isinf(features) & np.isfinite(bag.features)
        if over.any():
            largest = float(np.abs(bag.features[over]).max())
            raise InputError(
                f"slide {bag.slide_id}: {int(over.sum())} numbers of the features, up to {largest:g}, do not fit into "
                "float16 (65504); give --dtype float32, or a layout that keeps it"
            )
    return features
