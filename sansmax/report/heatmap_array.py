"""Scores of a slide's tokens as an HDF5 file that says what they mean, and back.

The file also holds the names under which CLAM keeps raw heat maps (`attention_scores`, `coords`), so its readers read
it.
"""

from pathlib import Path
from typing import Any

import numpy as np

from sansmax.errors import InputError
from sansmax.files import replacing
from sansmax.optional import need
from sansmax.report.slide_scores import SlideScores

FORMAT, FORMAT_VERSION = "sansmax scores", 1
TEXTS = ("slide_id", "class_name", "method", "quantity")


def write_scores_h5(scores: SlideScores, path: str | Path) -> Path:
    """The array file of a slide's scores, whole or not at all.

    Datasets: `scores` (N,) float64; `xy_level0` (N, 2) int64, upper left corners (x, y) in level-0 pixels; `coords`,
    the same under CLAM's name; `attention_scores` (N, 1) float32. Attributes of the file: `format`, `format_version`,
    `slide_id`, `class_name`, `method`, `quantity`, `meaning` (in words), and where known `side_level0`, `mpp`
    (micrometres per level-0 pixel), `slide_width`, `slide_height`, `probability`. Without coordinates the two datasets
    of them are left out and `note` says so.
    """
    h5py = need("h5py", "slides")
    with replacing(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs.update({"format": FORMAT, "format_version": FORMAT_VERSION, "meaning": scores.meaning})
        file.attrs.update({name: getattr(scores, name) for name in TEXTS})
        width, height = scores.slide_size or (None, None)
        numbers: dict[str, Any] = {"mpp": scores.mpp, "probability": scores.probability, "side_level0": scores.side}
        numbers |= {"slide_width": width, "slide_height": height}
        file.attrs.update({name: value for name, value in numbers.items() if value is not None})
        file["scores"] = scores.scores
        file["attention_scores"] = scores.scores.astype(np.float32)[:, None]
        if scores.xy is None:
            file.attrs["note"] = "the tokens have no coordinates: scores are in the order of the bag"
        else:
            file["xy_level0"] = scores.xy
            file["coords"] = file["xy_level0"]
    return Path(path)


def read_scores_h5(path: str | Path) -> SlideScores:
    """The scores that `write_scores_h5` wrote; InputError for another file, a torn one or a newer version."""
    h5py = need("h5py", "slides")
    try:
        with h5py.File(path, "r") as file:
            about = dict(file.attrs)
            if about.get("format") != FORMAT:
                raise InputError(f"{path} is no file of scores; give one that `sansmax heatmap --format h5` wrote")
            if (version := int(about["format_version"])) > FORMAT_VERSION:
                raise InputError(f"{path} has version {version} of the format, this program reads {FORMAT_VERSION}")
            xy = file["xy_level0"][:] if "xy_level0" in file else None
            values = file["scores"][:]
    except (OSError, KeyError) as e:
        raise InputError(f"{path} cannot be read as a file of scores: {e}") from e
    size = (int(about["slide_width"]), int(about["slide_height"])) if "slide_width" in about else None
    numbers = {name: float(about[name]) if name in about else None for name in ("mpp", "probability", "side_level0")}
    return SlideScores(
        scores=values,
        xy=xy,
        side=numbers["side_level0"],
        mpp=numbers["mpp"],
        probability=numbers["probability"],
        slide_size=size,
        **{name: str(about[name]) for name in TEXTS},
    )
