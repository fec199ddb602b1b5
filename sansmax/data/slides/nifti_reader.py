"""NIfTI volumes as slices: canonical orientation, intensities by percentiles."""

from pathlib import Path
from typing import Any

import numpy as np

from sansmax.data.slides.levels import spacing_mpp
from sansmax.data.slides.picture_reader import ArraySlide
from sansmax.data.slides.slide import SlideError
from sansmax.optional import need

_DAMAGE = (OSError, ValueError, RuntimeError, EOFError, IndexError, KeyError, TypeError)
_MICROMETRES = {"meter": 1e6, "mm": 1e3, "micron": 1.0, "unknown": 1e3}
# The darkest and the brightest half per cent are cut off
_PERCENTILES = (0.5, 99.5)
_SAMPLE = 2_000_000


def open_nifti(path: str | Path, name: str, mpp: float | None = None, frame: int | None = None) -> ArraySlide:
    """One slice of a NIfTI volume as a slide.

    The volume is turned to the closest canonical orientation (RAS+); `frame` counts slices along its last axis, of
    several volumes one after the other. Rows run from anterior to posterior, columns from left to right. Raises
    `SlideError` for several slices without `frame`.
    """
    path = Path(path)
    volume = load_volume(path)
    count = slices(volume)
    if frame is None and count > 1:
        raise SlideError(f"{path} holds {count} slices, one is a slide; choose frame 0 to {count - 1}")
    if frame is not None and not 0 <= frame < count:
        raise SlideError(f"frame {frame} of {path} was asked for, it has frames 0 to {count - 1}")
    pixels = slice_pixels(volume, path, frame or 0)
    kind = f"NIfTI slice {frame or 0} of {count}"
    return ArraySlide(pixels, name, mpp or _mpp(volume), path, kind)


def slices(volume: Any) -> int:
    """How many slices the volumes of a file have together."""
    return int(np.prod(volume.shape[2:], dtype=np.int64))


def slice_pixels(volume: Any, path: Path, frame: int) -> np.ndarray:
    """(H, W) uint16: 0 is the 0.5th percentile of the volume, 65535 the 99.5th."""
    try:
        depth = volume.shape[2] if len(volume.shape) > 2 else 1
        data = np.asarray(volume.dataobj).reshape(*volume.shape[:2], depth, -1, order="F")[..., frame // depth]
    except _DAMAGE as e:
        raise SlideError(f"cannot read {path}: its volume is damaged or cut short ({e}); replace it") from e
    if data.dtype.kind not in "iuf":
        raise SlideError(f"cannot read {path}: its values are {data.dtype}, allowed are whole and real numbers")
    # every k-th voxel of a large volume tells the percentiles as well
    sample = data.reshape(-1)[:: max(1, data.size // _SAMPLE)].astype(np.float64)
    sample = sample[np.isfinite(sample)]
    low, high = np.percentile(sample, _PERCENTILES) if sample.size else (0.0, 0.0)
    plane = np.nan_to_num(data[..., frame % depth].astype(np.float64), nan=low, posinf=high, neginf=low)
    unit = np.clip((plane - low) / (high - low), 0, 1) if high > low else np.zeros(plane.shape)
    # (x, y) with y towards the front becomes rows from the front
    return np.ascontiguousarray(np.rint(unit * 65535).astype(np.uint16).T[::-1])


def load_volume(path: Path) -> Any:
    """The volume in its closest canonical orientation, its values still in the file."""
    nibabel = need("nibabel", "slides")
    try:
        volume = nibabel.load(path)
        if not 2 <= len(volume.shape) <= 4 or 0 in volume.shape:
            raise SlideError(f"cannot read {path}: its shape is {volume.shape}, allowed are 2 to 4 dimensions")
        return nibabel.as_closest_canonical(volume) if len(volume.shape) > 2 else volume
    except SlideError:
        raise
    except (nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError, *_DAMAGE) as e:
        raise SlideError(f"cannot read {path}: it is no NIfTI file, or damaged ({e}); replace it") from e


def _mpp(volume: Any) -> float | None:
    zooms = volume.header.get_zooms()
    unit = _MICROMETRES.get(volume.header.get_xyzt_units()[0])
    if unit is None or len(zooms) < 2:
        return None
    return spacing_mpp(float(zooms[0]) * unit, float(zooms[1]) * unit)
