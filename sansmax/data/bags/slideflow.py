"""slideflow's bags, read only: SLIDE.pt, SLIDE.index.npz with the tiles' places, bags_config.json beside them.

The places are centres of tiles in level-0 pixels; ours are upper left corners.
"""

from typing import Any

import numpy as np

from sansmax.data.bags.bag import Bag
from sansmax.data.bags.contents import Contents, open_contents, read_json
from sansmax.data.bags.layout import Known, Layout
from sansmax.data.bags.plain import features_name, floats
from sansmax.data.bags.tile_size import tile_from_spacing
from sansmax.errors import InputError

INDEX = ".index.npz"
CONFIG = "bags_config.json"


def recognise(contents: Contents) -> str | None:
    """Words on a tensor with slideflow's index beside it."""
    if contents.kind != "torch" or not contents.path.with_name(contents.slide_id + INDEX).is_file():
        return None
    return "slideflow: a tensor, with the centres of the tiles in the index beside it"


def read(contents: Contents, known: Known) -> Bag:
    """The bag of a tensor and its index."""
    features = floats(contents, features_name(contents))
    index = contents.path.with_name(contents.slide_id + INDEX)
    with open_contents(index) as places:
        centres = places.points("arr_0" if "arr_0" in places.parts else next(iter(places.parts)))
    if centres is None or centres.ndim != 2 or len(centres) != len(features) or centres.shape[1] < 2:
        shape = None if centres is None else centres.shape
        raise InputError(f"{index} has places of the shape {shape} for {len(features)} features; export the bag again")
    config = read_json(contents.path.with_name(CONFIG))
    tile_um = config.get("tile_um") if isinstance(config.get("tile_um"), int | float) else None
    tile = known.tile_level0
    attributes: dict[str, Any] = {"slideflow": config} if config else {}
    if tile is None and tile_um and known.mpp:
        tile = tile_um / known.mpp
    if tile is None and (tile := tile_from_spacing(centres[:, :2])) is not None:
        attributes["tile_from_spacing"] = True
    corners = None if tile is None else np.rint(centres[:, :2] - tile / 2).astype(np.int64)
    if not len(features):
        corners = np.zeros((0, 2), np.int64)
    return Bag(
        slide_id=contents.slide_id,
        features=features,
        xy=corners,
        tile_level0=tile,
        tile_um=float(tile_um) if tile_um else None,
        encoder=encoder_of(contents),
        layout="slideflow",
        attributes=attributes,
    )


def encoder_of(contents: Contents) -> str | None:
    """The class of the extractor, from bags_config.json."""
    extractor = read_json(contents.path.with_name(CONFIG)).get("extractor")
    return str(extractor["class"]) if isinstance(extractor, dict) and extractor.get("class") else None


LAYOUT = Layout(
    name="slideflow",
    about="slideflow: SLIDE.pt with SLIDE.index.npz",
    recognise=recognise,
    features=features_name,
    read=read,
    encoder=encoder_of,
)
