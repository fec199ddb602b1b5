"""DICOM files as slides: one image, one frame of several, or the tiles of a slide.

A tiled slide (VL Whole Slide Microscopy) is OpenSlide's where that is installed, all levels of the series together;
here is the way without: one file is one level, its frames are its tiles, decoded when a window touches them.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from sansmax.data.slides.dicom_pixels import DAMAGE, frame_item, frame_pixels
from sansmax.data.slides.levels import LevelSlide, rgb8, spacing_mpp
from sansmax.data.slides.picture_reader import ArraySlide
from sansmax.data.slides.slide import SlideError
from sansmax.data.slides.tiled import TileCache, TiledSlide
from sansmax.errors import InputError
from sansmax.optional import need

_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"


def open_dicom(path: str | Path, name: str, mpp: float | None = None, frame: int | None = None) -> LevelSlide:
    """A DICOM file as a slide; `frame` chooses one of several frames.

    Raises `SlideError` for several frames without `frame`, for files without pixels, and for damaged ones.
    """
    path = Path(path)
    dataset = read_header(path)
    if dataset.get("SOPClassUID") == _WHOLE_SLIDE and frame is None and dataset.get("TotalPixelMatrixColumns"):
        return DicomTiles(path, name, dataset, mpp)
    count = frames(dataset)
    if frame is None and count > 1:
        raise SlideError(f"{path} holds {count} frames, one is a slide; choose frame 0 to {count - 1}")
    if frame is not None and not 0 <= frame < count:
        raise SlideError(f"frame {frame} of {path} was asked for, it has frames 0 to {count - 1}")
    pixels = frame_pixels(dataset, path, frame or 0)
    kind = f"DICOM {dataset.get('Modality', '')}".strip() + (f", frame {frame} of {count}" if count > 1 else "")
    return ArraySlide(pixels, name, mpp or dicom_mpp(dataset, frame or 0), path, kind)


def read_header(path: Path) -> Any:
    """The data set without its pixels; a `SlideError` where it is no DICOM image."""
    pydicom = need("pydicom", "slides")
    try:
        with warnings.catch_warnings():
            # what matters of them is an error below
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(path, defer_size="1 KB")
    except (pydicom.errors.InvalidDicomError, *DAMAGE) as e:
        raise SlideError(f"cannot read {path}: it is no DICOM file, or damaged ({e}); export it again") from e
    for tag in ("Rows", "Columns", "PhotometricInterpretation", "BitsStored"):
        if dataset.get(tag) is None:
            raise SlideError(f"cannot read {path}: the DICOM file holds no picture ({tag} is missing)")
    return dataset


def frames(dataset: Any) -> int:
    """How many frames a data set says it has."""
    return max(1, int(dataset.get("NumberOfFrames") or 1))


def dicom_mpp(dataset: Any, frame: int = 0) -> float | None:
    """Micrometres per pixel by PixelSpacing, which is in millimetres; None without."""
    spacing = frame_item(dataset, frame, "PixelMeasuresSequence").get("PixelSpacing")
    if not spacing or len(spacing) != 2:
        return None
    return spacing_mpp(1000 * float(spacing[1]), 1000 * float(spacing[0]))


def one_per_series(paths: list[Path]) -> list[Path]:
    """The paths without the coarser levels, labels and overviews of tiled DICOM slides; other files stay."""
    kept, series = [], {}
    for path in paths:
        key, width = _series(path) if path.suffix.lower() in (".dcm", ".dicom") else (None, 0)
        if key is None:
            kept.append(path)
        elif width > series.get(key, (-1, path))[0]:
            series[key] = (width, path)
    return kept + [path for _, path in series.values()]


def _series(path: Path) -> tuple[str | None, int]:
    """Of a tiled slide its series and its width, 0 for labels and overviews; (None, 0) for every other file."""
    tags = ["SOPClassUID", "SeriesInstanceUID", "TotalPixelMatrixColumns", "ImageType"]
    try:
        said = need("pydicom", "slides").dcmread(path, stop_before_pixels=True, specific_tags=tags)
    except (InputError, *DAMAGE):
        # opening it will say what is wrong
        return None, 0
    if said.get("SOPClassUID") != _WHOLE_SLIDE:
        return None, 0
    picture = "VOLUME" in (said.get("ImageType") or ["VOLUME"])
    return str(said.get("SeriesInstanceUID")), int(said.get("TotalPixelMatrixColumns") or 0) if picture else 0


class DicomTiles(TiledSlide):
    """One level of a tiled slide, TILED_FULL: frames are tiles in reading order."""

    def __init__(self, path: Path, name: str, dataset: Any, mpp: float | None = None):
        self._dataset, self.cache = dataset, TileCache()
        size = (int(dataset.TotalPixelMatrixColumns), int(dataset.TotalPixelMatrixRows))
        self._tile = (int(dataset.Columns), int(dataset.Rows))
        self._across = -(-size[0] // self._tile[0])
        tiles = self._across * -(-size[1] // self._tile[1])
        if dataset.get("DimensionOrganizationType", "TILED_FULL") != "TILED_FULL" or frames(dataset) != tiles:
            raise SlideError(
                f"cannot read {path}: it has {frames(dataset)} frames, {tiles} tiles were expected (TILED_FULL, one "
                'focal plane, one optical path); OpenSlide reads more kinds: pip install "sansmax[slides]"'
            )
        super().__init__(name, path, "DICOM slide, tiled (pydicom)", [size], mpp or dicom_mpp(dataset))

    def tile_size(self, level: int) -> tuple[int, int]:
        """Width and height of a frame."""
        return self._tile

    def tile(self, level: int, row: int, column: int) -> np.ndarray:
        """One frame as (h, w, 3) uint8 RGB."""
        return rgb8(frame_pixels(self._dataset, self.path, row * self._across + column))

    def close(self) -> None:
        """Lets go of the tiles; reading afterwards is an error."""
        super().close()
        self.cache.clear()
