"""The side of a tile where a file of features does not say it: from CLAM's patches, or the spacing of the tiles."""

from pathlib import Path

import numpy as np

from sansmax.data.bags.contents import open_contents
from sansmax.errors import InputError

# a distance that is rarer than this share of the most frequent one is an exception
_EXCEPTION = 0.1


def patches_file(features: Path, patches: Path | None) -> Path | None:
    """The file of coordinates that belongs to a file of features: in the folder `patches`, or in the usual places."""
    name = f"{features.stem}.h5"
    if patches is not None:
        return patches / name if (patches / name).is_file() else None
    for folder in list(features.parents)[:3]:
        if (folder / "patches" / name).is_file():
            return folder / "patches" / name
    return None


def tile_from_patches(patches: Path, tokens: int) -> float:
    """Side of a tile in level-0 pixels, of CLAM's patches/<slide_id>.h5: patch_size times downsample.

    InputError where the file has another number of tiles than the features: CLAM writes features batch by batch, and a
    run that was killed leaves a file that looks whole.
    """
    with open_contents(patches) as contents:
        if "coords" not in contents.parts:
            raise InputError(f"{patches} has no coordinates; give CLAM's folder of patches with --patches")
        attributes, count = contents.attributes_of("coords"), contents.shape("coords")[0]
    if count != tokens:
        raise InputError(
            f"there are features of {tokens} tiles, and {patches} lists {count}: the extraction was stopped half way, "
            "or belongs to other patches. Extract this slide again"
        )
    size = attributes.get("patch_size")
    if size is None:
        raise InputError(f"{patches} does not say patch_size; give the side of a tile with --tile-level0 PIXELS")
    downsample = attributes.get("downsample") or 1.0
    # the variant called Fishing-Rod
    custom = attributes.get("custom_downsample") or 1
    return float(size) * float(downsample[0] if isinstance(downsample, list) else downsample) * float(custom)


def tile_from_spacing(points: np.ndarray) -> float | None:
    """The distance of neighbours within rows and columns, of points (N, 2); None where no two share a row or column.

    That is the side of a tile where tiles do not overlap. Rows, not the whole picture: CLAM begins a grid of its own at
    every piece of tissue. Of several distances it is the smallest that is no exception.
    """
    steps = []
    for along, across in ((0, 1), (1, 0)):
        order = np.lexsort((points[:, along], points[:, across]))
        difference = np.diff(points[order], axis=0)
        same = difference[:, across] == 0
        steps.append(difference[same, along])
    step = np.concatenate(steps)
    step = step[step > 0]
    if not len(step):
        return None
    values, counts = np.unique(step, return_counts=True)
    # pieces of tissue that share a row by chance leave a few odd distances
    return float(values[counts >= _EXCEPTION * counts.max()].min())
