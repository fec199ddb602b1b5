"""Tensors and arrays without a format: .pt, .npy and .npz, with or without coordinates beside the features."""

from pathlib import Path
from typing import Any

import numpy as np

from sansmax.data.bags.bag import Bag
from sansmax.data.bags.clam import write_tensor
from sansmax.data.bags.contents import Contents
from sansmax.data.bags.layout import Known, Layout
from sansmax.data.bags.tile_size import tile_from_spacing
from sansmax.errors import InputError

_FEATURES = ("", "features", "feats", "feat", "embeddings", "patch_embeddings", "x", "arr_0")
_POINTS = ("coords", "coordinates", "xy", "coord", "locations")


def features_name(contents: Contents) -> str:
    """The part with the features: the one with a usual name, else the only one that is two-dimensional."""
    named = [name for name in _FEATURES if name in contents.parts]
    if named:
        return named[0]
    tables = [name for name in contents.parts if len(contents.shape(name)) == 2 and name not in _POINTS]
    if len(tables) != 1:
        found = ", ".join(f"{name} {contents.shape(name)}" for name in contents.parts) or "nothing"
        raise InputError(f"{contents.path} holds {found}; features are expected under the name 'features'")
    return tables[0]


def _recognise(contents: Contents, kinds: tuple[str, ...], what: str) -> str | None:
    if contents.kind not in kinds:
        return None
    shape = contents.shape(features_name(contents))
    if len(shape) == 1 and shape[0]:
        raise InputError(
            f"{contents.path} is one row of {shape[0]} numbers, an embedding of a whole slide; features of tiles are "
            "needed, of the shape (tiles, width)"
        )
    where = "with" if _points_name(contents) else "without"
    return f"{what}: features {where} coordinates"


def _points_name(contents: Contents) -> str | None:
    return next((name for name in _POINTS if name in contents.parts), None)


def _read(contents: Contents, known: Known, layout: str) -> Bag:
    features = floats(contents, features_name(contents))
    name = _points_name(contents)
    points = None if name is None else contents.points(name)
    tile, attributes = known.tile_level0, {}
    if tile is None and points is not None:
        tile = tile_from_spacing(points)
        attributes = {} if tile is None else {"tile_from_spacing": True}
    tile = None if points is None else tile
    return Bag(contents.slide_id, features, xy=points, tile_level0=tile, layout=layout, attributes=attributes)


def floats(contents: Contents, name: str) -> np.ndarray:
    """Part `name` as features; InputError where it holds other things than floating-point numbers."""
    features = contents.features(name)
    if features.dtype.kind != "f":
        raise InputError(f"{contents.path} holds {features.dtype}; features are floating-point numbers")
    return features


def _write_array(bag: Bag, path: Path) -> None:
    np.save(path, bag.features, allow_pickle=False)


def _layout(name: str, about: str, kinds: tuple[str, ...], place: str, write: Any) -> Layout:
    return Layout(
        name=name,
        about=about,
        recognise=lambda contents: _recognise(contents, kinds, about),
        features=features_name,
        read=lambda contents, known: _read(contents, known, name),
        write=write,
        place=place,
    )


PT = _layout("pt", "a tensor of torch.save", ("torch",), "{}.pt", write_tensor)
NPY = _layout("npy", "an array of numpy", ("npy", "npz"), "{}.npy", _write_array)
LAYOUTS = (PT, NPY)
